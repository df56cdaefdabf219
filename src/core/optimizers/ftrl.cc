// SPDX-License-Identifier: Apache-2.0
//
// FTRL-Proximal. McMahan et al.: "Ad click prediction: a view from the trenches",
// KDD 2013, algorithm 1; lr is the paper's alpha, n is updated on every gradient.
#include "list.h"
#include "row_loop.h"

namespace damo {
namespace {

// numbers: 0 lr, 1 beta, 2 lambda1, 3 lambda2
enum Number : size_t { kLr, kBeta, kLambda1, kLambda2, kCount };

struct FtrlKernel {
  static constexpr size_t state_floats(size_t dimension) noexcept { return 2 * dimension; }
  float lr;
  float inverse_lr;
  float beta;
  float lambda1;
  float lr_lambda2;

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    const size_t count = kDimension != 0 ? kDimension : dimension;
    float* __restrict w = row.weights;
    float* __restrict z = row.state;
    float* __restrict n = row.state + count;
    const float* __restrict gradient = row.gradient;
    const FtrlKernel c = *this;
    DAMO_VECTORIZE_BEFORE_UNROLLING
    for (size_t i = 0; i < count; ++i) {
      const float g = gradient[i];
      const float before = n[i];
      const float after = before + g * g;
      const float root = __builtin_sqrtf(after);
      // A difference of roots, though it cancels: the sigmas of all updates then add up to root / lr, which is
      // what w is divided by.
      const float sigma = (root - __builtin_sqrtf(before)) * c.inverse_lr;
      const float sum = z[i] + (g - sigma * w[i]);
      z[i] = sum;
      n[i] = after;
      // -(z - sgn(z) lambda1) / ((beta + root) / lr + lambda2), both sides times lr: one division.
      const float solved = (c.lr * (__builtin_copysignf(c.lambda1, sum) - sum)) / ((c.beta + root) + c.lr_lambda2);
      const float sparse = __builtin_fabsf(sum) <= c.lambda1 ? 0.0f : solved;
      // Nothing but gradients of 0 yet: the closed form knows nothing of the first weight.
      w[i] = after == 0.0f ? w[i] : sparse;
    }
  }
};

class Ftrl final : public Optimizer {
 public:
  explicit Ftrl(const Settings& settings) {
    SettingsReader reader("optimizer ftrl", settings);
    lr_ = reader.number("lr", 5e-3, 0.0, kMaxFloat);
    beta_ = reader.number("beta", 1.0, 0.0, kMaxFloat);
    lambda1_ = reader.number("lambda1", 0.0, 0.0, kMaxFloat);
    lambda2_ = reader.number("lambda2", 0.0, 0.0, kMaxFloat);
    reader.expect_all_taken();
  }

  std::string_view name() const noexcept override { return "ftrl"; }
  uint32_t id() const noexcept override { return 9; }
  std::vector<StateEntry> state() const override { return {{"z", true, 0.0f}, {"n", true, 0.0f}}; }
  double lr() const noexcept override { return lr_; }

  StepNumbers numbers(double lr, uint64_t) const override { return {kCount, {lr, beta_, lambda1_, lambda2_}}; }

  void update(const StepNumbers& numbers, uint32_t update_count, size_t dimension, float* weights, float* state,
              const float* gradient) const noexcept override {
    const RowUpdate row{weights, state, gradient, update_count};
    update_rows(numbers, dimension, {&row, 1});
  }

  void update_rows(const StepNumbers& numbers, size_t dimension,
                   std::span<const RowUpdate> rows) const noexcept override {
    // The paper divides by alpha. A rate of 0, as at the end of a schedule, leaves weights and state alone.
    if (numbers.value[kLr] < kMinNormalFloat) return;
    const auto lr = static_cast<float>(numbers.value[kLr]);
    update_each_row(FtrlKernel{.lr = lr,
                               .inverse_lr = 1.0f / lr,
                               .beta = static_cast<float>(numbers.value[kBeta]),
                               .lambda1 = static_cast<float>(numbers.value[kLambda1]),
                               .lr_lambda2 = lr * static_cast<float>(numbers.value[kLambda2])},
                    dimension, rows);
  }

 private:
  double lr_;
  double beta_;
  double lambda1_;
  double lambda2_;
};

}  // namespace

std::unique_ptr<Optimizer> make_ftrl(const Settings& settings) { return std::make_unique<Ftrl>(settings); }

}  // namespace damo
