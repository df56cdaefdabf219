// SPDX-License-Identifier: Apache-2.0
//
// Tieleman, Hinton: "Lecture 6.5: RMSprop", Coursera 2012; centered: Graves:
// "Generating sequences with recurrent neural networks", 2013. The form of
// torch.optim.RMSprop. The blocks of a row's state depend on the settings.
#include "list.h"
#include "row_loop.h"

namespace damo {
namespace {

// numbers: 0 lr, 1 alpha, 2 eps, 3 weight_decay, 4 momentum, 5 centered (0, 1)
enum Number : size_t { kLr, kAlpha, kEps, kWeightDecay, kMomentum, kCentered, kCount };

struct RmspropConstants {
  explicit RmspropConstants(const StepNumbers& numbers)
      : lr(static_cast<float>(numbers.value[kLr])),
        alpha(static_cast<float>(numbers.value[kAlpha])),
        one_minus_alpha(static_cast<float>(1.0 - numbers.value[kAlpha])),
        eps(static_cast<float>(numbers.value[kEps])),
        weight_decay(static_cast<float>(numbers.value[kWeightDecay])),
        momentum(static_cast<float>(numbers.value[kMomentum])) {}
  float lr;
  float alpha;
  float one_minus_alpha;
  float eps;
  float weight_decay;
  float momentum;
};

template <bool kDecay, bool kCenter, bool kBuffer>  // kBuffer: with momentum
struct RmspropKernel {
  static constexpr size_t state_floats(size_t dimension) noexcept { return (1 + kCenter + kBuffer) * dimension; }
  RmspropConstants constants;

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    const size_t n = kDimension != 0 ? kDimension : dimension;
    float* __restrict w = row.weights;
    float* __restrict square_avg = row.state;
    float* __restrict grad_avg = kCenter ? row.state + n : nullptr;
    float* __restrict buffer = kBuffer ? row.state + (kCenter ? 2 * n : n) : nullptr;
    const float* __restrict gradient = row.gradient;
    const RmspropConstants c = constants;
    DAMO_VECTORIZE_BEFORE_UNROLLING
    for (size_t i = 0; i < n; ++i) {
      const float g = kDecay ? gradient[i] + c.weight_decay * w[i] : gradient[i];
      const float v = c.alpha * square_avg[i] + (c.one_minus_alpha * g) * g;
      square_avg[i] = v;
      float variance = v;
      if constexpr (kCenter) {
        const float m = grad_avg[i] + c.one_minus_alpha * (g - grad_avg[i]);
        grad_avg[i] = m;
        const float centered = v - m * m;
        // Below zero by rounding when all gradients are alike: torch's root is NaN then.
        variance = centered > 0.0f ? centered : 0.0f;
      }
      const float root = __builtin_sqrtf(variance) + c.eps;
      if constexpr (kBuffer) {
        const float b = c.momentum * buffer[i] + g / root;
        buffer[i] = b;
        w[i] -= c.lr * b;
      } else {
        w[i] -= (c.lr * g) / root;
      }
    }
  }
};

class Rmsprop final : public Optimizer {
 public:
  explicit Rmsprop(const Settings& settings) {
    SettingsReader reader("optimizer rmsprop", settings);
    lr_ = reader.number("lr", 1e-2, 0.0, kMaxFloat);
    // Below one as floats, or the averages would never forget.
    alpha_ = reader.number("alpha", 0.99, 0.0, kBelowOne);
    // Above zero as a float: a zero gradient on a fresh row would be 0 / 0.
    eps_ = reader.number("eps", 1e-8, kMinNormalFloat, kMaxFloat);
    weight_decay_ = reader.number("weight_decay", 0.0, 0.0, kMaxFloat);
    momentum_ = reader.number("momentum", 0.0, 0.0, kBelowOne);
    centered_ = reader.flag("centered", false);
    reader.expect_all_taken();
  }

  std::string_view name() const noexcept override { return "rmsprop"; }
  uint32_t id() const noexcept override { return 8; }
  std::vector<StateEntry> state() const override {
    std::vector<StateEntry> entries = {{"square_avg", true, 0.0f}};
    if (centered_) entries.push_back({"grad_avg", true, 0.0f});
    if (momentum_ != 0.0) entries.push_back({"momentum_buffer", true, 0.0f});
    return entries;
  }
  double lr() const noexcept override { return lr_; }

  StepNumbers numbers(double lr, uint64_t) const override {
    return {kCount, {lr, alpha_, eps_, weight_decay_, momentum_, centered_ ? 1.0 : 0.0}};
  }

  void update(const StepNumbers& numbers, uint32_t update_count, size_t dimension, float* weights, float* state,
              const float* gradient) const noexcept override {
    const RowUpdate row{weights, state, gradient, update_count};
    update_rows(numbers, dimension, {&row, 1});
  }

  void update_rows(const StepNumbers& numbers, size_t dimension,
                   std::span<const RowUpdate> rows) const noexcept override {
    const RmspropConstants constants(numbers);
    choose_loop(constants.weight_decay != 0.0f, [&]<bool kDecay>() {
      choose_loop(numbers.value[kCentered] != 0.0, [&]<bool kCenter>() {
        // As a double, like the state that it decides on.
        choose_loop(numbers.value[kMomentum] != 0.0, [&]<bool kBuffer>() {
          update_each_row(RmspropKernel<kDecay, kCenter, kBuffer>{constants}, dimension, rows);
        });
      });
    });
  }

 private:
  double lr_;
  double alpha_;
  double eps_;
  double weight_decay_;
  double momentum_;
  bool centered_;
};

}  // namespace

std::unique_ptr<Optimizer> make_rmsprop(const Settings& settings) { return std::make_unique<Rmsprop>(settings); }

}  // namespace damo
