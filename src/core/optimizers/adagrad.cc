// SPDX-License-Identifier: Apache-2.0
//
// Duchi, Hazan, Singer: "Adaptive subgradient methods for online learning and
// stochastic optimization", JMLR 2011; the form of torch.optim.Adagrad.
#include "decayed_rate.h"
#include "list.h"
#include "row_loop.h"

namespace damo {
namespace {

// numbers: 0 lr, 1 eps, 2 weight_decay, 3 lr_decay
enum Number : size_t { kLr, kEps, kWeightDecay, kLrDecay, kCount };

template <bool kDecay, class Rate>
struct AdagradKernel {
  static constexpr size_t state_floats(size_t dimension) noexcept { return dimension; }
  Rate rates;
  float eps;
  float weight_decay;

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    float* __restrict w = row.weights;
    float* __restrict sum = row.state;
    const float* __restrict gradient = row.gradient;
    const float rate = rates.at(row.update_count);
    const float small = eps;
    const float decay = weight_decay;
    const size_t n = kDimension != 0 ? kDimension : dimension;
    DAMO_VECTORIZE_BEFORE_UNROLLING
    for (size_t i = 0; i < n; ++i) {
      const float g = kDecay ? gradient[i] + decay * w[i] : gradient[i];
      sum[i] += g * g;
      w[i] -= (rate * g) / (__builtin_sqrtf(sum[i]) + small);
    }
  }
};

class Adagrad final : public Optimizer {
 public:
  explicit Adagrad(const Settings& settings) {
    SettingsReader reader("optimizer adagrad", settings);
    lr_ = reader.number("lr", 1e-2, 0.0, kMaxFloat);
    lr_decay_ = reader.number("lr_decay", 0.0, 0.0, kMaxFloat);
    // Above zero as a float: a zero gradient on a zero sum would be 0 / 0.
    eps_ = reader.number("eps", 1e-10, kMinNormalFloat, kMaxFloat);
    weight_decay_ = reader.number("weight_decay", 0.0, 0.0, kMaxFloat);
    initial_ = reader.number("initial_accumulator_value", 0.0, 0.0, kMaxFloat);
    reader.expect_all_taken();
  }

  std::string_view name() const noexcept override { return "adagrad"; }
  uint32_t id() const noexcept override { return 2; }
  std::vector<StateEntry> state() const override { return {{"sum", true, static_cast<float>(initial_)}}; }
  double lr() const noexcept override { return lr_; }

  StepNumbers numbers(double lr, uint64_t) const override { return {kCount, {lr, eps_, weight_decay_, lr_decay_}}; }

  void update(const StepNumbers& numbers, uint32_t update_count, size_t dimension, float* weights, float* state,
              const float* gradient) const noexcept override {
    const RowUpdate row{weights, state, gradient, update_count};
    update_rows(numbers, dimension, {&row, 1});
  }

  void update_rows(const StepNumbers& numbers, size_t dimension,
                   std::span<const RowUpdate> rows) const noexcept override {
    const auto eps = static_cast<float>(numbers.value[kEps]);
    const auto decay = static_cast<float>(numbers.value[kWeightDecay]);
    choose_loop(decay != 0.0f, [&]<bool kDecay>() {
      choose_loop(numbers.value[kLrDecay] != 0.0, [&]<bool kFalls>() {
        const DecayedRate<kFalls> rates{numbers.value[kLr], numbers.value[kLrDecay]};
        update_each_row(AdagradKernel<kDecay, DecayedRate<kFalls>>{rates, eps, decay}, dimension, rows);
      });
    });
  }

 private:
  double lr_;
  double lr_decay_;
  double eps_;
  double weight_decay_;
  double initial_;
};

}  // namespace

std::unique_ptr<Optimizer> make_adagrad(const Settings& settings) { return std::make_unique<Adagrad>(settings); }

}  // namespace damo
