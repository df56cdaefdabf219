// SPDX-License-Identifier: Apache-2.0
//
// Kingma, Ba: "Adam: a method for stochastic optimization", ICLR 2015. Corrected
// by the row's own update count it is torch.optim.Adam, by the group's step
// torch.optim.SparseAdam; docs/optimizers.md has both formulas.
#include <cmath>

#include "list.h"
#include "row_correction.h"

namespace damo {
namespace {

// numbers: those of the family, then 5 bias_correction (0 row, 1 global),
//          6 step size: row: lr; global: lr * sqrt(1 - beta2^group_step) / (1 - beta1^group_step)
enum Number : size_t { kBiasCorrection = kAdamNumbers, kStepSize, kCount };

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
    const float rate = c.lr * correction.first;
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
  float step_size;

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    const size_t n = kDimension != 0 ? kDimension : dimension;
    float* __restrict w = row.weights;
    float* __restrict exp_avg = row.state;
    float* __restrict exp_avg_sq = row.state + n;
    const float* __restrict gradient = row.gradient;
    const AdamConstants c = constants;
    const float step = step_size;
    DAMO_VECTORIZE_BEFORE_UNROLLING
    for (size_t i = 0; i < n; ++i) {
      const float g = kDecay ? gradient[i] + c.weight_decay * w[i] : gradient[i];
      const float m = exp_avg[i] + c.one_minus_beta1 * (g - exp_avg[i]);
      const float v = exp_avg_sq[i] + c.one_minus_beta2 * (g * g - exp_avg_sq[i]);
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      w[i] -= step * (m / (__builtin_sqrtf(v) + c.eps));
    }
  }
};

class Adam final : public Optimizer {
 public:
  explicit Adam(const Settings& settings) : Adam(SettingsReader("optimizer adam", settings)) {}

  std::string_view name() const noexcept override { return "adam"; }
  uint32_t id() const noexcept override { return 3; }
  std::vector<StateEntry> state() const override { return {{"exp_avg", true, 0.0f}, {"exp_avg_sq", true, 0.0f}}; }
  double lr() const noexcept override { return s_.lr; }

  StepNumbers numbers(double lr, uint64_t group_step) const override {
    double step_size = lr;
    if (bias_correction_ == 1.0) {
      step_size = lr * std::sqrt(1.0 - power(s_.beta2, group_step)) / (1.0 - power(s_.beta1, group_step));
    }
    return {kCount, {lr, s_.beta1, s_.beta2, s_.eps, s_.weight_decay, bias_correction_, step_size}};
  }

  void update(const StepNumbers& numbers, uint32_t update_count, size_t dimension, float* weights, float* state,
              const float* gradient) const noexcept override {
    const RowUpdate row{weights, state, gradient, update_count};
    update_rows(numbers, dimension, {&row, 1});
  }

  void update_rows(const StepNumbers& numbers, size_t dimension,
                   std::span<const RowUpdate> rows) const noexcept override {
    const AdamConstants constants(numbers);
    choose_loop(constants.weight_decay != 0.0f, [&]<bool kDecay>() {
      if (numbers.value[kBiasCorrection] != 0.0) {
        const auto step_size = static_cast<float>(numbers.value[kStepSize]);
        update_each_row(AdamGlobalKernel<kDecay>{constants, step_size}, dimension, rows);
        return;
      }
      with_corrections(table_.get(), numbers, [&]<class Corrections>(const Corrections& corrections) {
        update_each_row(AdamRowKernel<kDecay, Corrections>{constants, corrections}, dimension, rows);
      });
    });
  }

 private:
  explicit Adam(SettingsReader reader)
      : s_(reader, 0.0), bias_correction_(reader.number("bias_correction", 0.0, 0.0, 1.0)) {
    if (bias_correction_ != 0.0 && bias_correction_ != 1.0) {
      reader.fail("bias_correction is " + format_number(bias_correction_) + ", expected 0 (row) or 1 (global)");
    }
    reader.expect_all_taken();
    if (bias_correction_ == 0.0) table_ = BiasCorrectionTable::shared(s_.beta1, s_.beta2);
  }

  AdamSettings s_;
  double bias_correction_;
  std::shared_ptr<const BiasCorrectionTable> table_;  // shared with the other optimizers of these betas
};

}  // namespace

std::unique_ptr<Optimizer> make_adam(const Settings& settings) { return std::make_unique<Adam>(settings); }

}  // namespace damo
