// SPDX-License-Identifier: Apache-2.0
//
// How long a row lives without an update, and how many rows of a group are of which age.
//
// A row's *age mark* is the time of its last update (of its creation before the first), in seconds or in steps of its
// group. A row expires when the clock, or the group's step, is more than `ttl` past its mark. Marks are counted in
// buckets of `width` = ceil(ttl / 262,144), so that the number of living rows is known without looking at them; all
// rows of a bucket expire together, when the youngest of them does. Up to 262,144 s (three days) or steps a bucket is 1
// wide, and expiry exact.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <utility>
#include <vector>

namespace damo {

// Part of the persistent format.
enum class AgeUnit : uint32_t { kNone = 0, kSeconds = 1, kSteps = 2 };

inline constexpr uint64_t kMaxTtl = uint64_t{1} << 40;  // 35,000 years, or as many steps as nobody makes

inline constexpr int64_t kBeforeAllTime = std::numeric_limits<int64_t>::min();

// What one operation, or one lookup, takes for expired.
struct Expiry {
  AgeUnit unit = AgeUnit::kNone;
  int64_t alive_since = kBeforeAllTime;  // rows with an older mark have expired
  uint64_t group_step = 0;               // completes a stored step, of which a row has the low half

  int64_t mark(int64_t time, uint32_t step) const noexcept {
    if (unit != AgeUnit::kSteps) return time;
    // A row may be newer than `group_step` is, when that was taken earlier.
    return static_cast<int64_t>(group_step) - static_cast<int32_t>(static_cast<uint32_t>(group_step) - step);
  }
  bool alive(int64_t time, uint32_t step) const noexcept {
    return unit == AgeUnit::kNone || mark(time, step) >= alive_since;
  }
};

struct Lifetime {
  AgeUnit unit = AgeUnit::kNone;
  uint64_t ttl = 0;  // seconds or steps; at least 1 unless the unit is kNone

  bool operator==(const Lifetime&) const = default;
  int64_t width() const noexcept;
  // The bucket of a mark; 0 for every row when rows do not age.
  int64_t bucket(int64_t mark) const noexcept;
  Expiry at(int64_t now, uint64_t group_step) const noexcept;
  // The oldest bucket whose rows are alive.
  int64_t first_bucket(const Expiry& expiry) const noexcept {
    return unit == AgeUnit::kNone ? 0 : bucket(expiry.alive_since);
  }
};

// Of counts that are not known and must be made anew from the rows: equal to no lifetime.
inline constexpr Lifetime kUnknownLifetime{AgeUnit::kNone, ~uint64_t{0}};

// By how much an operation changes the number of rows in each bucket.
using AgeChanges = std::vector<std::pair<int64_t, int64_t>>;

// The rows of a group, by bucket.
class AgeCounts {
 public:
  const std::map<int64_t, uint64_t>& buckets() const noexcept { return buckets_; }
  // False, with nothing changed, when a bucket would fall below zero: the counts do not fit the changes.
  [[nodiscard]] bool add(const AgeChanges& changes);
  void add(int64_t bucket, uint64_t count) { buckets_[bucket] += count; }
  // Rows in `bucket` and younger ones.
  uint64_t since(int64_t bucket) const noexcept;
  void forget_before(int64_t bucket) { buckets_.erase(buckets_.begin(), buckets_.lower_bound(bucket)); }

 private:
  std::map<int64_t, uint64_t> buckets_;
};

}  // namespace damo
