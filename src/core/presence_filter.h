// SPDX-License-Identifier: Apache-2.0
//
// Which keys may be in the cold tier: a Bloom filter in memory that errs only towards "present". Most misses of a
// fresh stream are new keys; without it each costs a probe of every table file's filter.
//
// Blocked: a key's bits lie in one cache line. Keys are only ever added; an erased key stays "present" until the filter
// is built anew. Until complete() it answers "present" to everything.
//
// Thread safety: add, may_contain and complete from any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>

#include "file.h"
#include "format.h"

namespace damo {

class PresenceFilter {
 public:
  explicit PresenceFilter(size_t bytes);

  void add(const StoredKey& key) noexcept;
  bool may_contain(const StoredKey& key) const noexcept;

  // Every key of the cold tier was added: from now on "absent" may be said.
  void set_complete() noexcept { complete_.store(true, std::memory_order_release); }
  bool complete() const noexcept { return complete_.load(std::memory_order_acquire); }

  // Saved with the sequence number of a cut: it holds every key that the cold tier holds at it.
  void save(const std::filesystem::path& file, uint64_t sequence) const;
  // Adds what was saved. False, with nothing added, when there is no file, it is damaged, of another size, or older
  // than `oldest_sequence`: then the filter must be built from the cold tier.
  bool load(const std::filesystem::path& file, uint64_t oldest_sequence);
  bool load(const FileDescriptor& in, uint64_t oldest_sequence);

  size_t bytes() const noexcept { return num_blocks_ * sizeof(Block); }

 private:
  struct alignas(64) Block {
    std::atomic<uint64_t> words[8];
  };
  struct Place {
    size_t block;
    uint64_t bits;  // six numbers of nine bits: a bit of the block each
  };
  Place place_of(const StoredKey& key) const noexcept;

  size_t num_blocks_;
  std::unique_ptr<Block[]> blocks_;
  std::atomic<bool> complete_{false};
};

}  // namespace damo
