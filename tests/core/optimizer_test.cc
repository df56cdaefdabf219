// SPDX-License-Identifier: Apache-2.0
#include "optimizer.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "power.h"
#include "vector_width.h"

namespace damo {
namespace {

using Floats = std::vector<float>;

struct Configuration {
  std::string name;
  Settings settings;
};

// Every optimizer, with and without what changes its loop.
std::vector<Configuration> configurations() {
  return {
      {"sgd", {}},
      {"sgd", {{"lr", 0.1}, {"weight_decay", 0.01}}},
      {"adagrad", {}},
      {"adagrad", {{"weight_decay", 0.01}, {"initial_accumulator_value", 0.1}, {"eps", 1e-6}}},
      {"adam", {}},
      {"adam", {{"weight_decay", 0.01}, {"beta1", 0.8}, {"beta2", 0.99}, {"eps", 1e-6}}},
      {"adam", {{"bias_correction", 1.0}}},
      {"adam", {{"bias_correction", 1.0}, {"weight_decay", 0.01}}},
  };
}

// A batch of rows with room around each, filled from a seed.
struct Batch {
  static constexpr float kGuard = 12345.0f;

  Batch(const Optimizer& optimizer, size_t num_rows, size_t dimension_, uint32_t seed)
      : dimension(dimension_), row_floats(dimension + optimizer.state_floats(dimension)) {
    std::mt19937 engine(seed);
    const auto draw = [&] {
      // Sizes over many powers of two, as gradients have them.
      const float magnitude = std::ldexp(1.0f + static_cast<float>(engine() % 1024) / 1024.0f, int(engine() % 20) - 16);
      return engine() % 2 == 0 ? magnitude : -magnitude;
    };
    floats.assign(num_rows * (row_floats + 2), kGuard);
    gradients.resize(num_rows * dimension);
    for (float& gradient : gradients) gradient = draw();
    for (size_t i = 0; i < num_rows; ++i) {
      float* row = floats.data() + i * (row_floats + 2) + 1;
      for (size_t j = 0; j < dimension; ++j) row[j] = draw();
      optimizer.initialize_state(dimension, row + dimension);
      for (size_t j = dimension; j < row_floats; ++j) row[j] += std::abs(draw());
      counts.push_back(i % 3 == 0 ? 1 : engine() % 40000 + 1);
    }
  }

  std::vector<RowUpdate> rows() {
    std::vector<RowUpdate> result;
    for (size_t i = 0; i < counts.size(); ++i) {
      float* row = floats.data() + i * (row_floats + 2) + 1;
      result.push_back({row, row + dimension, gradients.data() + i * dimension, counts[i]});
    }
    return result;
  }

  bool guards_stand() const {
    for (size_t i = 0; i < counts.size(); ++i) {
      const float* before = floats.data() + i * (row_floats + 2);
      if (before[0] != kGuard || before[row_floats + 1] != kGuard) return false;
    }
    return true;
  }

  size_t dimension;
  size_t row_floats;
  Floats floats;
  Floats gradients;
  std::vector<uint32_t> counts;
};

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

class LoweredWidth {
 public:
  explicit LoweredWidth(VectorWidth width) : before_(vector_width().exchange(width)) {}
  ~LoweredWidth() { vector_width() = before_; }
  LoweredWidth(const LoweredWidth&) = delete;
  LoweredWidth& operator=(const LoweredWidth&) = delete;

