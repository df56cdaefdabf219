// SPDX-License-Identifier: Apache-2.0
//
// The rows in memory: an arena cut into slabs of equal slots, and an index from
// (table, mixed key) to slot, split into shards by the high bits of the mixed key.
//
// Memory: one arena is reserved at construction (address space only; pages come as
// slots are first used, 2 MiB pages where the system gives them) and is not
// inherited by forked children. A slab serves one slot size at a time; an empty
// slab goes back and may serve another. arena slabs in use + index <= bytes.
//
// Locks, two levels, both the caller's to take:
// - the structure lock (one, outside this class): whoever allocates, inserts, removes or
//   changes a row holds it. Under it the set of rows stands still and rows may be read freely.
// - a shard's lock: a lookup holds it while it probes and copies rows of the shard, and is
//   then safe against the one structure-lock holder, who takes it to change rows or entries of that shard.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "row.h"

namespace damo {

using Slot = uint32_t;  // 0: none
inline constexpr Slot kNoSlot = 0;

class HotTier {
 public:
  // `bytes` covers slabs and index together. `num_shards` is a power of two.
  HotTier(size_t bytes, size_t num_shards);
  ~HotTier();
  HotTier(const HotTier&) = delete;
  HotTier& operator=(const HotTier&) = delete;

  // ---- shards
  struct alignas(64) Shard {
    std::mutex mutex;
    uint64_t* entries = nullptr;  // fingerprint << 32 | slot; 0: empty. Linear probing
    uint32_t mask = 0;
    uint32_t size = 0;
  };
  size_t num_shards() const noexcept { return shards_.size(); }
  size_t shard_of(uint64_t mixed) const noexcept { return shard_bits_ == 0 ? 0 : mixed >> (64 - shard_bits_); }
  Shard& shard(size_t index) noexcept { return shards_[index]; }

  // ---- index. find and prefetch: under the shard's lock or the structure lock.
  static uint32_t fingerprint(uint32_t table_id, uint64_t mixed) noexcept {
    return static_cast<uint32_t>(mixed) ^ table_id * 0x9E3779B9u;
  }
  void prefetch_entry(const Shard& shard, uint32_t fingerprint) const noexcept {
    __builtin_prefetch(&shard.entries[fingerprint & shard.mask]);
  }
  // The slot of the first entry with this fingerprint: very likely the row, to be prefetched and then checked by find.
  Slot guess(const Shard& shard, uint32_t fingerprint) const noexcept {
    for (uint32_t at = fingerprint & shard.mask;; at = (at + 1) & shard.mask) {
      const uint64_t entry = shard.entries[at];
      if (entry == 0) return kNoSlot;
      if (static_cast<uint32_t>(entry >> 32) == fingerprint) return static_cast<Slot>(entry);
    }
  }
  Slot find(const Shard& shard, uint32_t table_id, uint64_t mixed) const noexcept;
  // Whether `slot` (a hint from an earlier call, perhaps stale, perhaps nonsense) holds this row now.
  bool holds(Slot slot, uint32_t table_id, uint64_t mixed) const noexcept;

  // Makes room for `count` more entries in a shard, so that insert cannot fail. Structure and shard lock. The
  // index may so outgrow the budget by one doubling of a shard: over_budget() says so until slabs were emptied.
  void reserve_entries(Shard& shard, size_t count);
  bool over_budget() const noexcept { return used_slabs_ > slab_limit(); }
  void insert(Shard& shard, Slot slot) noexcept;  // the row's header is filled in; structure and shard lock
  void remove(Shard& shard, Slot slot) noexcept;  // the slot itself stays allocated; structure and shard lock

