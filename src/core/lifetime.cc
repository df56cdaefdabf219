// SPDX-License-Identifier: Apache-2.0
#include "lifetime.h"

namespace damo {
namespace {

constexpr uint64_t kBuckets = 262'144;

// Towards minus infinity.
int64_t floor_divide(int64_t value, int64_t by) noexcept {
  const int64_t quotient = value / by;
  return quotient * by > value ? quotient - 1 : quotient;
}

}  // namespace

int64_t Lifetime::width() const noexcept {
  return unit == AgeUnit::kNone ? 1 : static_cast<int64_t>((ttl + kBuckets - 1) / kBuckets);
}

int64_t Lifetime::bucket(int64_t mark) const noexcept {
  return unit == AgeUnit::kNone ? 0 : floor_divide(mark, width());
}

Expiry Lifetime::at(int64_t now, uint64_t group_step) const noexcept {
  if (unit == AgeUnit::kNone) return {};
  const int64_t present = unit == AgeUnit::kSteps ? static_cast<int64_t>(group_step) : now;
  return {unit, bucket(present - static_cast<int64_t>(ttl)) * width(), group_step};
}

bool AgeCounts::add(const AgeChanges& changes) {
  for (const auto& [bucket, change] : changes) {
    const auto found = buckets_.find(bucket);
    if (change < 0 && (found == buckets_.end() || found->second < static_cast<uint64_t>(-change))) return false;
  }
  for (const auto& [bucket, change] : changes) {
    uint64_t& count = buckets_[bucket];
    count += static_cast<uint64_t>(change);
    if (count == 0) buckets_.erase(bucket);
  }
  return true;
}

uint64_t AgeCounts::since(int64_t bucket) const noexcept {
  uint64_t rows = 0;
  for (auto at = buckets_.lower_bound(bucket); at != buckets_.end(); ++at) rows += at->second;
  return rows;
}

}  // namespace damo
