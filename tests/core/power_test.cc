// SPDX-License-Identifier: Apache-2.0
#include "power.h"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

namespace damo {
namespace {

bool same(BiasCorrection a, BiasCorrection b) { return a.first == b.first && a.second == b.second; }

TEST_CASE("power is within exponent * 2^-52 of the real power, or both are below 2^-500") {
  for (const double base : {0.5, 0.9, 0.99, 0.999, 0.9999}) {
    for (const uint64_t exponent : {1u, 2u, 3u, 7u, 10u, 31u, 100u, 1023u, 5000u}) {
      const double expected = static_cast<double>(std::pow(static_cast<long double>(base), exponent));
      const double allowed = expected < 0x1p-500 ? 0x1p-500 : expected * static_cast<double>(exponent) * 0x1p-52;
      CAPTURE(base);
      CAPTURE(exponent);
      CHECK(std::abs(power(base, exponent) - expected) <= allowed);
    }
  }
}

TEST_CASE("power of the ends of its range is exact") {
  CHECK(power(0.0, 0) == 1.0);
  CHECK(power(0.0, 1) == 0.0);
  CHECK(power(0.0, 12345) == 0.0);
  CHECK(power(1.0, UINT64_MAX) == 1.0);
  CHECK(power(0.5, 40) == 0x1p-40);
  CHECK(power(0.999, 1) == 0.999);
  CHECK(power(0.999, UINT64_MAX) == 0.0);
}

TEST_CASE("power cuts off at 0 only what is below 2^-500") {
  CHECK(power(0.5, 499) == 0x1p-499);
  CHECK(power(0.5, 512) == 0.0);
  CHECK(1.0 - power(0.5, 512) == 1.0);
}

TEST_CASE("power multiplies in the documented order") {
  const double b = 0.9;
  CHECK(power(b, 5) == b * ((b * b) * (b * b)));  // 5 = 101b: first b, then b^4
  CHECK(power(b, 6) == (b * b) * ((b * b) * (b * b)));
}

TEST_CASE("a bias correction table has the bits of the computation inside, at and past its end") {
  for (const double beta1 : {0.0, 0.5, 0.9}) {
    for (const double beta2 : {0.0, 0.9, 0.99, 0.999, 0.99999}) {
      const BiasCorrectionTable table(beta1, beta2);
      CAPTURE(beta1);
      CAPTURE(beta2);
      bool equal = true;
      for (uint32_t count = 1; count < table.size() + 1000; ++count) {
        equal = equal && same(table.at(count), bias_correction(beta1, beta2, count));
      }
      CHECK(equal);
      for (const uint32_t count : {1u << 20, 1u << 24, UINT32_MAX}) {
        CHECK(same(table.at(count), bias_correction(beta1, beta2, count)));
      }
    }
  }
}

TEST_CASE("a bias correction table ends where both corrections stay 1") {
  const BiasCorrectionTable table(0.9, 0.999);
  CHECK(table.size() == 17321);
  CHECK(same(table.at(17321), {1.0f, 1.0f}));
  CHECK_FALSE(same(table.at(1), {1.0f, 1.0f}));
  CHECK(table.at(1).first == 10.0f);  // float(1 / (1 - 0.9))
}

TEST_CASE("a bias correction table is bounded when a beta is near 1") {
  CHECK(BiasCorrectionTable(0.9, 1.0 - 0x1p-24).size() == BiasCorrectionTable::kMaxCount);
}

TEST_CASE("optimizers of the same betas share one table, which goes with the last of them") {
  auto first = BiasCorrectionTable::shared(0.8, 0.99);
  auto second = BiasCorrectionTable::shared(0.8, 0.99);
  auto other = BiasCorrectionTable::shared(0.8, 0.98);
  CHECK(first.get() == second.get());
  CHECK(first.get() != other.get());
  const std::weak_ptr<const BiasCorrectionTable> watch = first;
  first.reset();
  CHECK_FALSE(watch.expired());
  second.reset();
  CHECK(watch.expired());
}

}  // namespace
}  // namespace damo
