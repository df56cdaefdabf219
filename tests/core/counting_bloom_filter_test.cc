// SPDX-License-Identifier: Apache-2.0
#include "counting_bloom_filter.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace damo {
namespace {

using Keys = std::vector<uint64_t>;

FilterSettings settings_of(uint64_t capacity, uint32_t count = 3, double fpr = 1e-3, uint64_t halve_every = 0) {
  return {capacity, count, fpr, halve_every};
}

Keys keys_from(uint64_t first, size_t n, uint64_t stride = 1) {
  Keys keys(n);
  for (size_t i = 0; i < n; ++i) keys[i] = (first + i) * stride;
  return keys;
}

Keys random_keys(size_t n, uint64_t seed) {
  std::mt19937_64 engine(seed);
  Keys keys(n);
  for (uint64_t& key : keys) key = engine();
  return keys;
}

std::vector<uint8_t> estimates(const CountingBloomFilter& filter, const Keys& keys) {
  std::vector<uint8_t> out(keys.size());
  filter.estimate(keys, out.data());
  return out;
}

std::vector<bool> checks(const CountingBloomFilter& filter, const Keys& keys) {
  const auto out = std::make_unique<bool[]>(keys.size());
  filter.check(keys, out.get());
  return std::vector<bool>(out.get(), out.get() + keys.size());
}

size_t num_let_through(const CountingBloomFilter& filter, const Keys& keys) {
  const std::vector<bool> seen = checks(filter, keys);
  return static_cast<size_t>(std::count(seen.begin(), seen.end(), true));
}

std::string counters_of(const CountingBloomFilter& filter) {
  std::string all;
  for (size_t i = 0; i < filter.num_chunks(); ++i)
    all.append(reinterpret_cast<const char*>(filter.chunk(i).data()), filter.chunk(i).size());
  return all;
}

TEST_CASE("counting bloom filter: no key is ever counted less than it was added, however full the filter is") {
  // 20 times the capacity, in calls of all sizes around the look-ahead.
  CountingBloomFilter filter(settings_of(500));
  std::unordered_map<uint64_t, uint64_t> counts;
  std::mt19937_64 engine(1);
  for (int round = 0; round < 400; ++round) {
    Keys keys(engine() % 100);
    for (uint64_t& key : keys) key = engine() % 10000 * 977;
    const auto num = static_cast<uint32_t>(engine() % 4);
    filter.add(keys, num);
    for (const uint64_t key : keys) counts[key] += num;
  }
  for (const auto& [key, count] : counts) {
    const uint8_t estimate = estimates(filter, {key})[0];
    REQUIRE(estimate >= std::min<uint64_t>(count, 15));
    REQUIRE(checks(filter, {key})[0] == (estimate >= 3));
  }
}

TEST_CASE("counting bloom filter: far below capacity the counts are exact") {
  CountingBloomFilter filter(settings_of(100000));
  const Keys keys = random_keys(1000, 2);
  for (size_t i = 0; i < keys.size(); ++i) filter.add({&keys[i], 1}, static_cast<uint32_t>(i % 17));
  const std::vector<uint8_t> out = estimates(filter, keys);
  for (size_t i = 0; i < keys.size(); ++i) CHECK(out[i] == std::min<size_t>(i % 17, 15));
  CHECK(num_let_through(filter, random_keys(1000, 3)) == 0);
}

TEST_CASE("counting bloom filter: at capacity it lets through what it says, whatever the pattern of the keys") {
  constexpr size_t kCapacity = 60000, kAsked = 600000;
  for (const double fpr : {1e-2, 1e-3}) {
    for (const uint32_t count : {1u, 3u, 15u}) {
      // 0: random. The others: sequential, and strides that leave low bits, high bits or middle bits alike.
      for (const uint64_t stride : {uint64_t{0}, uint64_t{1}, uint64_t{64}, uint64_t{1} << 20, uint64_t{1} << 32,
                                    uint64_t{1} << 44, uint64_t{6700417}}) {
        if (count != 3 && stride > 1) continue;  // the count changes nothing in what matters here
        CountingBloomFilter filter(settings_of(kCapacity, count, fpr));
        filter.add(stride == 0 ? random_keys(kCapacity, 4) : keys_from(0, kCapacity, stride), count);
        const Keys others = stride == 0 ? random_keys(kAsked, 5) : keys_from(kCapacity, kAsked, stride);
        const double measured = static_cast<double>(num_let_through(filter, others)) / kAsked;
        CAPTURE(fpr);
        CAPTURE(count);
        CAPTURE(stride);
        CHECK(measured < fpr * 1.15);
        CHECK(measured > fpr * 0.85);
        CHECK(filter.estimated_fpr() == doctest::Approx(fpr).epsilon(0.05));
        CHECK(filter.distinct_keys() == doctest::Approx(kCapacity).epsilon(0.01));
      }
    }
  }
}

TEST_CASE("counting bloom filter: conservative update keeps rare keys rare beside popular ones, beyond capacity too") {
  // Four times the capacity, one key in ten added ten times: of the keys added once 0.03 % seem to have come three
  // times. A filter that adds to every counter of a key says so of 14 %.
  constexpr size_t kCapacity = 50000, kKeys = 4 * kCapacity;
  CountingBloomFilter filter(settings_of(kCapacity, 3, 1e-2));
  const Keys keys = random_keys(kKeys, 6);
  filter.add(keys, 1);
  for (int round = 1; round < 10; ++round) filter.add(std::span(keys).first(kKeys / 10), 1);
  const Keys rare(keys.begin() + kKeys / 10, keys.end());
  CHECK(static_cast<double>(num_let_through(filter, rare)) / static_cast<double>(rare.size()) < 1e-3);
}

TEST_CASE("counting bloom filter: counters depend on the order of the adds, not on the size of the calls") {
  Keys keys = random_keys(20000, 7);
  for (size_t i = 0; i < keys.size(); i += 3) keys[i] = keys[i / 7];  // repetitions, near and far
  const FilterSettings settings = settings_of(3000, 3, 1e-2, 7777);
  CountingBloomFilter whole(settings);
  whole.add(keys, 2);
  for (const size_t step : {size_t{1}, size_t{31}, size_t{32}, size_t{33}, size_t{1000}}) {
    CountingBloomFilter parts(settings);
    for (size_t i = 0; i < keys.size(); i += step)
      parts.add(std::span(keys).subspan(i, std::min(step, keys.size() - i)), 2);
    CHECK(counters_of(parts) == counters_of(whole));
    CHECK(parts.adds() == whole.adds());
    CHECK(parts.fill() == whole.fill());
  }
}

TEST_CASE("counting bloom filter: add_and_check adds as add does, and says what check would after each key") {
  Keys keys = random_keys(5000, 8);
  for (size_t i = 1; i < keys.size(); i += 2) keys[i] = keys[i / 2];
  std::vector<uint32_t> nums(keys.size());
  for (size_t i = 0; i < nums.size(); ++i) nums[i] = static_cast<uint32_t>(i % 5);
  const FilterSettings settings = settings_of(1000, 4, 1e-2);
  CountingBloomFilter one_num(settings), each_num(settings), plain(settings), plain_nums(settings);
  const auto seen = std::make_unique<bool[]>(keys.size());
  one_num.add_and_check(keys, 2, seen.get());
  for (size_t i = 0; i < keys.size(); ++i) {
    plain.add({&keys[i], 1}, 2);
    REQUIRE(seen[i] == checks(plain, {keys[i]})[0]);
  }
  each_num.add_and_check(keys, nums, seen.get());
  for (size_t i = 0; i < keys.size(); ++i) {
    plain_nums.add({&keys[i], 1}, nums[i]);
    REQUIRE(seen[i] == checks(plain_nums, {keys[i]})[0]);
  }
  CountingBloomFilter nums_only(settings);
  nums_only.add(keys, nums);
  CHECK(counters_of(one_num) == counters_of(plain));
  CHECK(counters_of(each_num) == counters_of(plain_nums));
  CHECK(counters_of(nums_only) == counters_of(plain_nums));
  CHECK(nums_only.adds() == plain_nums.adds());
}

TEST_CASE("counting bloom filter: 15 is the end of counting; num 0 and no keys change nothing") {
  CountingBloomFilter filter(settings_of(100, 15));
  filter.add(Keys{1}, 14);
  CHECK_FALSE(checks(filter, {1})[0]);
  filter.add(Keys{1}, 0);
  filter.add(Keys{}, 5);
  CHECK(estimates(filter, {1})[0] == 14);
  CHECK(filter.adds() == 14);
  filter.add(Keys{1}, ~0u);
  CHECK(estimates(filter, {1})[0] == 15);
  CHECK(checks(filter, {1})[0]);
  filter.add(Keys{1}, 1);
  CHECK(estimates(filter, {1})[0] == 15);
  CHECK(filter.adds() == 14 + uint64_t{~0u} + 1);
  filter.set_adds(~uint64_t{0} - 1);
  filter.add(Keys{1, 2}, 5);
  CHECK(filter.adds() == ~uint64_t{0});  // and stays there
}

TEST_CASE("counting bloom filter: every counter is halved each time the adds reach a multiple of halve_every") {
  CountingBloomFilter filter(settings_of(1000, 3, 1e-3, 100));
  filter.add(Keys{1}, 9);
  filter.add(Keys{2}, 4);
  filter.add(Keys{3}, 1);
  filter.add(keys_from(1000, 85), 1);  // 99
  CHECK(estimates(filter, {1, 2, 3}) == std::vector<uint8_t>{9, 4, 1});
  filter.add(Keys{4, 4}, 1);  // the first of them is the hundredth
  CHECK(estimates(filter, {1, 2, 3, 4}) == std::vector<uint8_t>{4, 2, 0, 1});
  CHECK(filter.adds() == 101);
  // Added whole, then halved as often as multiples were passed.
  filter.add(Keys{5}, 250);
  CHECK(estimates(filter, {1, 2, 5}) == std::vector<uint8_t>{1, 0, 3});
  filter.add(Keys{6}, ~0u);
  CHECK(filter.fill() == 0.0);
  CHECK(filter.distinct_keys() == doctest::Approx(0.0));
  CHECK(estimates(filter, {1, 5, 6}) == std::vector<uint8_t>{0, 0, 0});
  // An add that only reaches the multiple is the one before the halving.
  CountingBloomFilter every(settings_of(1000, 3, 1e-3, 1));
  every.add(Keys{1, 1, 1}, 1);
  CHECK(estimates(every, {1})[0] == 0);
  const auto seen = std::make_unique<bool[]>(1);
  every.add_and_check(Keys{1}, 3, seen.get());
  CHECK(seen[0]);
}

TEST_CASE("counting bloom filter: fill and distinct keys follow adds, halvings and loaded chunks") {
  CountingBloomFilter filter(settings_of(40000, 3, 1e-3));
  CHECK(filter.fill() == 0.0);
  CHECK(filter.distinct_keys() == 0.0);
  CHECK(filter.estimated_fpr() == 0.0);
  const Keys keys = random_keys(40000, 9);
  for (const size_t n : {size_t{1}, size_t{100}, size_t{20000}, size_t{40000}}) {
    filter.add(std::span(keys).first(n), 1);
    CHECK(filter.distinct_keys() == doctest::Approx(static_cast<double>(n)).epsilon(0.02));
  }
  const std::string all = counters_of(filter);
  const auto above_zero = [](const std::string& bytes) {
    size_t n = 0;
    for (const char byte : bytes) n += ((byte & 15) != 0) + ((byte & 0xF0) != 0);
    return n;
  };
  CHECK(filter.fill() * static_cast<double>(all.size() * 2) == doctest::Approx(above_zero(all)));
  CountingBloomFilter copy(filter.settings());
  copy.add(keys_from(0, 1000), 1);  // is overwritten
  for (size_t i = 0; i < copy.num_chunks(); ++i) copy.load_chunk(i, filter.chunk(i));
  copy.set_adds(filter.adds());
  CHECK(counters_of(copy) == all);
  CHECK(copy.fill() == filter.fill());
  CHECK(copy.adds() == filter.adds());
}

TEST_CASE("counting bloom filter: an overfull one still answers, and says how it is") {
  CountingBloomFilter filter(settings_of(10, 1, 1e-3));
  filter.add(random_keys(100000, 10), 15);
  CHECK(filter.fill() == 1.0);
  CHECK(filter.estimated_fpr() == doctest::Approx(1.0));
  CHECK(std::isfinite(filter.distinct_keys()));
  CHECK(num_let_through(filter, random_keys(100, 11)) == 100);
}

TEST_CASE("counting bloom filter: the layout of given settings never changes, for files are kept in it") {
  struct Golden {
    uint64_t capacity;
    double fpr;
    uint64_t pages;
    uint32_t counters_per_line;
  };
  for (const Golden& golden :
       {Golden{1, 1e-3, 1, 4}, Golden{10'000'000, 0.5, 1989, 1}, Golden{10'000'000, 1e-2, 12018, 3},
        Golden{10'000'000, 1e-3, 18911, 4}, Golden{10'000'000, 1e-6, 47089, 7}, Golden{10'000'000, 1e-9, 96693, 10},
        Golden{uint64_t{1} << 28, 1e-3, 507628, 4}}) {
    const FilterLayout layout = CountingBloomFilter::layout_of(settings_of(golden.capacity, 1, golden.fpr));
    CAPTURE(golden.capacity);
    CAPTURE(golden.fpr);
    CHECK(layout.pages == golden.pages);
    CHECK(layout.counters_per_line == golden.counters_per_line);
  }
}

TEST_CASE("counting bloom filter: the counters of given adds never change, for files are kept in them") {
  CountingBloomFilter filter(settings_of(1000, 3, 1e-3, 1500));
  filter.add(keys_from(0, 1000), 2);
  filter.add(random_keys(500, 12), 1);  // mt19937_64 is the same everywhere
  const std::string all = counters_of(filter);
  CHECK(checksum64(std::as_bytes(std::span(all))) == 17620933524885640478ULL);
}

TEST_CASE("counting bloom filter: memory stays near the textbook's m = capacity * ln(1/fpr) / ln(2)^2 counters") {
  for (const auto& [fpr, most] : {std::pair{1e-1, 1.02}, {1e-2, 1.03}, {1e-3, 1.08}, {1e-4, 1.14}, {1e-6, 1.35}}) {
    const double counters = 1e7 * std::log(1 / fpr) / (std::log(2.0) * std::log(2.0));
    const double bytes = static_cast<double>(CountingBloomFilter::memory_bytes(settings_of(10'000'000, 3, fpr)));
    CAPTURE(fpr);
    CHECK(bytes / (counters / 2) < most);
    CHECK(bytes / (counters / 2) > 1.0);
  }
}

TEST_CASE("counting bloom filter: over the caller's memory it goes on with what is there") {
  const FilterSettings settings = settings_of(5000, 3, 1e-2, 20000);
  const size_t bytes = CountingBloomFilter::memory_bytes(settings);
  const auto block = std::make_unique<std::byte[]>(bytes + 64);
  std::byte* start = block.get() + (64 - reinterpret_cast<uintptr_t>(block.get()) % 64) % 64;
  CountingBloomFilter own(settings);
  const Keys keys = random_keys(9000, 13);
  {
    CountingBloomFilter filter(settings, {start, bytes});
    filter.add(std::span(keys).first(4000), 3);
    own.add(std::span(keys).first(4000), 3);
  }
  CountingBloomFilter again(settings, {start, bytes}, 12000);
  CHECK(again.fill() == own.fill());
  again.add(std::span(keys).subspan(4000), 3);  // passes a halving
  own.add(std::span(keys).subspan(4000), 3);
  CHECK(counters_of(again) == counters_of(own));
  CHECK_THROWS_WITH_AS(CountingBloomFilter(settings, {start, bytes - 4096}), doctest::Contains("expected"),
                       std::invalid_argument);
  CHECK_THROWS_AS(CountingBloomFilter(settings, {start + 8, bytes}), std::invalid_argument);
}

TEST_CASE("counting bloom filter: an add changes the one chunk that chunk_of names") {
  CountingBloomFilter filter(settings_of(100000));
  REQUIRE(filter.num_chunks() > 5);
  CHECK(filter.chunk_bytes(0) == CountingBloomFilter::kChunkBytes);
  CHECK((filter.num_chunks() - 1) * CountingBloomFilter::kChunkBytes + filter.chunk_bytes(filter.num_chunks() - 1) ==
        filter.memory_bytes());
  std::map<size_t, int> met;
  for (const uint64_t key : random_keys(200, 14)) {
    const std::string before = counters_of(filter);
    filter.add({&key, 1}, 1);
    const std::string after = counters_of(filter);
    for (size_t i = 0; i < filter.num_chunks(); ++i) {
      const size_t at = i * CountingBloomFilter::kChunkBytes;
      const bool changed = before.compare(at, filter.chunk_bytes(i), after, at, filter.chunk_bytes(i)) != 0;
      REQUIRE(changed == (i == filter.chunk_of(key)));
    }
    ++met[filter.chunk_of(key)];
  }
  CHECK(met.size() == filter.num_chunks());
}

TEST_CASE("counting bloom filter: a cut keeps one moment while adds and a halving go on") {
  for (const uint64_t halve_every : {uint64_t{0}, uint64_t{20005}}) {  // before most chunks were touched
    CountingBloomFilter filter(settings_of(100000, 3, 1e-3, halve_every));
    filter.add(random_keys(20000, 15), 1);
    const std::string at_cut = counters_of(filter);
    std::map<size_t, std::string> saved;
    const auto save = [&](size_t i) {
      REQUIRE_FALSE(saved.contains(i));  // once
      saved[i].assign(reinterpret_cast<const char*>(filter.chunk(i).data()), filter.chunk(i).size());
    };
    const std::vector<bool> since_start = filter.begin_cut(save);
    CHECK(std::count(since_start.begin(), since_start.end(), true) == static_cast<ptrdiff_t>(filter.num_chunks()));
    filter.add(random_keys(3, 16), 1);
    CHECK(saved.size() <= 3);
    const size_t first_few = saved.size();
    filter.add(random_keys(15000, 17), 1);
    std::string cut;
    for (size_t i = 0; i < filter.num_chunks(); ++i) {
      if (!saved.contains(i)) save(i);
      cut += saved[i];
    }
    CHECK(cut == at_cut);
    CHECK(counters_of(filter) != at_cut);
    filter.end_cut();
    // The next one hears of what this one's adds have changed.
    const size_t before = saved.size();
    filter.add(random_keys(100, 18), 1);
    CHECK(saved.size() == before);  // no cut is open
    filter.begin_cut(nullptr);
    const uint64_t key = 7;
    filter.add({&key, 1}, 1);
    filter.add({&key, 1}, 1);
    const std::vector<bool> changed = filter.begin_cut(nullptr);
    for (size_t i = 0; i < changed.size(); ++i) CHECK(changed[i] == (i == filter.chunk_of(key)));
    CHECK(first_few > 0);
  }
}

TEST_CASE("counting bloom filter: keys may be asked while others are added; what was added before is seen") {
  CountingBloomFilter filter(settings_of(50000, 1, 1e-3, 0));
  const Keys before = random_keys(5000, 19), during = random_keys(50000, 20);
  filter.add(before, 1);
  std::atomic<bool> done{false};
  std::thread adder([&] {
    filter.add(during, 1);
    done = true;
  });
  do {
    CHECK(num_let_through(filter, before) == before.size());
  } while (!done);
  adder.join();
  CHECK(num_let_through(filter, during) == during.size());
}

TEST_CASE("counting bloom filter: settings out of range are refused by name and value") {
  const auto refused = [](const FilterSettings& settings, const char* text) {
    CHECK_THROWS_WITH_AS(CountingBloomFilter{settings}, doctest::Contains(text), std::invalid_argument);
    CHECK_THROWS_AS(CountingBloomFilter::memory_bytes(settings), std::invalid_argument);
  };
  refused(settings_of(0), "[CountingBloomFilter] capacity is 0, expected 1 to 1099511627776 distinct keys");
  refused(settings_of((uint64_t{1} << 40) + 1), "capacity is 1099511627777");
  refused(settings_of(10, 0), "count is 0, expected 1 to 15");
  refused(settings_of(10, 16), "count is 16");
  refused(settings_of(10, 1, 0.0), "fpr is 0, expected a rate in [1e-09, 0.5]");
  refused(settings_of(10, 1, 0.51), "fpr is 0.51");
  refused(settings_of(10, 1, std::nan("")), "fpr is nan");
}

}  // namespace
}  // namespace damo
