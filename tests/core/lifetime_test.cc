// SPDX-License-Identifier: Apache-2.0
#include "lifetime.h"

#include <doctest/doctest.h>

#include <random>

namespace damo {
namespace {

TEST_CASE(
    "lifetime: a row lives while the clock is at most ttl past its mark, to the second while buckets are 1 wide") {
  for (const uint64_t ttl : {uint64_t{1}, uint64_t{60}, uint64_t{262'144}}) {
    const Lifetime lifetime{AgeUnit::kSeconds, ttl};
    CHECK(lifetime.width() == 1);
    const auto age = static_cast<int64_t>(ttl);
    for (const int64_t now : {int64_t{-5}, int64_t{0}, int64_t{1'700'000'000}}) {
      const Expiry expiry = lifetime.at(now, 0);
      CHECK(expiry.alive(now, 0));
      CHECK(expiry.alive(now - age, 0));
      CHECK_FALSE(expiry.alive(now - age - 1, 0));
    }
  }
}

TEST_CASE("lifetime: a longer ttl is kept to a 262,144th of itself, and never cuts a life short") {
  std::mt19937_64 random(1);
  for (const uint64_t ttl : {uint64_t{262'145}, uint64_t{100 * 86'400}, kMaxTtl}) {
    const Lifetime lifetime{AgeUnit::kSeconds, ttl};
    const auto age = static_cast<int64_t>(ttl);
    CHECK(lifetime.width() <= age / 262'144 + 1);
    for (int i = 0; i < 10'000; ++i) {
      const auto now = static_cast<int64_t>(random() % (uint64_t{1} << 41)) - (int64_t{1} << 40);
      const auto mark = now - static_cast<int64_t>(random() % (2 * ttl));
      const bool alive = lifetime.at(now, 0).alive(mark, 0);
      if (now - mark <= age) CHECK(alive);
      if (now - mark > age + lifetime.width()) CHECK_FALSE(alive);
      // All rows of a bucket are alive, or none: that is what makes counts exact.
      const int64_t first = lifetime.bucket(mark) * lifetime.width();
      CHECK(lifetime.at(now, 0).alive(first, 0) == alive);
      CHECK(lifetime.at(now, 0).alive(first + lifetime.width() - 1, 0) == alive);
    }
  }
}

TEST_CASE("lifetime: steps are told from their low half, for rows older and newer than the step that was taken") {
  const Lifetime lifetime{AgeUnit::kSteps, 10};
  for (const uint64_t step : {uint64_t{100}, (uint64_t{1} << 32) + 3, (uint64_t{7} << 32) - 1}) {
    const Expiry expiry = lifetime.at(0, step);
    CHECK(expiry.alive(0, static_cast<uint32_t>(step)));
    CHECK(expiry.alive(0, static_cast<uint32_t>(step - 10)));
    CHECK_FALSE(expiry.alive(0, static_cast<uint32_t>(step - 11)));
    CHECK(expiry.alive(0, static_cast<uint32_t>(step + 1000)));
    CHECK(expiry.mark(0, static_cast<uint32_t>(step + 1000)) == static_cast<int64_t>(step + 1000));
  }
}

TEST_CASE("lifetime: without one nothing expires, and every row is in one bucket") {
  const Lifetime none;
  CHECK(none.at(std::numeric_limits<int64_t>::max(), 0).alive(kBeforeAllTime, 0));
  CHECK(none.bucket(kBeforeAllTime) == none.bucket(1'700'000'000));
}

TEST_CASE("lifetime: counts add up, and refuse whole what would leave fewer rows than none") {
  AgeCounts counts;
  CHECK(counts.add({{5, 3}, {7, 2}}));
  CHECK(counts.add({{5, -1}, {9, 1}}));
  CHECK(counts.since(5) == 5);
  CHECK(counts.since(6) == 3);
  CHECK(counts.since(10) == 0);
  CHECK_FALSE(counts.add({{9, 4}, {5, -3}}));
  CHECK_FALSE(counts.add({{4, -1}}));
  CHECK(counts.since(5) == 5);
  CHECK(counts.add({{5, -2}}));
  CHECK(counts.buckets().count(5) == 0);
  counts.forget_before(9);
  CHECK(counts.since(0) == 1);
}

}  // namespace
}  // namespace damo
