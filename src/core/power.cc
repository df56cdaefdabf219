// SPDX-License-Identifier: Apache-2.0
#include "power.h"

#include <bit>
#include <cmath>
#include <map>
#include <mutex>
#include <utility>

namespace damo {

namespace {

BiasCorrection corrections_of(double power1, double power2) noexcept {
  return {static_cast<float>(1.0 / (1.0 - power1)), static_cast<float>(1.0 / std::sqrt(1.0 - power2))};
}

}  // namespace

BiasCorrection bias_correction(double beta1, double beta2, uint64_t count) noexcept {
  return corrections_of(power(beta1, count), power(beta2, count));
}

BiasCorrectionTable::BiasCorrectionTable(double beta1, double beta2) : beta1_(beta1), beta2_(beta2) {
  // power() multiplies from the lowest bit up, so power(b, n) is power(b, n without its highest bit) * power(b, that
  // bit), to the last bit of the product: one multiplication a power instead of a walk over n's bits.
  std::vector<double> powers1 = {1.0};
  std::vector<double> powers2 = {1.0};
  double highest1 = 0.0;
  double highest2 = 0.0;
  entries_.push_back({1.0f, 1.0f});
  while (entries_.size() < kMaxCount) {
    const size_t count = entries_.size();
    const size_t highest = std::bit_floor(count);
    if (count == highest) {
      highest1 = power(beta1, count);
      highest2 = power(beta2, count);
    }
    powers1.push_back(powers1[count - highest] * highest1);
    powers2.push_back(powers2[count - highest] * highest2);
    // 1 / (1 - x) and 1 / sqrt(1 - x) round to 1.0f below x = 2^-24; one power of two further down leaves room for
    // the powers' own rounding, which need not be monotone from one count to the next.
    if (powers1.back() < 0x1p-25 && powers2.back() < 0x1p-25) {
      ends_ = true;
      break;
    }
    entries_.push_back(corrections_of(powers1.back(), powers2.back()));
  }
  entries_.shrink_to_fit();
}

std::shared_ptr<const BiasCorrectionTable> BiasCorrectionTable::shared(double beta1, double beta2) {
  static std::mutex mutex;  // protects tables
  static std::map<std::pair<double, double>, std::weak_ptr<const BiasCorrectionTable>> tables;
  const std::lock_guard lock(mutex);
  std::erase_if(tables, [](const auto& entry) { return entry.second.expired(); });
  auto& slot = tables[{beta1, beta2}];
  auto table = slot.lock();
  if (!table) slot = table = std::make_shared<const BiasCorrectionTable>(beta1, beta2);
  return table;
}

}  // namespace damo
