// SPDX-License-Identifier: Apache-2.0
#include "list.h"
#include "row_loop.h"

namespace damo {
namespace {

// numbers: 0 lr, 1 weight_decay
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

class Sgd final : public Optimizer {
 public:
  explicit Sgd(const Settings& settings) {
    SettingsReader reader("optimizer sgd", settings);
    lr_ = reader.number("lr", 1e-3, 0.0, kMaxFloat);
    weight_decay_ = reader.number("weight_decay", 0.0, 0.0, kMaxFloat);
    reader.expect_all_taken();
  }

  std::string_view name() const noexcept override { return "sgd"; }
  uint32_t id() const noexcept override { return 1; }
  std::vector<StateEntry> state() const override { return {}; }
  double lr() const noexcept override { return lr_; }

  StepNumbers numbers(double lr, uint64_t) const override { return {2, {lr, weight_decay_}}; }

  void update(const StepNumbers& numbers, uint32_t update_count, size_t dimension, float* weights, float* state,
              const float* gradient) const noexcept override {
    const RowUpdate row{weights, state, gradient, update_count};
    update_rows(numbers, dimension, {&row, 1});
  }

  void update_rows(const StepNumbers& numbers, size_t dimension,
                   std::span<const RowUpdate> rows) const noexcept override {
    const auto lr = static_cast<float>(numbers.value[0]);
    const auto decay = static_cast<float>(numbers.value[1]);
    if (decay != 0.0f) {
      update_each_row(SgdKernel<true>{lr, decay}, dimension, rows);
    } else {
      update_each_row(SgdKernel<false>{lr, decay}, dimension, rows);
    }
  }

 private:
  double lr_;
  double weight_decay_;
};

}  // namespace

std::unique_ptr<Optimizer> make_sgd(const Settings& settings) { return std::make_unique<Sgd>(settings); }

}  // namespace damo