 private:
  VectorWidth before_;
};

TEST_CASE("every listed optimizer says its name, has an id of its own, and is found by it") {
  CHECK(optimizer_names() == std::vector<std::string>{"sgd", "adagrad", "adam"});
  std::set<uint32_t> ids;
  for (const std::string& name : optimizer_names()) {
    const auto optimizer = make_optimizer(name, {});
    CHECK(optimizer->name() == name);
    CHECK(ids.insert(optimizer->id()).second);
    CHECK(make_optimizer(optimizer->id())->name() == name);
  }
  CHECK_THROWS_AS(make_optimizer(uint32_t{4711}), CorruptionError);
}

TEST_CASE("ids on disk do not change") {
  CHECK(make_optimizer("sgd", {})->id() == 1);
  CHECK(make_optimizer("adagrad", {})->id() == 2);
  CHECK(make_optimizer("adam", {})->id() == 3);
}

TEST_CASE("state has torch's names and the documented sizes and starts") {
  CHECK(make_optimizer("sgd", {})->state().empty());
  CHECK(make_optimizer("sgd", {})->state_floats(16) == 0);
  const auto adagrad = make_optimizer("adagrad", {{"initial_accumulator_value", 0.1}});
  CHECK(adagrad->state() == std::vector<StateEntry>{{"sum", true, 0.1f}});
  Floats sums(5, -1.0f);
  adagrad->initialize_state(5, sums.data());
  CHECK(sums == Floats(5, 0.1f));
  const auto adam = make_optimizer("adam", {});
  CHECK(adam->state() == std::vector<StateEntry>{{"exp_avg", true, 0.0f}, {"exp_avg_sq", true, 0.0f}});
  CHECK(adam->state_floats(16) == 32);
}

TEST_CASE("numbers come in the documented order") {
  const auto check = [](const Optimizer& optimizer, double lr, uint64_t step, const std::vector<double>& expected) {
    const StepNumbers numbers = optimizer.numbers(lr, step);
    CHECK(std::vector<double>(numbers.value.begin(), numbers.value.begin() + numbers.count) == expected);
  };
  check(*make_optimizer("sgd", {{"weight_decay", 0.25}}), 0.5, 3, {0.5, 0.25});
  check(*make_optimizer("adagrad", {{"eps", 0.125}, {"weight_decay", 0.25}}), 0.5, 3, {0.5, 0.125, 0.25});
  Settings adam = {{"beta1", 0.5}, {"beta2", 0.75}, {"eps", 0.125}, {"weight_decay", 0.25}};
  check(*make_optimizer("adam", adam), 0.0625, 3, {0.0625, 0.5, 0.75, 0.125, 0.25, 0.0, 0.0625});
  adam["bias_correction"] = 1.0;
  check(*make_optimizer("adam", adam), 0.0625, 3,
        {0.0625, 0.5, 0.75, 0.125, 0.25, 1.0, 0.0625 * std::sqrt(1 - 0.421875) / (1 - 0.125)});
}

TEST_CASE("sgd takes one step against the gradient") {
  Floats w = {1.0f, -2.0f};
  const Floats g = {0.5f, 4.0f};
  const auto sgd = make_optimizer("sgd", {{"weight_decay", 0.5}});
  sgd->update(sgd->numbers(0.25, 1), 1, 2, w.data(), nullptr, g.data());
  CHECK(w == Floats{1.0f - 0.25f * (0.5f + 0.5f), -2.0f - 0.25f * (4.0f - 1.0f)});
}

TEST_CASE("updates are the documented float32 operations, bit for bit, at any dimension") {
  for (const Configuration& configuration : configurations()) {
    const std::string& name = configuration.name;
    const auto optimizer = make_optimizer(name, configuration.settings);
    const StepNumbers numbers = optimizer->numbers(0.05, 9);
    const auto number = [&](size_t i) { return static_cast<float>(numbers.value[i]); };
    for (size_t dimension = 1; dimension <= 70; ++dimension) {
      Batch batch(*optimizer, 5, dimension, 1000 + static_cast<uint32_t>(dimension));
      Floats expected = batch.floats;
      for (size_t row = 0; row < 5; ++row) {
        float* w = expected.data() + row * (batch.row_floats + 2) + 1;
        float* first = w + dimension;
        float* second = first + dimension;
        const float* gradient = batch.gradients.data() + row * dimension;
        for (size_t i = 0; i < dimension; ++i) {
          float g = gradient[i];
          if (name == "sgd") {
            if (number(1) != 0.0f) g = g + number(1) * w[i];
            w[i] = w[i] - number(0) * g;
          } else if (name == "adagrad") {
            if (number(2) != 0.0f) g = g + number(2) * w[i];
            first[i] = first[i] + g * g;
            w[i] = w[i] - (number(0) * g) / (std::sqrt(first[i]) + number(1));
          } else {
            const auto one_minus_beta1 = static_cast<float>(1.0 - numbers.value[1]);
            const auto one_minus_beta2 = static_cast<float>(1.0 - numbers.value[2]);
            if (number(4) != 0.0f) g = g + number(4) * w[i];
            first[i] = first[i] + one_minus_beta1 * (g - first[i]);
            if (numbers.value[5] == 1.0) {
              second[i] = second[i] + one_minus_beta2 * (g * g - second[i]);
              w[i] = w[i] - number(6) * (first[i] / (std::sqrt(second[i]) + number(3)));
            } else {
              second[i] = number(2) * second[i] + (one_minus_beta2 * g) * g;
              const BiasCorrection c = bias_correction(numbers.value[1], numbers.value[2], batch.counts[row]);
              const float rate = number(0) * c.first;
              w[i] = w[i] - (rate * first[i]) / (std::sqrt(second[i]) * c.second + number(3));
            }
          }
        }
      }
      optimizer->update_rows(numbers, dimension, batch.rows());
      CAPTURE(name);
      CAPTURE(dimension);
      CHECK(same_bits(batch.floats, expected));
      CHECK(batch.guards_stand());
    }
  }
}

TEST_CASE("every vector width gives the same bits") {
  if (vector_width().load() == VectorWidth::kBaseline) return;  // a processor without AVX2 has one width
  for (const Configuration& configuration : configurations()) {
    const std::string& name = configuration.name;
    const auto optimizer = make_optimizer(name, configuration.settings);
    for (size_t dimension = 1; dimension <= 130; ++dimension) {
      Batch wide(*optimizer, 20, dimension, static_cast<uint32_t>(dimension));
      // Ends of the float range as well: subnormals, the largest, zeros of both signs.
      const Floats special = {0.0f, -0.0f, std::numeric_limits<float>::denorm_min(), 1e-39f, -3e38f, 3e38f, 1e-20f};
      for (size_t i = 0; i < wide.gradients.size(); i += 3) wide.gradients[i] = special[i % special.size()];
      Batch narrow = wide;
      for (uint64_t step = 1; step <= 3; ++step) {
        const StepNumbers numbers = optimizer->numbers(0.05, step);
        optimizer->update_rows(numbers, dimension, wide.rows());
        const LoweredWidth lowered(VectorWidth::kBaseline);
        optimizer->update_rows(numbers, dimension, narrow.rows());
      }
      CAPTURE(name);
      CAPTURE(dimension);
      CHECK(same_bits(wide.floats, narrow.floats));
    }
  }
}

// An optimizer that brings update() alone.
class OneByOne final : public Optimizer {
 public:
  explicit OneByOne(const Optimizer& inner) : inner_(inner) {}
  std::string_view name() const noexcept override { return inner_.name(); }
  uint32_t id() const noexcept override { return inner_.id(); }
  std::vector<StateEntry> state() const override { return inner_.state(); }
  double lr() const noexcept override { return inner_.lr(); }
  StepNumbers numbers(double lr, uint64_t step) const override { return inner_.numbers(lr, step); }
  void update(const StepNumbers& numbers, uint32_t update_count, size_t dimension, float* weights, float* state,
              const float* gradient) const noexcept override {
    inner_.update(numbers, update_count, dimension, weights, state, gradient);
  }

