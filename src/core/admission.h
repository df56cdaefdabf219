// SPDX-License-Identifier: Apache-2.0
//
// The filter of one group: which keys get a row.
//
// A training lookup counts the keys that have no row, each as often as it stands in the call, in order of first
// appearance; one that comes to the filter's count gets its row in the same lookup. Keys that have a row are not
// counted: they are in. An update never makes a row. All of it under the order lock, so that the counters are a
// function of the operations; the log has them (CountRecord), and the filter's file what they came to at the last cut.
//
// Thread safety: the filter as CountingBloomFilter says, keys being added under the order lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "counting_bloom_filter.h"
#include "table_spec.h"

namespace damo {

struct Admission {
  explicit Admission(const AdmissionSpec& spec)
      : filter(std::make_shared<CountingBloomFilter>(spec.filter)), counted(spec.saved), saved(spec.saved) {}

  // Counts the keys of an operation; says of each whether it has come to the count. Order lock.
  std::unique_ptr<bool[]> count(std::span<const uint64_t> keys, std::span<const uint32_t> times, uint64_t sequence) {
    auto seen = std::make_unique<bool[]>(keys.size());
    filter->add_and_check(keys, times, seen.get());
    counted = sequence;
    return seen;
  }
  // Whether its file is older than its counters. Order lock.
  bool is_newer_than_file() const noexcept { return counted > saved; }

  const std::shared_ptr<CountingBloomFilter> filter;  // shared with who saves it
  uint64_t counted;                                   // the last operation that counted keys; order lock
  uint64_t saved;                                     // as AdmissionSpec's; order lock
  // Since the open, distinct keys of a call.
  std::atomic<uint64_t> refused{0};  // of training lookups, that got no row
  std::atomic<uint64_t> ignored{0};  // of updates, without a row
};

}  // namespace damo
