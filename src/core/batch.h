// SPDX-License-Identifier: Apache-2.0
//
// The distinct keys of one call. Repeated keys are found by one hash pass, because an optimizer's
// update is not linear: each distinct key gets one update with the sum of its gradients.
//
// A batch outlives its lookup when a backward pass may follow: it then remembers where the rows were.
// That is a hint, checked against the row's key before use, never a pin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "hot_tier.h"
#include "thread_pool.h"

namespace damo {

class Batch;

// rows grouped by shard: order[begin[s] .. begin[s + 1]) are the rows of shard s.
struct ShardOrder {
  std::vector<uint32_t> order;
  std::vector<uint32_t> begin;
  ShardOrder(const Batch& batch, const HotTier& tier);  // all rows
  ShardOrder(const Batch& batch, std::span<const uint32_t> rows, const HotTier& tier);
};

class Batch {
 public:
  static constexpr uint32_t kNoRow = ~uint32_t{0};            // in `index`: a padding position
  static constexpr size_t kMaxPositions = (size_t{1} << 31);  // of one call
  static constexpr uint64_t kNever = ~uint64_t{0};

  // Finds the distinct keys. Positions whose key is `padding` belong to no row.
  Batch(std::span<const uint64_t> keys, std::optional<uint64_t> padding);
  // The union of several batches, in their order; index maps position p of batch b to
  // index[offset of b + p]. Used when one update follows several lookups.
  explicit Batch(std::span<const Batch* const> parts);

  size_t num_positions() const noexcept { return index.size(); }
  size_t num_rows() const noexcept { return mixed.size(); }

  uint64_t table = 0;                          // Table::serial_ of whose lookup made it; 0: nobody's
  std::vector<uint64_t> mixed;                 // [rows] mix_key of each distinct key, in order of first appearance
  std::vector<uint32_t> index;                 // [positions] which distinct key, or kNoRow
  std::vector<uint32_t> first;                 // [rows] position of first appearance
  std::vector<Slot> hints;                     // [rows] where the row was, or kNoSlot
  std::shared_ptr<const ShardOrder> by_shard;  // all rows, once a lookup needed that
  uint64_t hints_at = kNever;                  // Tiers::moves() before the first hint was noted
};

// `out` is [positions, dimension] and has every row at the position of its first appearance: copies it to the others.
// Padding positions become zeros.
void repeat_rows(const Batch& batch, size_t dimension, ThreadPool& pool, float* out);

}  // namespace damo
