// SPDX-License-Identifier: Apache-2.0
//
// Chen et al.: "Symbolic discovery of optimization algorithms", NeurIPS 2023,
// program 1: the sign of an interpolation of momentum and gradient.
#include <algorithm>

#include "list.h"
#include "row_loop.h"

namespace damo {
namespace {

// numbers: 0 lr, 1 beta1, 2 beta2, 3 weight_decay
enum Number : size_t { kLr, kBeta1, kBeta2, kWeightDecay, kCount };

struct LionKernel {
  static constexpr size_t state_floats(size_t dimension) noexcept { return dimension; }
  float lr;
  float decay;  // lr * weight_decay
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    float* __restrict w = row.weights;
    float* __restrict exp_avg = row.state;
    const float* __restrict gradient = row.gradient;
    const LionKernel c = *this;
    const size_t n = kDimension != 0 ? kDimension : dimension;
    DAMO_VECTORIZE_BEFORE_UNROLLING
    for (size_t i = 0; i < n; ++i) {
      const float g = gradient[i];
      const float m = exp_avg[i];
      const float direction = c.beta1 * m + c.one_minus_beta1 * g;
      const float step = direction > 0.0f ? c.lr : (direction < 0.0f ? -c.lr : 0.0f);
      exp_avg[i] = c.beta2 * m + c.one_minus_beta2 * g;
      // Not (1 - decay) * w: 1 - 1e-5 is off by up to 3e-8 as a float, the same way in every step.
      w[i] -= step + c.decay * w[i];
    }
  }
};

class Lion final : public Optimizer {
 public:
  explicit Lion(const Settings& settings) {
    SettingsReader reader("optimizer lion", settings);
    lr_ = reader.number("lr", 1e-4, 0.0, kMaxFloat);
    // Below one as floats, or the average would never forget.
    beta1_ = reader.number("beta1", 0.9, 0.0, kBelowOne);
    beta2_ = reader.number("beta2", 0.99, 0.0, kBelowOne);
    weight_decay_ = reader.number("weight_decay", 0.0, 0.0, kMaxFloat);
    reader.expect_all_taken();
  }

  std::string_view name() const noexcept override { return "lion"; }
  uint32_t id() const noexcept override { return 7; }
  std::vector<StateEntry> state() const override { return {{"exp_avg", true, 0.0f}}; }
  double lr() const noexcept override { return lr_; }

  StepNumbers numbers(double lr, uint64_t) const override { return {kCount, {lr, beta1_, beta2_, weight_decay_}}; }

  void update(const StepNumbers& numbers, uint32_t update_count, size_t dimension, float* weights, float* state,
              const float* gradient) const noexcept override {
    const RowUpdate row{weights, state, gradient, update_count};
    update_rows(numbers, dimension, {&row, 1});
  }

  void update_rows(const StepNumbers& numbers, size_t dimension,
                   std::span<const RowUpdate> rows) const noexcept override {
    // Settings at the ends of their ranges have a product that no float holds.
    const double decay = std::min(numbers.value[kLr] * numbers.value[kWeightDecay], kMaxFloat);
    const LionKernel kernel{.lr = static_cast<float>(numbers.value[kLr]),
                            .decay = static_cast<float>(decay),
                            .beta1 = static_cast<float>(numbers.value[kBeta1]),
                            .one_minus_beta1 = static_cast<float>(1.0 - numbers.value[kBeta1]),
                            .beta2 = static_cast<float>(numbers.value[kBeta2]),
                            .one_minus_beta2 = static_cast<float>(1.0 - numbers.value[kBeta2])};
    update_each_row(kernel, dimension, rows);
  }

 private:
  double lr_;
  double beta1_;
  double beta2_;
  double weight_decay_;
};

}  // namespace

std::unique_ptr<Optimizer> make_lion(const Settings& settings) { return std::make_unique<Lion>(settings); }

}  // namespace damo
