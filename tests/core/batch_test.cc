// SPDX-License-Identifier: Apache-2.0
#include "batch.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "format.h"
#include "gradient_sums.h"

namespace damo {
namespace {

std::vector<uint64_t> keys_of(const Batch& batch) {
  std::vector<uint64_t> keys;
  for (const uint64_t mixed : batch.mixed) keys.push_back(unmix_key(mixed));
  return keys;
}

std::vector<uint64_t> random_keys(size_t count, uint64_t distinct, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint64_t> keys(count);
  for (uint64_t& key : keys) key = random() % distinct * 0x9E3779B97F4A7C15ULL;  // zero among them
  return keys;
}

// Of very different sizes, so that the order of a sum shows in its bits.
std::vector<float> random_floats(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> floats(count);
  for (float& f : floats)
    f = std::ldexp(static_cast<float>(static_cast<int64_t>(random() % 2001) - 1000),
                   static_cast<int>(random() % 40) - 20);
  return floats;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST_CASE("batch: distinct keys in order of first appearance, and each position's row") {
  const std::vector<uint64_t> keys{7, 0, 7, ~uint64_t{0}, 0, 7, 5};
  const Batch batch(keys, std::nullopt);
  CHECK(keys_of(batch) == std::vector<uint64_t>{7, 0, ~uint64_t{0}, 5});
  CHECK(batch.index == std::vector<uint32_t>{0, 1, 0, 2, 1, 0, 3});
  CHECK(batch.first == std::vector<uint32_t>{0, 1, 3, 6});
  CHECK(batch.hints == std::vector<Slot>(4, kNoSlot));
  CHECK(batch.num_positions() == 7);
  CHECK(batch.num_rows() == 4);
}

TEST_CASE("batch: positions of the padding key belong to no row, wherever they are") {
  const std::vector<uint64_t> keys{0, 3, 0, 4, 3, 0};
  const Batch batch(keys, 0);
  CHECK(keys_of(batch) == std::vector<uint64_t>{3, 4});
  CHECK(batch.index == std::vector<uint32_t>{Batch::kNoRow, 0, Batch::kNoRow, 1, 0, Batch::kNoRow});
  CHECK(batch.first == std::vector<uint32_t>{1, 3});
  const Batch nothing(std::vector<uint64_t>(5, 9), 9);
  CHECK(nothing.num_rows() == 0);
  CHECK(nothing.num_positions() == 5);
  const Batch empty(std::span<const uint64_t>{}, std::nullopt);
  CHECK(empty.num_positions() == 0);
  CHECK(empty.num_rows() == 0);
}

TEST_CASE("batch: agrees with a map for any share of repeats, keys that share half their mix included") {
  std::vector<std::vector<uint64_t>> cases;
  for (const uint64_t distinct : {1, 2, 60, 1000, 100000}) cases.push_back(random_keys(20000, distinct, distinct));
  // The set keeps the high half of a mixed key, and probes from the low half: each half alone repeats here.
  std::vector<uint64_t> alike;
  for (uint64_t i = 0; i < 3000; ++i) {
    alike.push_back(unmix_key(uint64_t{0xabcdef12} << 32 | i));
    alike.push_back(unmix_key(i << 32 | 0x12345678));
  }
  alike.insert(alike.end(), alike.begin(), alike.end());
  cases.push_back(alike);
  for (const std::vector<uint64_t>& keys : cases) {
    const Batch batch(keys, std::nullopt);
    std::map<uint64_t, uint32_t> rows;
    bool right = true;
    for (size_t p = 0; p < keys.size(); ++p) {
      const auto [at, added] = rows.emplace(keys[p], static_cast<uint32_t>(rows.size()));
      right = right && batch.index[p] == at->second && batch.mixed[at->second] == mix_key(keys[p]);
      if (added) right = right && batch.first[at->second] == p;
    }
    CHECK(right);
    CHECK(batch.num_rows() == rows.size());
    CHECK(batch.first.size() == rows.size());
    CHECK(batch.hints.size() == rows.size());
  }
}

TEST_CASE("batch: every position gets its row's first floats, padding zeros, for every thread count and dimension") {
  for (const size_t dimension : {1, 8, 16, 32, 64, 5}) {
    const std::vector<uint64_t> keys = random_keys(9001, 700, dimension);
    const Batch batch(keys, uint64_t{0});
    const std::vector<float> rows = random_floats(batch.num_rows() * dimension, dimension);
    std::vector<float> expected(keys.size() * dimension, 0.0f), begun(expected.size(), 7.0f);
    for (size_t p = 0; p < keys.size(); ++p)
      if (batch.index[p] != Batch::kNoRow)
        std::copy_n(rows.data() + batch.index[p] * dimension, dimension, expected.data() + p * dimension);
    for (uint32_t r = 0; r < batch.num_rows(); ++r)
      std::copy_n(rows.data() + r * dimension, dimension, begun.data() + batch.first[r] * dimension);
    for (const size_t threads : {1, 3}) {
      ThreadPool pool(threads);
      std::vector<float> out = begun;
      repeat_rows(batch, dimension, pool, out.data());
      CHECK(same_bits(out, expected));
    }
  }
}

TEST_CASE("batch: the union of batches is the batch of their keys one after the other, with the first hint of a key") {
  const std::vector<std::vector<uint64_t>> parts{{1, 2, 1}, {}, {3, 2, 0, 3}, {2, 2, 9, 1}};
  std::vector<Batch> batches;
  std::vector<const Batch*> pointers;
  std::vector<uint64_t> all;
  for (const std::vector<uint64_t>& keys : parts) {
    batches.emplace_back(keys, std::nullopt);
    for (uint32_t r = 0; r < batches.back().num_rows(); ++r)
      batches.back().hints[r] = static_cast<Slot>(100 * batches.size() + r);
    all.insert(all.end(), keys.begin(), keys.end());
  }
  for (const Batch& batch : batches) pointers.push_back(&batch);
  const Batch merged{std::span<const Batch* const>(pointers)};
  const Batch whole(all, std::nullopt);
  CHECK(merged.mixed == whole.mixed);
  CHECK(merged.index == whole.index);
  CHECK(merged.first == whole.first);
  // Rows 1, 2 of part 0; 3, 0 of part 2 (2 is known already); 9 of part 3.
  CHECK(merged.hints == std::vector<Slot>{100, 101, 300, 302, 401});
  CHECK(merged.hints_at == Batch::kNever);
  for (Batch& batch : batches) batch.hints_at = 7;
  CHECK(Batch{std::span<const Batch* const>(pointers)}.hints_at == 7);
  // Were the places of one noted later, those of another might have changed by then.
  batches[2].hints_at = 8;
  CHECK(Batch{std::span<const Batch* const>(pointers)}.hints_at == Batch::kNever);
}

TEST_CASE("batch: a union keeps padding positions out, part by part") {
  const std::vector<uint64_t> first{0, 1, 0}, second{5, 0, 1};
  const Batch a(first, 0), b(second, std::nullopt);
  const Batch* parts[] = {&a, &b};
  const Batch merged{std::span<const Batch* const>(parts)};
  CHECK(keys_of(merged) == std::vector<uint64_t>{1, 5, 0});
  CHECK(merged.index == std::vector<uint32_t>{Batch::kNoRow, 0, Batch::kNoRow, 1, 2, 0});
  CHECK(merged.first == std::vector<uint32_t>{1, 3, 4});
  const Batch none{std::span<const Batch* const>()};
  CHECK(none.num_rows() == 0);
}

TEST_CASE("batch: shard order lists each row once, under its shard, in order of appearance") {
  const std::vector<uint64_t> keys = random_keys(5000, 3000, 4);
  const Batch batch(keys, std::nullopt);
  for (const size_t shards : {1, 2, 64}) {
    const HotTier tier(1 << 20, shards);
    std::vector<uint32_t> wanted;
    for (uint32_t r = 0; r < batch.num_rows(); r += 2) wanted.push_back(r);
    for (const bool all : {true, false}) {
      const ShardOrder order = all ? ShardOrder(batch, tier) : ShardOrder(batch, wanted, tier);
      CHECK(order.begin.size() == shards + 1);
      CHECK(order.begin.back() == (all ? batch.num_rows() : wanted.size()));
      CHECK(order.order.size() == order.begin.back());
      bool right = true;
      for (size_t s = 0; s < shards; ++s)
        for (uint32_t i = order.begin[s]; i < order.begin[s + 1]; ++i)
          right = right && tier.shard_of(batch.mixed[order.order[i]]) == s &&
                  (i == order.begin[s] || order.order[i - 1] < order.order[i]) && (all || order.order[i] % 2 == 0);
      CHECK(right);
    }
  }
}

// What design and contract say, in the plainest code: float32, in order of appearance, the first one as it is.
std::vector<float> plain_sums(const Batch& batch, const std::vector<float>& gradients, size_t dimension) {
  std::vector<float> sums(batch.num_rows() * dimension);
  std::vector<bool> begun(batch.num_rows(), false);
  for (size_t p = 0; p < batch.num_positions(); ++p) {
    const uint32_t row = batch.index[p];
    if (row == Batch::kNoRow) continue;
    for (size_t d = 0; d < dimension; ++d) {
      float& sum = sums[row * dimension + d];
      sum = begun[row] ? sum + gradients[p * dimension + d] : gradients[p * dimension + d];
    }
    begun[row] = true;
  }
  return sums;
}

TEST_CASE("batch: gradients are summed in order of appearance, bit for bit, for every thread count and dimension") {
  for (const size_t dimension : {1, 3, 8, 16, 32, 64, 17}) {
    for (const uint64_t distinct : {50, 4000}) {  // below and above what is split over threads
      const std::vector<uint64_t> keys = random_keys(9000, distinct, dimension);
      const Batch batch(keys, uint64_t{0});
      const std::vector<float> gradients = random_floats(keys.size() * dimension, dimension + 1);
      const std::vector<float> expected = plain_sums(batch, gradients, dimension);
      for (const size_t threads : {1, 2, 3, 7}) {
        ThreadPool pool(threads);
        std::vector<float> sums(batch.num_rows() * dimension, std::numeric_limits<float>::quiet_NaN());
        const float* part = gradients.data();
        const size_t positions = keys.size();
        sum_gradients(batch, {&part, 1}, {&positions, 1}, dimension, pool, sums.data());
        CHECK(same_bits(sums, expected));
      }
    }
  }
}

TEST_CASE("batch: gradients of several lookups add up as if they were one lookup") {
  const size_t dimension = 5;
  const std::vector<uint64_t> keys = random_keys(8000, 5000, 8);
  const std::vector<float> gradients = random_floats(keys.size() * dimension, 9);
  const std::span<const uint64_t> all(keys);
  const Batch a(all.first(3000), std::nullopt), b(all.subspan(3000, 0), std::nullopt),
      c(all.subspan(3000), std::nullopt);
  const Batch* batches[] = {&a, &b, &c};
  const Batch merged{std::span<const Batch* const>(batches)};
  const float* parts[] = {gradients.data(), nullptr, gradients.data() + 3000 * dimension};
  const size_t positions[] = {3000, 0, 5000};
  for (const size_t threads : {1, 4}) {
    ThreadPool pool(threads);
    std::vector<float> sums(merged.num_rows() * dimension);
    sum_gradients(merged, parts, positions, dimension, pool, sums.data());
    CHECK(same_bits(sums, plain_sums(Batch(keys, std::nullopt), gradients, dimension)));
  }
}

TEST_CASE("batch: a sum of one gradient is that gradient, its negative zero included") {
  const std::vector<uint64_t> keys{1, 2, 2};
  const Batch batch(keys, std::nullopt);
  const std::vector<float> gradients{-0.0f, -0.0f, -0.0f};
  ThreadPool pool(1);
  const float* part = gradients.data();
  const size_t positions = 3;
  std::vector<float> sums(2, 1.0f);
  sum_gradients(batch, {&part, 1}, {&positions, 1}, 1, pool, sums.data());
  CHECK(std::signbit(sums[0]));
  CHECK(std::signbit(sums[1]));
}

TEST_CASE("batch: the first row that is not finite is found, at any place and thread count") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const size_t rows : {1, 100, 5000}) {
    for (const size_t threads : {1, 3}) {
      ThreadPool pool(threads);
      const size_t dimension = 3;
      std::vector<float> sums(rows * dimension, std::numeric_limits<float>::max());
      CHECK(first_not_finite(sums.data(), rows, dimension, pool) == std::nullopt);
      for (const float bad :
           {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN(), std::bit_cast<float>(0xffc00001u)}) {
        for (const size_t row : {size_t{0}, rows / 2, rows - 1}) {
          std::vector<float> damaged = sums;
          damaged[row * dimension + 2] = bad;
          damaged[rows * dimension - 1] = bad;
          CHECK(first_not_finite(damaged.data(), rows, dimension, pool) == row);
        }
      }
    }
  }
  ThreadPool pool(2);
  CHECK(first_not_finite(nullptr, 0, 4, pool) == std::nullopt);
}

}  // namespace
}  // namespace damo
