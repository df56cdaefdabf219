// SPDX-License-Identifier: Apache-2.0
//
// Adagrad with one accumulator a row, the mean of the squared gradients: the form
// of torchrec.optim.RowWiseAdagrad and of FBGEMM's EXACT_ROWWISE_ADAGRAD. Mudigere
// et al.: "Software-hardware co-design for fast and scalable training of deep
// learning recommendation models", ISCA 2022.
#include <algorithm>
#include <cstring>

#include "decayed_rate.h"
#include "list.h"
#include "row_loop.h"

namespace damo {
namespace {

// numbers: 0 lr, 1 eps, 2 weight_decay, 3 lr_decay
enum Number : size_t { kLr, kEps, kWeightDecay, kLrDecay, kCount };

// Four floats, a register at every width; wider types of vectors the compiler keeps in memory.
constexpr size_t kQuad = 4;
using Quad [[gnu::vector_size(kQuad * sizeof(float))]] = float;

// `count` <= kQuad floats, then zeros.
DAMO_INLINE_IN_EVERY_WIDTH Quad load_quad(const float* from, size_t count) noexcept {
  if (count < kQuad) return Quad{from[0], count > 1 ? from[1] : 0.0f, count > 2 ? from[2] : 0.0f, 0.0f};
  Quad quad;
  std::memcpy(&quad, from, sizeof quad);
  return quad;
}

template <bool kDecay, class Rate>
struct RowwiseAdagradKernel {
  static constexpr size_t state_floats(size_t) noexcept { return 1; }
  Rate rates;
  float eps;
  float weight_decay;

  DAMO_INLINE_IN_EVERY_WIDTH Quad squares(const float* gradient, const float* w, size_t count) const noexcept {
    Quad g = load_quad(gradient, count);
    if constexpr (kDecay) g = g + weight_decay * load_quad(w, count);
    return g * g;
  }

  // The sum of the squares has one order, whatever the width of the machine's vectors: lane j of 16 adds up the
  // positions j, j + 16, j + 32, ... one after the other; then lane j takes lane j + 8, j + 4, j + 2, j + 1. Zeros
  // behind a row's end change no sum.
  DAMO_INLINE_IN_EVERY_WIDTH float sum_of_squares(const float* gradient, const float* w, size_t n) const noexcept {
    Quad lanes[4] = {};
    size_t i = 0;
    for (; i + 4 * kQuad <= n; i += 4 * kQuad) {
      for (size_t k = 0; k < 4; ++k) lanes[k] += squares(gradient + i + k * kQuad, w + i + k * kQuad, kQuad);
    }
    for (size_t k = 0; k < 4; ++k, i += kQuad) {
      if (i < n) lanes[k] += squares(gradient + i, w + i, std::min(n - i, kQuad));
    }
    const Quad sums = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
  }

  template <size_t kDimension>
  DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept {
    float* __restrict w = row.weights;
    const float* __restrict gradient = row.gradient;
    const size_t n = kDimension != 0 ? kDimension : dimension;
    const float sum = *row.state + sum_of_squares(gradient, w, n) / static_cast<float>(n);
    *row.state = sum;
    const float rate = rates.at(row.update_count);
    const float decay = weight_decay;
    const float root = __builtin_sqrtf(sum) + eps;
    DAMO_VECTORIZE_BEFORE_UNROLLING
    for (size_t i = 0; i < n; ++i) {
      const float g = kDecay ? gradient[i] + decay * w[i] : gradient[i];
      // Not rate / root once: for a gradient of 0 it could be infinity * 0.
      w[i] -= (rate * g) / root;
    }
  }
};

class RowwiseAdagrad final : public Optimizer {
 public:
  explicit RowwiseAdagrad(const Settings& settings) {
    SettingsReader reader("optimizer rowwise_adagrad", settings);
    lr_ = reader.number("lr", 1e-2, 0.0, kMaxFloat);
    lr_decay_ = reader.number("lr_decay", 0.0, 0.0, kMaxFloat);
    // Above zero as a float: a row of zero gradients on a zero sum would be 0 / 0.
    eps_ = reader.number("eps", 1e-10, kMinNormalFloat, kMaxFloat);
    weight_decay_ = reader.number("weight_decay", 0.0, 0.0, kMaxFloat);
    initial_ = reader.number("initial_accumulator_value", 0.0, 0.0, kMaxFloat);
    reader.expect_all_taken();
  }

  std::string_view name() const noexcept override { return "rowwise_adagrad"; }
  uint32_t id() const noexcept override { return 4; }
  std::vector<StateEntry> state() const override { return {{"sum", false, static_cast<float>(initial_)}}; }
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
        update_each_row(RowwiseAdagradKernel<kDecay, DecayedRate<kFalls>>{rates, eps, decay}, dimension, rows);
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

std::unique_ptr<Optimizer> make_rowwise_adagrad(const Settings& settings) {
  return std::make_unique<RowwiseAdagrad>(settings);
}

}  // namespace damo
