// SPDX-License-Identifier: Apache-2.0
#include "batch.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

#include "fixed_dimension.h"
#include "format.h"

namespace damo {
namespace {

// A set of mixed keys that numbers them in order of first insertion. An entry is the high half of the
// key and its number + 1, in 8 bytes, so that the set of a usual batch stays in the second-level cache.
class Numbering {
 public:
  Numbering(std::vector<uint64_t>& keys, size_t expected) : keys_(keys) {
    entries_.resize(std::bit_ceil(std::max<size_t>(expected / 2, 64)));
  }
  void prefetch(uint64_t mixed) const noexcept { __builtin_prefetch(&entries_[mixed & (entries_.size() - 1)], 1); }
  uint32_t number(uint64_t mixed) {
    const uint64_t mask = entries_.size() - 1;
    for (uint64_t at = mixed & mask;; at = (at + 1) & mask) {
      const uint64_t entry = entries_[at];
      if (entry == 0) {
        keys_.push_back(mixed);
        const auto added = static_cast<uint32_t>(keys_.size() - 1);
        entries_[at] = (mixed & kHigh) | (added + 1);
        if (keys_.size() * 3 > entries_.size() * 2) grow();
        return added;
      }
      const auto found = static_cast<uint32_t>(entry) - 1;
      if (((entry ^ mixed) & kHigh) == 0 && keys_[found] == mixed) return found;
    }
  }

 private:
  static constexpr uint64_t kHigh = ~uint64_t{0} << 32;
  void grow() {
    std::vector<uint64_t> larger(entries_.size() * 2);
    const uint64_t mask = larger.size() - 1;
    for (const uint64_t entry : entries_) {
      if (entry == 0) continue;
      uint64_t at = keys_[static_cast<uint32_t>(entry) - 1] & mask;
      while (larger[at] != 0) at = (at + 1) & mask;
      larger[at] = entry;
    }
    entries_ = std::move(larger);
  }
  std::vector<uint64_t>& keys_;
  std::vector<uint64_t> entries_;
};

}  // namespace

Batch::Batch(std::span<const uint64_t> keys, std::optional<uint64_t> padding) {
  index.resize(keys.size());
  Numbering numbering(mixed, keys.size() / 2);
  constexpr size_t kBlock = 32;
  uint64_t block[kBlock];
  for (size_t begin = 0; begin < keys.size(); begin += kBlock) {
    const size_t size = std::min(kBlock, keys.size() - begin);
    for (size_t i = 0; i < size; ++i) {
      block[i] = mix_key(keys[begin + i]);
      numbering.prefetch(block[i]);
    }
    for (size_t i = 0; i < size; ++i) {
      if (padding && keys[begin + i] == *padding) {
        index[begin + i] = kNoRow;
        continue;
      }
      const size_t before = mixed.size();
      const uint32_t row = numbering.number(block[i]);
      index[begin + i] = row;
      if (row == before) first.push_back(static_cast<uint32_t>(begin + i));
    }
  }
  hints.assign(mixed.size(), kNoSlot);
}

Batch::Batch(std::span<const Batch* const> parts) {
  size_t positions = 0, rows = 0;
  for (const Batch* part : parts) {
    positions += part->num_positions();
    rows += part->num_rows();
    hints_at = part == parts.front() || part->hints_at == hints_at ? part->hints_at : kNever;
  }
  index.resize(positions);
  Numbering numbering(mixed, rows);
  std::vector<uint32_t> renumbered;
  size_t offset = 0;
  for (const Batch* part : parts) {
    renumbered.resize(part->num_rows());
    for (size_t r = 0; r < part->num_rows(); ++r) {
      const size_t before = mixed.size();
      renumbered[r] = numbering.number(part->mixed[r]);
      if (renumbered[r] == before) {
        first.push_back(static_cast<uint32_t>(offset + part->first[r]));
        hints.push_back(part->hints[r]);
      }
    }
    for (size_t p = 0; p < part->num_positions(); ++p)
      index[offset + p] = part->index[p] == kNoRow ? kNoRow : renumbered[part->index[p]];
    offset += part->num_positions();
  }
}

ShardOrder::ShardOrder(const Batch& batch, const HotTier& tier) {
  begin.assign(tier.num_shards() + 1, 0);
  for (const uint64_t mixed : batch.mixed) ++begin[tier.shard_of(mixed) + 1];
  for (size_t s = 1; s < begin.size(); ++s) begin[s] += begin[s - 1];
  order.resize(batch.num_rows());
  std::vector<uint32_t> next(begin.begin(), begin.end() - 1);
  for (uint32_t r = 0; r < batch.num_rows(); ++r) order[next[tier.shard_of(batch.mixed[r])]++] = r;
}

ShardOrder::ShardOrder(const Batch& batch, std::span<const uint32_t> rows, const HotTier& tier) {
  begin.assign(tier.num_shards() + 1, 0);
  for (const uint32_t r : rows) ++begin[tier.shard_of(batch.mixed[r]) + 1];
  for (size_t s = 1; s < begin.size(); ++s) begin[s] += begin[s - 1];
  order.resize(rows.size());
  std::vector<uint32_t> next(begin.begin(), begin.end() - 1);
  for (const uint32_t r : rows) order[next[tier.shard_of(batch.mixed[r])]++] = r;
}

namespace {

// `kDimension` 0: taken from the argument; else a constant the compiler unrolls by.
template <size_t kDimension>
void repeat_range(const Batch& batch, size_t dimension_argument, size_t begin, size_t end, float* out) {
  const size_t dimension = kDimension != 0 ? kDimension : dimension_argument;
  constexpr size_t kAhead = 12;
  for (size_t p = begin; p < end; ++p) {
    if (p + kAhead < end)
      if (const uint32_t ahead = batch.index[p + kAhead]; ahead != Batch::kNoRow)
        __builtin_prefetch(out + batch.first[ahead] * dimension);
    const uint32_t row = batch.index[p];
    float* to = out + p * dimension;
    if (row == Batch::kNoRow)
      std::memset(to, 0, dimension * sizeof(float));
    else if (const size_t first = batch.first[row]; first != p)
      std::memcpy(to, out + first * dimension, dimension * sizeof(float));
  }
}

}  // namespace

void repeat_rows(const Batch& batch, size_t dimension, ThreadPool& pool, float* out) {
  const size_t positions = batch.num_positions(), ranges = positions < 8192 ? 1 : pool.size() * 2;
  const auto repeat = [&](size_t range) {
    const size_t begin = positions * range / ranges, end = positions * (range + 1) / ranges;
    with_fixed_dimension(dimension, [&](auto fixed) { repeat_range<fixed.value>(batch, dimension, begin, end, out); });
  };
  pool.run(ranges, std::cref(repeat));  // which takes no memory: a lookup may have made its rows, and must not fail now
}

}  // namespace damo
