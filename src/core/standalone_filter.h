// SPDX-License-Identifier: Apache-2.0
//
// A counting Bloom filter of its own, outside of any storage: in memory, or with a file.
//
// Thread safety: every method from any thread; adds one after the other, checks beside each other. Not in a forked
// child (ForkedHandleError), but for one in memory that was not used before the fork: until its first add it is its
// settings and nothing else.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>

#include "counting_bloom_filter.h"
#include "filter_file.h"

namespace damo {

class StandaloneFilter {
 public:
  // std::invalid_argument, and with a path what FilterFile throws.
  StandaloneFilter(const FilterSettings& settings, const std::optional<std::filesystem::path>& path, bool reload);
  ~StandaloneFilter();

  const FilterSettings& settings() const noexcept { return settings_; }
  size_t memory_bytes() const noexcept { return layout_.pages * CountingBloomFilter::kPageBytes; }
  uint32_t counters_per_key() const noexcept { return 2 * layout_.counters_per_line; }
  bool used() const noexcept { return used_.load(); }
  bool closed() const noexcept { return closed_.load(); }

  // As CountingBloomFilter's. On an error of add, nothing was added.
  void add(std::span<const uint64_t> keys, uint32_t num);
  void estimate(std::span<const uint64_t> keys, uint8_t* out) const;
  void check(std::span<const uint64_t> keys, bool* out) const;
  uint64_t adds() const;
  double fill() const;
  double distinct_keys() const;
  double estimated_fpr() const;

  // Returns when all adds are on the disk. Nothing without a file.
  void sync();
  // Frees the memory; with a file, syncs it first. Idempotent.
  void close();

 private:
  std::shared_lock<std::shared_mutex> reading(const char* operation) const;
  std::unique_lock<std::shared_mutex> writing(const char* operation) const;
  void check_process(const char* operation) const;
  void check_open(const char* operation) const;

  FilterSettings settings_;
  FilterLayout layout_;
  std::atomic<bool> used_{false}, closed_{false};
  std::atomic<int64_t> process_;
  mutable std::mutex turn_;          // who waits for the lock has it: those who read would pass it on to each other
  mutable std::shared_mutex mutex_;  // protects what follows
  std::unique_ptr<CountingBloomFilter> filter_;
  std::unique_ptr<FilterFile> file_;
};

}  // namespace damo
