// SPDX-License-Identifier: Apache-2.0
//
// What the optimizers of Adam's family share: their settings, the constants of a
// step, and the correction of the averages' start by each row's own update count.
#pragma once

#include <memory>

#include "../power.h"
#include "row_loop.h"

namespace damo {

// The numbers of a step that all of them begin with.
enum AdamNumber : size_t { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kAdamNumbers };

struct AdamSettings {
  AdamSettings(SettingsReader& reader, double default_weight_decay)
      : lr(reader.number("lr", 1e-3, 0.0, kMaxFloat)),
        // Below one as floats, or the averages would never forget.
        beta1(reader.number("beta1", 0.9, 0.0, kBelowOne)),
        beta2(reader.number("beta2", 0.999, 0.0, kBelowOne)),
        // Above zero as a float: a zero gradient on a fresh row would be 0 / 0.
        eps(reader.number("eps", 1e-8, kMinNormalFloat, kMaxFloat)),
        weight_decay(reader.number("weight_decay", default_weight_decay, 0.0, kMaxFloat)) {}
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
};

struct AdamConstants {
  explicit AdamConstants(const StepNumbers& numbers)
      : lr(static_cast<float>(numbers.value[kLr])),
        one_minus_beta1(static_cast<float>(1.0 - numbers.value[kBeta1])),
        beta2(static_cast<float>(numbers.value[kBeta2])),
        one_minus_beta2(static_cast<float>(1.0 - numbers.value[kBeta2])),
        eps(static_cast<float>(numbers.value[kEps])),
        weight_decay(static_cast<float>(numbers.value[kWeightDecay])) {}
  float lr;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float weight_decay;
};

// Corrections of betas that are not the table's own: redo of a step made under other settings. Same bits.
struct ComputedCorrections {
  double beta1;
  double beta2;
  BiasCorrection at(uint32_t count) const noexcept { return bias_correction(beta1, beta2, count); }
};

// Where the corrections of the numbers' betas come from, as a type: f(BiasCorrectionTable) if `table` has them,
// else f(ComputedCorrections). `table` may be null.
template <class F>
void with_corrections(const BiasCorrectionTable* table, const StepNumbers& numbers, const F& f) {
  const double beta1 = numbers.value[kBeta1];
  const double beta2 = numbers.value[kBeta2];
  if (table != nullptr && table->beta1() == beta1 && table->beta2() == beta2) {
    f(*table);
  } else {
    f(ComputedCorrections{beta1, beta2});
  }
}

}  // namespace damo