  // ---- slots; all under the structure lock
  HotRow* row(Slot slot) const noexcept {
    return reinterpret_cast<HotRow*>(arena_ + (static_cast<size_t>(slot - 1) << granularity_bits_));
  }
  void prefetch_row(Slot slot, size_t bytes) const noexcept {
    const auto* at = reinterpret_cast<const char*>(row(slot));
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 1);
  }
  size_t slot_bytes(size_t num_floats) const noexcept;
  size_t max_slot_bytes() const noexcept { return slab_bytes_; }
  // Appends up to `count` slots to `out`, marked pending; returns how many there were.
  size_t allocate(size_t slot_bytes, size_t count, std::vector<Slot>& out);
  void free(Slot slot) noexcept;
  // How many slots of this size could be allocated now.
  size_t available(size_t slot_bytes) const noexcept;
  // How many slots of this size there would be if the whole arena served it.
  size_t capacity(size_t slot_bytes) const noexcept;

  // ---- eviction
  // Slabs are numbered 0..num_slabs(). Calls visit(slot, row) for each allocated slot of a slab.
  size_t num_slabs() const noexcept { return slabs_.size(); }
  size_t slab_slot_bytes(size_t slab) const noexcept { return slabs_[slab].slot_bytes; }  // 0: a free slab
  // May take out and free the row that it is shown.
  template <class Visit>
  void for_each_row(size_t slab, Visit&& visit) const {
    const Slab& s = slabs_[slab];
    for (size_t word = 0; word < s.used_bits.size(); ++word)
      for (uint64_t bits = s.used_bits[word]; bits != 0; bits &= bits - 1) {
        const Slot slot = slot_at(slab, word * 64 + static_cast<size_t>(__builtin_ctzll(bits)));
        visit(slot, row(slot));
      }
  }
  // How many slabs serve this size, and how many sizes have slabs.
  size_t slabs_of(size_t slot_bytes) const noexcept;
  size_t sizes_in_use() const noexcept;
  // The emptiest slab of the size that holds most slabs, `except_slot_bytes` left out. None if there is none.
  std::optional<size_t> slab_to_take(size_t except_slot_bytes) const noexcept;

  // How many slabs there may be beside the index.
  size_t slab_limit() const noexcept;
  // Others take a part of the budget, or give it back: at most what it was at construction. Structure lock.
  // over_budget() says so until slabs were emptied.
  void set_bytes(size_t bytes) noexcept { bytes_ = bytes; }
  size_t bytes() const noexcept { return bytes_; }
  size_t bytes_in_use() const noexcept { return used_slabs_ * slab_bytes_ + index_bytes_; }
  size_t rows() const noexcept;  // entries of the index

 private:
  struct Slab {
    uint32_t slot_bytes = 0;
    uint32_t num_slots = 0;
    uint32_t used = 0;
    uint32_t search_from = 0;  // word of used_bits where a free slot may be
    bool in_partial = false;   // on its size's list of slabs with free slots
    std::vector<uint64_t> used_bits;
  };
  struct SizeClass {
    uint32_t slot_bytes = 0;
    size_t free_slots = 0;
    std::vector<uint32_t> partial;  // slabs with free slots
  };
  SizeClass& size_class(size_t slot_bytes);
  const SizeClass* find_size_class(size_t slot_bytes) const noexcept;
  Slot slot_at(size_t slab, size_t index) const noexcept {
    return static_cast<Slot>(((slab * slab_bytes_ + index * slabs_[slab].slot_bytes) >> granularity_bits_) + 1);
  }

  std::atomic<size_t> bytes_;
  size_t slab_bytes_ = 0;
  unsigned granularity_bits_ = 3;  // slots are multiples of 1 << this, so that 32 bits number them all
  unsigned shard_bits_ = 0;
  std::byte* reserved_ = nullptr;  // as mapped
  size_t reserved_bytes_ = 0;
  std::byte* arena_ = nullptr;  // aligned within
  std::vector<Slab> slabs_;
  std::vector<uint32_t> free_slabs_;
  size_t used_slabs_ = 0;
  std::vector<SizeClass> classes_;
  std::vector<Shard> shards_;
  size_t index_bytes_ = 0;
};

}  // namespace damo
