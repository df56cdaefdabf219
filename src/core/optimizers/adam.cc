// SPDX-License-Identifier: Apache-2.0
//
// Kingma, Ba: "Adam: a method for stochastic optimization", ICLR 2015. Corrected
// by the row's own update count it is torch.optim.Adam, by the group's step
// torch.optim.SparseAdam; docs/optimizers.md has both formulas.
#include <cmath>

#include "../power.h"
#include "list.h"
#include "row_loop.h"

namespace damo {
namespace {

// numbers: 0 lr, 1 beta1, 2 beta2, 3 eps, 4 weight_decay, 5 bias_correction (0 row, 1 global),
//          6 step size: row: lr; global: lr * sqrt(1 - beta2^group_step) / (1 - beta1^group_step)
enum Number : size_t { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kBiasCorrection, kStepSize, kCount };

struct AdamConstants {
  explicit AdamConstants(const StepNumbers& numbers)
      : step_size(static_cast<float>(numbers.value[kStepSize])),
        one_minus_beta1(static_cast<float>(1.0 - numbers.value[kBeta1])),
        beta2(static_cast<float>(numbers.value[kBeta2])),
        one_minus_beta2(static_cast<float>(1.0 - numbers.value[kBeta2])),
        eps(static_cast<float>(numbers.value[kEps])),
        weight_decay(static_cast<float>(numbers.value[kWeightDecay])) {}
  float step_size;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float weight_decay;
};

// torch.optim.Adam. Its division by sqrt(1 - beta2^n) is a multiplication here: one division a weight, not two.
template <bool kDecay, class Corrections>
struct AdamRowKernel {
  static constexpr size_t state_floats(size_t dimension) noexcept { return 2 * dimension; }
  AdamConstants constants;
  const Corrections& corrections;

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    const size_t n = kDimension != 0 ? kDimension : dimension;
    float* __restrict w = row.weights;
    float* __restrict exp_avg = row.state;
    float* __restrict exp_avg_sq = row.state + n;
    const float* __restrict gradient = row.gradient;
    const AdamConstants c = constants;
    const BiasCorrection correction = corrections.at(row.update_count);
    const float rate = c.step_size * correction.first;
    const float scale = correction.second;
    DAMO_VECTORIZE_BEFORE_UNROLLING
    for (size_t i = 0; i < n; ++i) {
      const float g = kDecay ? gradient[i] + c.weight_decay * w[i] : gradient[i];
      const float m = exp_avg[i] + c.one_minus_beta1 * (g - exp_avg[i]);
      const float v = c.beta2 * exp_avg_sq[i] + (c.one_minus_beta2 * g) * g;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      w[i] -= (rate * m) / (__builtin_sqrtf(v) * scale + c.eps);
    }
  }
};

// torch.optim.SparseAdam.
template <bool kDecay>
struct AdamGlobalKernel {
  static constexpr size_t state_floats(size_t dimension) noexcept { return 2 * dimension; }
  AdamConstants constants;

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    const size_t n = kDimension != 0 ? kDimension : dimension;
    float* __restrict w = row.weights;
    float* __restrict exp_avg = row.state;
    float* __restrict exp_avg_sq = row.state + n;
    const float* __restrict gradient = row.gradient;
    const AdamConstants c = constants;
    DAMO_VECTORIZE_BEFORE_UNROLLING
    for (size_t i = 0; i < n; ++i) {
      const float g = kDecay ? gradient[i] + c.weight_decay * w[i] : gradient[i];
      const float m = exp_avg[i] + c.one_minus_beta1 * (g - exp_avg[i]);
      const float v = exp_avg_sq[i] + c.one_minus_beta2 * (g * g - exp_avg_sq[i]);
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      w[i] -= c.step_size * (m / (__builtin_sqrtf(v) + c.eps));
    }
  }
};

