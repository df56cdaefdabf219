// SPDX-License-Identifier: Apache-2.0
#include "gradient_sums.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fixed_dimension.h"

namespace damo {
namespace {

constexpr size_t kSmall = 2048;  // rows that one thread has summed before another wakes up

// Rows in buckets that have about as many positions each. A thread adds up a bucket at a time, so that no two write to
// one row, and a row's gradients come in order of appearance. Twice as many buckets as threads: another library's
// threads may spin on our cores just then, and who is slow takes fewer.
class Buckets {
 public:
  Buckets(const Batch& batch, const ThreadPool& pool) {
    const size_t rows = batch.num_rows();
    const size_t wanted = rows < kSmall || pool.size() == 1 ? 1 : std::min(pool.size() * 2, kMost);
    // Popular keys come early and often, and rows are numbered by first appearance: equal numbers of rows would leave
    // most positions to the first bucket. A sample tells.
    constexpr size_t kEvery = 61;  // positions; divides no usual number of fields
    std::vector<uint32_t> sample;
    for (size_t p = 0; wanted > 1 && p < batch.num_positions(); p += kEvery)
      if (batch.index[p] != Batch::kNoRow) sample.push_back(batch.index[p]);
    std::sort(sample.begin(), sample.end());
    std::vector<uint32_t> first_groups{0};
    for (size_t i = 1; i < wanted && !sample.empty(); ++i)
      if (const uint32_t group = sample[sample.size() * i / wanted] >> kGroupBits; group > first_groups.back())
        first_groups.push_back(group);
    const size_t groups = (rows >> kGroupBits) + 1;
    of_group_.resize(groups);
    for (size_t b = 0; b < first_groups.size(); ++b) {
      const size_t end = b + 1 < first_groups.size() ? first_groups[b + 1] : groups;
      std::fill(of_group_.begin() + first_groups[b], of_group_.begin() + static_cast<ptrdiff_t>(end),
                static_cast<uint8_t>(b));
      first_rows_.push_back(first_groups[b] << kGroupBits);
    }
  }
  size_t size() const noexcept { return first_rows_.size(); }
  uint32_t first_row(size_t bucket) const noexcept { return first_rows_[bucket]; }
  uint8_t of_row(uint32_t row) const noexcept { return of_group_[row >> kGroupBits]; }

 private:
  static constexpr size_t kMost = 255;
  static constexpr unsigned kGroupBits = 6;  // so that the table below stays in the first-level cache
  std::vector<uint8_t> of_group_;            // bucket, by row >> kGroupBits
  std::vector<uint32_t> first_rows_;
};

// Positions that follow each other in one part. Sorted by bucket, in order of appearance within each; left as they are
// (`begin` is empty) where there is one bucket.
struct Block {
  const float* gradients;
  const uint32_t* index;
  size_t num_positions;
  std::vector<uint32_t> order, begin;  // order[begin[b] .. begin[b + 1]) are those of bucket b

  void sort(const Buckets& buckets) {
    begin.assign(buckets.size() + 2, 0);
    for (size_t p = 0; p < num_positions; ++p)
      if (index[p] != Batch::kNoRow) ++begin[buckets.of_row(index[p]) + 2];
    for (size_t b = 2; b < begin.size(); ++b) begin[b] += begin[b - 1];
    order.resize(begin.back());
    for (size_t p = 0; p < num_positions; ++p)
      if (index[p] != Batch::kNoRow) order[begin[buckets.of_row(index[p]) + 1]++] = static_cast<uint32_t>(p);
  }
};

// `kDimension` 0: taken from the argument; else a constant the compiler unrolls by.
template <size_t kDimension>
void sum_bucket(std::span<const Block> blocks, size_t bucket, uint32_t first_row, size_t dimension_argument,
                float* sums) {
  const size_t dimension = kDimension != 0 ? kDimension : dimension_argument;
  constexpr size_t kAhead = 12;
  uint32_t next = first_row;  // rows are numbered by first appearance, so the first of a row is when it is `next`
  const auto add = [&](const Block& block, size_t p) {
    const uint32_t row = block.index[p];
    const float* gradient = block.gradients + p * dimension;
    float* __restrict sum = sums + row * dimension;
    if (row == next) {
      ++next;
      std::memcpy(sum, gradient, dimension * sizeof(float));
    } else {
      for (size_t d = 0; d < dimension; ++d) sum[d] += gradient[d];
    }
  };
  for (const Block& block : blocks) {
    if (block.begin.empty()) {
      for (size_t p = 0; p < block.num_positions; ++p)
        if (block.index[p] != Batch::kNoRow) add(block, p);
      continue;
    }
    for (uint32_t i = block.begin[bucket]; i < block.begin[bucket + 1]; ++i) {
      if (i + kAhead < block.begin[bucket + 1])
        __builtin_prefetch(block.gradients + block.order[i + kAhead] * dimension);
      add(block, block.order[i]);
    }
  }
}

}  // namespace

void sum_gradients(const Batch& batch, std::span<const float* const> parts, std::span<const size_t> part_positions,
                   size_t dimension, ThreadPool& pool, float* sums) {
  constexpr size_t kBlock = 1 << 14;
  std::vector<Block> blocks;
  const uint32_t* index = batch.index.data();
  for (size_t part = 0; part < parts.size(); ++part) {
    for (size_t begin = 0; begin < part_positions[part]; begin += kBlock)
      blocks.push_back(
          {parts[part] + begin * dimension, index + begin, std::min(kBlock, part_positions[part] - begin), {}, {}});
    index += part_positions[part];
  }
  const Buckets buckets(batch, pool);
  if (buckets.size() > 1) pool.run(blocks.size(), [&](size_t block) { blocks[block].sort(buckets); });
  pool.run(buckets.size(), [&](size_t bucket) {
    const uint32_t first = buckets.first_row(bucket);
    with_fixed_dimension(dimension,
                         [&](auto fixed) { sum_bucket<fixed.value>(blocks, bucket, first, dimension, sums); });
  });
}

std::optional<size_t> first_not_finite(const float* sums, size_t rows, size_t dimension, ThreadPool& pool) {
  const size_t ranges = rows < kSmall ? 1 : pool.size();
  std::vector<size_t> found(ranges, rows);
  pool.run(ranges, [&](size_t range) {
    const size_t begin = rows * range / ranges, end = rows * (range + 1) / ranges;
    constexpr uint32_t kExponent = 0x7f800000u;
    for (size_t r = begin; r < end; ++r) {
      uint32_t bad = 0;
      for (size_t d = 0; d < dimension; ++d)
        bad |= (std::bit_cast<uint32_t>(sums[r * dimension + d]) & kExponent) == kExponent;
      if (bad != 0) {
        found[range] = r;
        return;
      }
    }
  });
  const size_t least = *std::min_element(found.begin(), found.end());
  return least < rows ? std::optional(least) : std::nullopt;
}

}  // namespace damo
