// SPDX-License-Identifier: Apache-2.0
//
// A row in memory: this header, then float32 weights, then float32 state.
// The stored form of the same row is in format.h.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace damo {

struct HotRow {
  // Flag bits; in memory only. They change under the structure lock, also of a row that is still pending.
  static constexpr uint8_t kDirty = 1;    // differs from the cold tier, or is not there yet
  static constexpr uint8_t kErased = 2;   // a tombstone: the key has no row, the cold tier may still have one
  static constexpr uint8_t kPending = 4;  // its owner is still filling it; not in the index
  static constexpr uint8_t kSaved = 8;    // already copied by the open cut
  static constexpr uint8_t kFloats = 16;  // updated or imported: its floats are stored; else they are the first ones

  uint64_t mixed;     // mix_key(key)
  uint64_t sequence;  // of the last operation applied
  int64_t time;       // of the last update, of creation before the first; so is the step
  uint32_t table_id;
  uint32_t update_count;
  uint32_t step;
  // Times looked up since the eviction hand last passed, saturating. The one field that lookups write;
  // a lost increment costs nothing, hence relaxed loads and stores and no read-modify-write.
  std::atomic<uint8_t> referenced;
  uint8_t flags;
  uint16_t unused;

  static constexpr uint8_t kMaxReferenced = 3;

  float* floats() noexcept { return reinterpret_cast<float*>(this + 1); }
  const float* floats() const noexcept { return reinterpret_cast<const float*>(this + 1); }
  bool has(uint8_t flag) const noexcept { return (flags & flag) != 0; }
  bool is_row() const noexcept { return !has(kErased); }
  void touch() noexcept {
    const uint8_t seen = referenced.load(std::memory_order_relaxed);
    if (seen < kMaxReferenced) referenced.store(static_cast<uint8_t>(seen + 1), std::memory_order_relaxed);
  }
};
static_assert(sizeof(HotRow) == 40);

}  // namespace damo
