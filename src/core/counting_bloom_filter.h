// SPDX-License-Identifier: Apache-2.0
//
// How often keys were seen, about: a counting Bloom filter with counters of 4 bits, for the admission of keys that came
// `count` times. It errs only upwards: a key's estimate is never below what was added, up to 15.
//
// Layout. Counters lie in lines of 64 bytes (128 counters), lines in pages of 4 KiB. A key has its counters in two
// different lines of one page: so an add costs two cache misses, of one TLB entry, and changes one page. The loads of
// lines vary, which costs false positives; layout_of() makes up for it by more counters than the textbook's filter
// has, as many as the exact expectation asks for (8 % at an fpr of 1e-3). docs/format.md has every bit.
//
// Conservative update: an add raises only those of a key's counters that are below the estimate it comes to. None is
// ever too low, and other keys' estimates grow far less: at four times the capacity (fpr 1e-2, count 3, one key in ten
// added ten times) 0.03 % of the keys added once are let through, 14 % if every counter were raised. It makes the
// counters depend on the order of the adds, though not on the size of the calls. There is no deletion.
//
// Ageing: with halve_every = N all counters are halved, rounded down, each time the number of adds reaches a multiple
// of N. A key added `num` times at once is added whole; then, if that passed several multiples, halved as often.
//
// Thread safety: one thread changes it at a time; estimate and check may run beside it from any thread, and see each
// counter as it was before or after.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "format.h"

namespace damo {

struct FilterSettings {
  uint64_t capacity = 0;     // distinct keys it is made for
  uint32_t count = 15;       // a key is let through from this many adds on, 1 to 15
  double fpr = 1e-3;         // at capacity, the share of keys never added that are let through
  uint64_t halve_every = 0;  // adds; 0: never

  bool operator==(const FilterSettings&) const = default;
};

// A pure function of the settings, part of the persistent format.
struct FilterLayout {
  uint64_t pages = 0;
  uint32_t counters_per_line = 0;  // of one key; it has two lines

  bool operator==(const FilterLayout&) const = default;
};

class CountingBloomFilter {
 public:
  static constexpr uint32_t kMaxCount = 15;
  static constexpr uint64_t kMaxCapacity = uint64_t{1} << 40;
  static constexpr double kMinFpr = 1e-9, kMaxFpr = 0.5;
  static constexpr size_t kLineBytes = 64, kPageBytes = 4096, kChunkBytes = 64 << 10;

  // std::invalid_argument names the setting: "[CountingBloomFilter] count is 16, expected 1 to 15".
  static void check(const FilterSettings& settings);
  // The fewest pages whose expected rate at capacity is at most fpr; of two numbers of counters that differ by less
  // than a hundredth in memory, the lower.
  static FilterLayout layout_of(const FilterSettings& settings);
  static size_t memory_bytes(const FilterSettings& settings) { return layout_of(settings).pages * kPageBytes; }

  // With memory of its own: zeros, which the system gives page by page when they are first touched; absent in forked
  // children. StorageError when there is not even address space for it.
  explicit CountingBloomFilter(const FilterSettings& settings);
  // Over the caller's memory: memory_bytes(settings) bytes at an address that kLineBytes divides, the counters of a
  // filter of these settings (zeros: an empty one) that has seen `adds`.
  CountingBloomFilter(const FilterSettings& settings, std::span<std::byte> memory, uint64_t adds = 0);
  CountingBloomFilter(const CountingBloomFilter&) = delete;
  CountingBloomFilter& operator=(const CountingBloomFilter&) = delete;

  const FilterSettings& settings() const noexcept { return settings_; }
  const FilterLayout& layout() const noexcept { return layout_; }
  size_t memory_bytes() const noexcept { return memory_.size(); }
  // Adds since it was made, each as often as it counted. Stays at 2^64 - 1.
  uint64_t adds() const noexcept { return adds_; }

