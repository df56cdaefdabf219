// SPDX-License-Identifier: Apache-2.0
//
// Robbins, Monro: "A stochastic approximation method", Annals of Mathematical
// Statistics 1951; momentum, dampening and Nesterov's form as torch.optim.SGD
// has them. A row has a state only with momentum: opening a group with momentum
// after one without it, or the other way round, is a mismatch of its schema.
#include "list.h"
#include "row_loop.h"

namespace damo {
namespace {

// numbers: 0 lr, 1 weight_decay, 2 momentum, 3 dampening, 4 nesterov (0, 1)
enum Number : size_t { kLr, kWeightDecay, kMomentum, kDampening, kNesterov, kCount };

template <bool kDecay>
struct SgdKernel {
  static constexpr size_t state_floats(size_t) noexcept { return 0; }
  float lr;
  float weight_decay;

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    float* __restrict w = row.weights;
    const float* __restrict gradient = row.gradient;
    const float rate = lr;
    const float decay = weight_decay;
    const size_t n = kDimension != 0 ? kDimension : dimension;
    DAMO_VECTORIZE_BEFORE_UNROLLING
    for (size_t i = 0; i < n; ++i) {
      const float g = kDecay ? gradient[i] + decay * w[i] : gradient[i];
      w[i] -= rate * g;
    }
  }
};

template <bool kDecay, bool kAhead>  // kAhead: Nesterov's
struct MomentumKernel {
  static constexpr size_t state_floats(size_t dimension) noexcept { return dimension; }
  float lr;
  float weight_decay;
  float momentum;
  float one_minus_dampening;

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    float* __restrict w = row.weights;
    float* __restrict buffer = row.state;
    const float* __restrict gradient = row.gradient;
    const float rate = lr;
    const float decay = weight_decay;
    const float keep = momentum;
    // torch's buffer starts as the first gradient, not as the dampened one.
    const float take = row.update_count == 1 ? 1.0f : one_minus_dampening;
    const size_t n = kDimension != 0 ? kDimension : dimension;
    DAMO_VECTORIZE_BEFORE_UNROLLING
    for (size_t i = 0; i < n; ++i) {
      const float g = kDecay ? gradient[i] + decay * w[i] : gradient[i];
      const float b = keep * buffer[i] + take * g;
      buffer[i] = b;
      w[i] -= rate * (kAhead ? g + keep * b : b);
    }
  }
};

class Sgd final : public Optimizer {
 public:
  explicit Sgd(const Settings& settings) {
    SettingsReader reader("optimizer sgd", settings);
    lr_ = reader.number("lr", 1e-3, 0.0, kMaxFloat);
    weight_decay_ = reader.number("weight_decay", 0.0, 0.0, kMaxFloat);
    // Below one as a float, or the buffer would never forget.
    momentum_ = reader.number("momentum", 0.0, 0.0, kBelowOne);
    dampening_ = reader.number("dampening", 0.0, 0.0, 1.0);
    nesterov_ = reader.flag("nesterov", false);
    reader.expect_all_taken();
    if (nesterov_ && (momentum_ == 0.0 || dampening_ != 0.0)) {
      reader.fail("nesterov is 1 with momentum " + format_number(momentum_) + " and dampening " +
                  format_number(dampening_) + ", expected momentum above 0 and dampening 0");
    }
    if (dampening_ != 0.0 && momentum_ == 0.0) {
      reader.fail("dampening is " + format_number(dampening_) + " with momentum 0, expected momentum above 0");
    }
  }

  std::string_view name() const noexcept override { return "sgd"; }
  uint32_t id() const noexcept override { return 1; }
  std::vector<StateEntry> state() const override {
    if (momentum_ == 0.0) return {};
    return {{"momentum_buffer", true, 0.0f}};
  }
  double lr() const noexcept override { return lr_; }

  StepNumbers numbers(double lr, uint64_t) const override {
    return {kCount, {lr, weight_decay_, momentum_, dampening_, nesterov_ ? 1.0 : 0.0}};
  }

  void update(const StepNumbers& numbers, uint32_t update_count, size_t dimension, float* weights, float* state,
              const float* gradient) const noexcept override {
    const RowUpdate row{weights, state, gradient, update_count};
    update_rows(numbers, dimension, {&row, 1});
  }

  void update_rows(const StepNumbers& numbers, size_t dimension,
                   std::span<const RowUpdate> rows) const noexcept override {
    const auto lr = static_cast<float>(numbers.value[kLr]);
    const auto decay = static_cast<float>(numbers.value[kWeightDecay]);
    const auto momentum = static_cast<float>(numbers.value[kMomentum]);
    const auto take = static_cast<float>(1.0 - numbers.value[kDampening]);
    choose_loop(decay != 0.0f, [&]<bool kDecay>() {
      // As a double, like the state that it decides on.
      if (numbers.value[kMomentum] == 0.0) {
        update_each_row(SgdKernel<kDecay>{lr, decay}, dimension, rows);
        return;
      }
      choose_loop(numbers.value[kNesterov] != 0.0, [&]<bool kAhead>() {
        update_each_row(MomentumKernel<kDecay, kAhead>{lr, decay, momentum, take}, dimension, rows);
      });
    });
  }

 private:
  double lr_;
  double weight_decay_;
  double momentum_;
  double dampening_;
  bool nesterov_;
};

}  // namespace

std::unique_ptr<Optimizer> make_sgd(const Settings& settings) { return std::make_unique<Sgd>(settings); }

}  // namespace damo
