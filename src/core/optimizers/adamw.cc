// SPDX-License-Identifier: Apache-2.0
//
// Loshchilov, Hutter: "Decoupled weight decay regularization", ICLR 2019; the form
// of torch.optim.AdamW, corrected by the row's own update count.
#include <algorithm>

#include "list.h"
#include "row_correction.h"

namespace damo {
namespace {

// numbers: those of the family
template <class Corrections>
struct AdamwKernel {
  static constexpr size_t state_floats(size_t dimension) noexcept { return 2 * dimension; }
  AdamConstants constants;
  float kept;  // 1 - lr * weight_decay: 1 without decay, which changes no bit
  const Corrections& corrections;

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    const size_t n = kDimension != 0 ? kDimension : dimension;
    float* __restrict w = row.weights;
    float* __restrict exp_avg = row.state;
    float* __restrict exp_avg_sq = row.state + n;
    const float* __restrict gradient = row.gradient;
    const AdamConstants c = constants;
    const float keep = kept;
    const BiasCorrection correction = corrections.at(row.update_count);
    const float rate = c.lr * correction.first;
    const float scale = correction.second;
    DAMO_VECTORIZE_BEFORE_UNROLLING
    for (size_t i = 0; i < n; ++i) {
      const float g = gradient[i];
      const float m = exp_avg[i] + c.one_minus_beta1 * (g - exp_avg[i]);
      const float v = c.beta2 * exp_avg_sq[i] + (c.one_minus_beta2 * g) * g;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      w[i] = keep * w[i] - (rate * m) / (__builtin_sqrtf(v) * scale + c.eps);
    }
  }
};

class Adamw final : public Optimizer {
 public:
  explicit Adamw(const Settings& settings) : Adamw(SettingsReader("optimizer adamw", settings)) {}

  std::string_view name() const noexcept override { return "adamw"; }
  uint32_t id() const noexcept override { return 6; }
  std::vector<StateEntry> state() const override { return {{"exp_avg", true, 0.0f}, {"exp_avg_sq", true, 0.0f}}; }
  double lr() const noexcept override { return s_.lr; }

  StepNumbers numbers(double lr, uint64_t) const override {
    return {kAdamNumbers, {lr, s_.beta1, s_.beta2, s_.eps, s_.weight_decay}};
  }

  void update(const StepNumbers& numbers, uint32_t update_count, size_t dimension, float* weights, float* state,
              const float* gradient) const noexcept override {
    const RowUpdate row{weights, state, gradient, update_count};
    update_rows(numbers, dimension, {&row, 1});
  }

  void update_rows(const StepNumbers& numbers, size_t dimension,
                   std::span<const RowUpdate> rows) const noexcept override {
    const AdamConstants constants(numbers);
    // Settings at the ends of their ranges have a product that no float holds.
    const double kept = std::max(1.0 - numbers.value[kLr] * numbers.value[kWeightDecay], -kMaxFloat);
    with_corrections(table_.get(), numbers, [&]<class Corrections>(const Corrections& corrections) {
      update_each_row(AdamwKernel<Corrections>{constants, static_cast<float>(kept), corrections}, dimension, rows);
    });
  }

 private:
  explicit Adamw(SettingsReader reader) : s_(reader, 1e-2), table_(BiasCorrectionTable::shared(s_.beta1, s_.beta2)) {
    reader.expect_all_taken();
  }

  AdamSettings s_;
  std::shared_ptr<const BiasCorrectionTable> table_;  // shared with the other optimizers of these betas
};

}  // namespace

std::unique_ptr<Optimizer> make_adamw(const Settings& settings) { return std::make_unique<Adamw>(settings); }

}  // namespace damo
