// SPDX-License-Identifier: Apache-2.0
//
// Powers of Adam's betas, from our own code: the libm's pow differs between
// versions and processors in the last bit, and a row must not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace damo {

// base^exponent for 0 <= base <= 1 by squaring, in doubles, from the exponent's lowest bit up:
//   result = 1; while exponent: if (exponent & 1) result *= base; base *= base; exponent >>= 1
// but 0 as soon as the result is sure to be below 2^-500: what is left would be arithmetic on subnormals, a
// hundred times slower, and nothing is lost beside 1. The relative error is below exponent * 2^-52, far under
// a float's for every power that is not negligible beside 1.
constexpr double power(double base, uint64_t exponent) noexcept {
  double result = 1.0;
  for (; exponent != 0; exponent >>= 1) {
    if (base < 0x1p-500) return 0.0;
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// What Adam multiplies by at a row's update `count` >= 1:
//   first  = float(1 / (1 - beta1^count))        scales the rate
//   second = float(1 / sqrt(1 - beta2^count))    scales sqrt(exp_avg_sq)
// Both are exactly 1 from some count on.
struct BiasCorrection {
  float first;
  float second;
};
BiasCorrection bias_correction(double beta1, double beta2, uint64_t count) noexcept;

// bias_correction(beta1, beta2, count) for count < size(), computed once: two powers, two divisions and a
// root a row would cost more than the row. Ends where both corrections stay 1, at most kMaxCount entries;
// past its end at() computes, so a table changes no bits.
//
// Thread safety: immutable.
class BiasCorrectionTable {
 public:
  static constexpr size_t kMaxCount = 32768;  // 256 KiB; beta2 = 0.999 needs 17,321

  // One table for all optimizers with these betas that are alive: a storage may have 256 groups.
  static std::shared_ptr<const BiasCorrectionTable> shared(double beta1, double beta2);

  BiasCorrectionTable(double beta1, double beta2);
  double beta1() const noexcept { return beta1_; }
  double beta2() const noexcept { return beta2_; }
  size_t size() const noexcept { return entries_.size(); }
  BiasCorrection at(uint32_t count) const noexcept {
    if (count < entries_.size()) return entries_[count];
    return ends_ ? BiasCorrection{1.0f, 1.0f} : bias_correction(beta1_, beta2_, count);
  }

 private:
  double beta1_;
  double beta2_;
  bool ends_ = false;                    // past the last entry both corrections are 1
  std::vector<BiasCorrection> entries_;  // [0] is unused
};

}  // namespace damo
