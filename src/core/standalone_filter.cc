// SPDX-License-Identifier: Apache-2.0
#include "standalone_filter.h"

#include <unistd.h>

#include <algorithm>
#include <string>
#include <utility>

#include "error.h"

namespace damo {

StandaloneFilter::StandaloneFilter(const FilterSettings& settings, const std::optional<std::filesystem::path>& path,
                                   bool reload)
    : settings_(settings), layout_(CountingBloomFilter::layout_of(settings)), process_(getpid()) {
  if (!path) return;
  filter_ = std::make_unique<CountingBloomFilter>(settings);
  file_ = std::make_unique<FilterFile>(*path, *filter_, reload);
  used_ = true;
}

StandaloneFilter::~StandaloneFilter() = default;

void StandaloneFilter::check_process(const char* operation) const {
  // The counters are not there in a forked child, and a thread of the parent may hold the lock for ever.
  if (!used_ || getpid() == process_) return;
  throw ForkedHandleError(std::string("[") + operation + "] the filter was used by process " +
                          std::to_string(process_) + ", this is its forked child " + std::to_string(getpid()) +
                          ": make it after the fork, or keep it in the parent");
}

void StandaloneFilter::check_open(const char* operation) const {
  if (closed_) throw ClosedError(std::string("[") + operation + "] the filter is closed: make it again");
}

std::shared_lock<std::shared_mutex> StandaloneFilter::reading(const char* operation) const {
  check_process(operation);
  const std::lock_guard turn(turn_);
  std::shared_lock lock(mutex_);
  check_open(operation);
  return lock;
}

std::unique_lock<std::shared_mutex> StandaloneFilter::writing(const char* operation) const {
  check_process(operation);
  const std::lock_guard turn(turn_);
  std::unique_lock lock(mutex_);
  check_open(operation);
  return lock;
}

void StandaloneFilter::add(std::span<const uint64_t> keys, uint32_t num) {
  const auto lock = writing("add");
  if (keys.empty() || num == 0) return;
  if (!filter_) {
    filter_ = std::make_unique<CountingBloomFilter>(settings_);
    process_ = getpid();
    used_ = true;
  }
  if (file_) file_->append(keys, num);
  filter_->add(keys, num);
  if (file_) file_->compact();
}

void StandaloneFilter::estimate(std::span<const uint64_t> keys, uint8_t* out) const {
  const auto lock = reading("estimate");
  if (filter_)
    filter_->estimate(keys, out);
  else
    std::fill_n(out, keys.size(), uint8_t{0});
}

void StandaloneFilter::check(std::span<const uint64_t> keys, bool* out) const {
  const auto lock = reading("check");
  if (filter_)
    filter_->check(keys, out);
  else
    std::fill_n(out, keys.size(), false);
}

uint64_t StandaloneFilter::adds() const {
  const auto lock = reading("adds");
  return filter_ ? filter_->adds() : 0;
}

double StandaloneFilter::fill() const {
  const auto lock = reading("fill");
  return filter_ ? filter_->fill() : 0.0;
}

double StandaloneFilter::distinct_keys() const {
  const auto lock = reading("len");
  return filter_ ? filter_->distinct_keys() : 0.0;
}

double StandaloneFilter::estimated_fpr() const {
  const auto lock = reading("estimated_fpr");
  return filter_ ? filter_->estimated_fpr() : 0.0;
}

void StandaloneFilter::sync() {
  const auto lock = writing("sync");
  if (file_) file_->sync();
}

void StandaloneFilter::close() {
  if (closed_) return;
  check_process("close");
  const std::lock_guard turn(turn_);
  const std::unique_lock lock(mutex_);
  if (closed_) return;
  closed_ = true;
  const auto filter = std::move(filter_);
  const auto file = std::move(file_);  // refers to the filter
  if (file) file->close();
}

}  // namespace damo
