// SPDX-License-Identifier: Apache-2.0
//
// Reddi, Kale, Kumar: "On the convergence of Adam and beyond", ICLR 2018; the
// form of torch.optim.Adam(amsgrad=True), corrected by the row's own update count.
#include "list.h"
#include "row_correction.h"

namespace damo {
namespace {

// numbers: those of the family
template <bool kDecay, class Corrections>
struct AmsgradKernel {
  static constexpr size_t state_floats(size_t dimension) noexcept { return 3 * dimension; }
  AdamConstants constants;
  const Corrections& corrections;

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    const size_t n = kDimension != 0 ? kDimension : dimension;
    float* __restrict w = row.weights;
    float* __restrict exp_avg = row.state;
    float* __restrict exp_avg_sq = row.state + n;
    float* __restrict max_exp_avg_sq = row.state + 2 * n;
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
      const float largest = max_exp_avg_sq[i] > v ? max_exp_avg_sq[i] : v;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      max_exp_avg_sq[i] = largest;
      w[i] -= (rate * m) / (__builtin_sqrtf(largest) * scale + c.eps);
    }
  }
};

class Amsgrad final : public Optimizer {
 public:
  explicit Amsgrad(const Settings& settings) : Amsgrad(SettingsReader("optimizer amsgrad", settings)) {}

  std::string_view name() const noexcept override { return "amsgrad"; }
  uint32_t id() const noexcept override { return 5; }
  std::vector<StateEntry> state() const override {
    return {{"exp_avg", true, 0.0f}, {"exp_avg_sq", true, 0.0f}, {"max_exp_avg_sq", true, 0.0f}};
  }
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
    choose_loop(constants.weight_decay != 0.0f, [&]<bool kDecay>() {
      with_corrections(table_.get(), numbers, [&]<class Corrections>(const Corrections& corrections) {
        update_each_row(AmsgradKernel<kDecay, Corrections>{constants, corrections}, dimension, rows);
      });
    });
  }

 private:
  explicit Amsgrad(SettingsReader reader) : s_(reader, 0.0), table_(BiasCorrectionTable::shared(s_.beta1, s_.beta2)) {
    reader.expect_all_taken();
  }

  AdamSettings s_;
  std::shared_ptr<const BiasCorrectionTable> table_;  // shared with the other optimizers of these betas
};

}  // namespace

std::unique_ptr<Optimizer> make_amsgrad(const Settings& settings) { return std::make_unique<Amsgrad>(settings); }

}  // namespace damo