 private:
  const Optimizer& inner_;
};

TEST_CASE("update_rows is update of each row, in an optimizer's own loop and by default") {
  for (const Configuration& configuration : configurations()) {
    const std::string& name = configuration.name;
    const auto optimizer = make_optimizer(name, configuration.settings);
    for (const size_t dimension : {1u, 8u, 10u, 16u, 33u, 64u}) {
      Batch batch(*optimizer, 50, dimension, 7);
      Batch by_default = batch;
      Batch single = batch;
      const StepNumbers numbers = optimizer->numbers(0.01, 4);
      optimizer->update_rows(numbers, dimension, batch.rows());
      OneByOne(*optimizer).update_rows(numbers, dimension, by_default.rows());
      for (const RowUpdate& row : single.rows()) {
        optimizer->update(numbers, row.update_count, dimension, row.weights, row.state, row.gradient);
      }
      CAPTURE(name);
      CHECK(same_bits(batch.floats, single.floats));
      CHECK(same_bits(by_default.floats, single.floats));
      optimizer->update_rows(numbers, dimension, {});  // an empty batch is fine
    }
  }
}

TEST_CASE("redo with an optimizer of default settings gives the bits of the one that wrote the numbers") {
  for (const Configuration& configuration : configurations()) {
    const std::string& name = configuration.name;
    const auto optimizer = make_optimizer(name, configuration.settings);
    Batch original(*optimizer, 200, 16, 11);
    Batch redone = original;
    const StepNumbers numbers = optimizer->numbers(0.02, 17);
    optimizer->update_rows(numbers, 16, original.rows());
    make_optimizer(optimizer->id())->update_rows(numbers, 16, redone.rows());
    CAPTURE(name);
    CHECK(same_bits(original.floats, redone.floats));
  }
}

TEST_CASE("a zero gradient on a fresh row changes nothing, however small eps is") {
  const std::vector<Configuration> smallest = {{"sgd", {}},
                                               {"adagrad", {{"eps", kMinNormalFloat}}},
                                               {"adam", {{"eps", kMinNormalFloat}}},
                                               {"adam", {{"eps", kMinNormalFloat}, {"bias_correction", 1.0}}}};
  for (const Configuration& configuration : smallest) {
    const auto optimizer = make_optimizer(configuration.name, configuration.settings);
    Floats row(16 + optimizer->state_floats(16), 0.5f);
    optimizer->initialize_state(16, row.data() + 16);
    const Floats before = row;
    const Floats zero(16, 0.0f);
    optimizer->update(optimizer->numbers(1.0, 1), 1, 16, row.data(), row.data() + 16, zero.data());
    CAPTURE(configuration.name);
    CHECK(row == before);
  }
}

TEST_CASE("weight decay acts without a gradient") {
  for (const std::string& name : optimizer_names()) {
    const auto optimizer = make_optimizer(name, {{"weight_decay", 0.1}});
    Floats row(8 + optimizer->state_floats(8), 0.5f);
    optimizer->initialize_state(8, row.data() + 8);
    const Floats zero(8, 0.0f);
    optimizer->update(optimizer->numbers(0.1, 1), 1, 8, row.data(), row.data() + 8, zero.data());
    CAPTURE(name);
    CHECK(row[0] < 0.5f);
  }
}

TEST_CASE("a bad setting is refused by name, with what is accepted") {
  const auto message = [](std::string_view name, const Settings& settings) {
    return message_of([&] { make_optimizer(name, settings); });
  };
  CHECK(message("adamw", {}) == "[optimizer] unknown name \"adamw\", expected one of: sgd, adagrad, adam");
  CHECK(message("adam", {{"beta3", 0.5}}) ==
        "[optimizer adam] unknown setting \"beta3\", expected one of: lr, beta1, beta2, eps, weight_decay, "
        "bias_correction");
  CHECK(message("sgd", {{"lr", -0.5}}) ==
        "[optimizer sgd] lr is -0.5, expected a number in [0, 3.4028234663852886e+38]");
  CHECK(message("adam", {{"bias_correction", 0.5}}) ==
        "[optimizer adam] bias_correction is 0.5, expected 0 (row) or 1 (global)");
  const double nan = std::nan("");
  const double infinity = std::numeric_limits<double>::infinity();
  struct Bad {
    std::string name, setting;
    std::vector<double> values;
  };
  const std::vector<Bad> all_bad = {
      {"sgd", "lr", {-1e-9, nan, infinity, 1e39}},
      {"sgd", "weight_decay", {-1.0, nan, infinity}},
      {"adagrad", "lr", {-1.0, nan}},
      {"adagrad", "eps", {0.0, -1.0, 1e-46, nan}},
      {"adagrad", "initial_accumulator_value", {-0.1, nan, infinity}},
      {"adam", "lr", {infinity}},
      {"adam", "beta1", {-0.1, 1.0, nan}},
      {"adam", "beta2", {-0.1, 1.0, 1.0 - 1e-9, nan}},
      {"adam", "eps", {0.0, nan}},
  };
  for (const Bad& bad : all_bad) {
    for (const double value : bad.values) {
      CAPTURE(value);
      CHECK(message(bad.name, {{bad.setting, value}})
                .starts_with("[optimizer " + bad.name + "] " + bad.setting + " is "));
    }
  }
}

TEST_CASE("check_lr lets rates through and refuses what is none") {
  CHECK(check_lr("apply_gradients", 0.0) == 0.0);
  CHECK(check_lr("apply_gradients", 1e-3) == 1e-3);
  CHECK(message_of([] { check_lr("apply_gradients", -1.0); }) ==
        "[apply_gradients] lr is -1, expected a number in [0, 3.4028234663852886e+38]");
  CHECK_THROWS_AS(check_lr("x", std::nan("")), std::invalid_argument);
  CHECK_THROWS_AS(check_lr("x", std::numeric_limits<double>::infinity()), std::invalid_argument);
}

}  // namespace
}  // namespace damo