// Corrections of betas that are not the table's own: redo of a step made under other settings. Same bits.
struct ComputedCorrections {
  double beta1;
  double beta2;
  BiasCorrection at(uint32_t count) const noexcept { return bias_correction(beta1, beta2, count); }
};

class Adam final : public Optimizer {
 public:
  explicit Adam(const Settings& settings) {
    SettingsReader reader("optimizer adam", settings);
    lr_ = reader.number("lr", 1e-3, 0.0, kMaxFloat);
    // Below one as floats, or the averages would never forget.
    beta1_ = reader.number("beta1", 0.9, 0.0, kBelowOne);
    beta2_ = reader.number("beta2", 0.999, 0.0, kBelowOne);
    // Above zero as a float: a zero gradient on a fresh row would be 0 / 0.
    eps_ = reader.number("eps", 1e-8, kMinNormalFloat, kMaxFloat);
    weight_decay_ = reader.number("weight_decay", 0.0, 0.0, kMaxFloat);
    bias_correction_ = reader.number("bias_correction", 0.0, 0.0, 1.0);
    if (bias_correction_ != 0.0 && bias_correction_ != 1.0) {
      reader.fail("bias_correction is " + format_number(bias_correction_) + ", expected 0 (row) or 1 (global)");
    }
    reader.expect_all_taken();
    if (bias_correction_ == 0.0) table_ = BiasCorrectionTable::shared(beta1_, beta2_);
  }

  std::string_view name() const noexcept override { return "adam"; }
  uint32_t id() const noexcept override { return 3; }
  std::vector<StateEntry> state() const override { return {{"exp_avg", true, 0.0f}, {"exp_avg_sq", true, 0.0f}}; }
  double lr() const noexcept override { return lr_; }

  StepNumbers numbers(double lr, uint64_t group_step) const override {
    double step_size = lr;
    if (bias_correction_ == 1.0) {
      step_size = lr * std::sqrt(1.0 - power(beta2_, group_step)) / (1.0 - power(beta1_, group_step));
    }
    return {kCount, {lr, beta1_, beta2_, eps_, weight_decay_, bias_correction_, step_size}};
  }

  void update(const StepNumbers& numbers, uint32_t update_count, size_t dimension, float* weights, float* state,
              const float* gradient) const noexcept override {
    const RowUpdate row{weights, state, gradient, update_count};
    update_rows(numbers, dimension, {&row, 1});
  }

  void update_rows(const StepNumbers& numbers, size_t dimension,
                   std::span<const RowUpdate> rows) const noexcept override {
    const AdamConstants constants(numbers);
    if (constants.weight_decay != 0.0f) {
      update_with<true>(numbers, constants, dimension, rows);
    } else {
      update_with<false>(numbers, constants, dimension, rows);
    }
  }

 private:
  template <bool kDecay>
  void update_with(const StepNumbers& numbers, const AdamConstants& constants, size_t dimension,
                   std::span<const RowUpdate> rows) const noexcept {
    const double beta1 = numbers.value[kBeta1];
    const double beta2 = numbers.value[kBeta2];
    if (numbers.value[kBiasCorrection] != 0.0) {
      update_each_row(AdamGlobalKernel<kDecay>{constants}, dimension, rows);
    } else if (table_ && table_->beta1() == beta1 && table_->beta2() == beta2) {
      update_each_row(AdamRowKernel<kDecay, BiasCorrectionTable>{constants, *table_}, dimension, rows);
    } else {
      const ComputedCorrections computed{beta1, beta2};
      update_each_row(AdamRowKernel<kDecay, ComputedCorrections>{constants, computed}, dimension, rows);
    }
  }

  double lr_;
  double beta1_;
  double beta2_;
  double eps_;
  double weight_decay_;
  double bias_correction_;
  std::shared_ptr<const BiasCorrectionTable> table_;  // shared with the other optimizers of these betas
};

}  // namespace

std::unique_ptr<Optimizer> make_adam(const Settings& settings) { return std::make_unique<Adam>(settings); }

}  // namespace damo