  // Counts keys[i] `num` (or nums[i]) times, in order. A key may come again in a call. 0 counts nothing.
  void add(std::span<const uint64_t> keys, uint32_t num = 1);
  void add(std::span<const uint64_t> keys, std::span<const uint32_t> nums);
  // And says of each whether it had come to `count` right after its own add (before a halving that was due then).
  void add_and_check(std::span<const uint64_t> keys, uint32_t num, bool* seen);
  void add_and_check(std::span<const uint64_t> keys, std::span<const uint32_t> nums, bool* seen);

  // out[i]: how often keys[i] was added, or more; 15 means 15 or more.
  void estimate(std::span<const uint64_t> keys, uint8_t* out) const noexcept;
  // out[i]: whether keys[i] was added at least `count` times, or seems so.
  void check(std::span<const uint64_t> keys, bool* out) const noexcept;

  // The share of counters that are not zero: 0 to 1; about a half at capacity.
  double fill() const noexcept;
  // About how many distinct keys its counters come from. After a halving: those that are left.
  double distinct_keys() const noexcept;
  // The share of keys never added that check() lets through now. Reads all counters.
  double estimated_fpr() const noexcept;

  // Chunks: kChunkBytes each, the last one perhaps shorter. A key's counters lie in one chunk.
  size_t num_chunks() const noexcept { return (memory_.size() + kChunkBytes - 1) / kChunkBytes; }
  size_t chunk_of(uint64_t key) const noexcept;
  Bytes chunk(size_t index) const noexcept { return memory_.subspan(index * kChunkBytes, chunk_bytes(index)); }
  size_t chunk_bytes(size_t index) const noexcept {
    return std::min(kChunkBytes, memory_.size() - index * kChunkBytes);
  }
  // Puts back what chunk() and adds() gave. `bytes` has chunk_bytes(index).
  void load_chunk(size_t index, Bytes bytes) noexcept;
  void set_adds(uint64_t adds) noexcept;

  // A cut: the filter as it is now, to be saved chunk by chunk while adds go on. Until end_cut(), before_change(index)
  // is called before the first change of each chunk, by the thread that adds: it saves the chunk, or waits until who
  // does has done so. It must not throw. A halving changes every chunk.
  // Returns which chunks have changed since the last begin_cut() (for the first one: since it was made).
  std::vector<bool> begin_cut(std::function<void(size_t index)> before_change);
  void end_cut() noexcept { before_change_ = nullptr; }

 private:
  struct Place;
  struct Unmap {
    size_t bytes;
    int64_t process;
    void operator()(std::byte* memory) const noexcept;
  };

  uint64_t page_of(uint64_t hash) const noexcept;
  Place place_of(uint64_t key) const noexcept;
  template <uint32_t kPerLine, class Then>
  void each_key_of(std::span<const uint64_t> keys, Then then) const;
  template <class Then>
  void each_key(std::span<const uint64_t> keys, Then then) const;
  template <class KeyCounters>
  uint32_t add_one(const KeyCounters& counters, uint32_t num);
  void count_adds(uint32_t num);
  void halve();
  void will_change(size_t chunk) {
    if (changed_[chunk] != 0) return;
    changed_[chunk] = 1;
    if (before_change_) before_change_(chunk);
  }
  std::span<uint64_t> words_of(size_t chunk) const noexcept;
  uint64_t nonzero_of(size_t chunk) const noexcept;

  FilterSettings settings_;
  FilterLayout layout_;
  std::unique_ptr<std::byte, Unmap> own_;
  std::span<std::byte> memory_;
  uint64_t adds_ = 0;
  uint64_t next_halving_ = ~uint64_t{0};  // the number of adds at which it is due
  uint64_t nonzero_ = 0;                  // counters
  std::vector<uint8_t> changed_;          // by chunk, since the last cut began
  std::function<void(size_t)> before_change_;
};

}  // namespace damo
