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
  std::vector<Configuration> all = {
      {"sgd", {}},
      {"adagrad", {}},
      {"adagrad", {{"lr_decay", 0.01}}},
      {"rowwise_adagrad", {}},
      {"rowwise_adagrad", {{"lr_decay", 0.01}}},
      {"adam", {}},
      {"adam", {{"bias_correction", 1.0}}},
      {"amsgrad", {}},
      {"adamw", {}},
      {"lion", {}},
      {"rmsprop", {}},
      {"ftrl", {}},
      {"ftrl", {{"lr", 0.1}, {"beta", 0.0}, {"lambda1", 0.5}, {"lambda2", 0.1}}},
  };
  for (const double nesterov : {0.0, 1.0}) all.push_back({"sgd", {{"momentum", 0.9}, {"nesterov", nesterov}}});
  all.push_back({"sgd", {{"momentum", 0.9}, {"dampening", 0.25}}});
  for (const double centered : {0.0, 1.0}) {
    all.push_back({"rmsprop", {{"momentum", 0.9}, {"centered", centered}}});
    all.push_back({"rmsprop", {{"alpha", 0.5}, {"eps", 1e-3}, {"centered", centered}}});
  }
  const size_t without_decay = all.size();
  for (size_t i = 0; i < without_decay; ++i) {
    if (all[i].name == "ftrl") continue;
    all.push_back(all[i]);
    all.back().settings["weight_decay"] = 0.01;
  }
  all.push_back({"adagrad", {{"weight_decay", 0.01}, {"initial_accumulator_value", 0.1}, {"eps", 1e-6}}});
  for (const char* name : {"adam", "amsgrad", "adamw"}) {
    all.push_back({name, {{"weight_decay", 0.01}, {"beta1", 0.8}, {"beta2", 0.99}, {"eps", 1e-6}}});
  }
  all.push_back({"lion", {{"weight_decay", 0.5}, {"beta1", 0.5}, {"beta2", 0.75}}});
  return all;
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
  CHECK(optimizer_names() == std::vector<std::string>{"sgd", "adagrad", "adam", "rowwise_adagrad", "amsgrad", "adamw",
                                                      "lion", "rmsprop", "ftrl"});
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
  CHECK(make_optimizer("rowwise_adagrad", {})->id() == 4);
  CHECK(make_optimizer("amsgrad", {})->id() == 5);
  CHECK(make_optimizer("adamw", {})->id() == 6);
  CHECK(make_optimizer("lion", {})->id() == 7);
  CHECK(make_optimizer("rmsprop", {})->id() == 8);
  CHECK(make_optimizer("ftrl", {})->id() == 9);
}

TEST_CASE("state has torch's names and the documented sizes and starts") {
  using Entries = std::vector<StateEntry>;
  const auto state = [](std::string_view name, const Settings& settings) {
    return make_optimizer(name, settings)->state();
  };
  const StateEntry buffer = {"momentum_buffer", true, 0.0f};
  const StateEntry square_avg = {"square_avg", true, 0.0f};
  const StateEntry grad_avg = {"grad_avg", true, 0.0f};
  const Entries adam = {{"exp_avg", true, 0.0f}, {"exp_avg_sq", true, 0.0f}};
  CHECK(state("sgd", {}).empty());
  CHECK(state("sgd", {{"momentum", 1e-300}}) == Entries{buffer});
  CHECK(state("adagrad", {{"initial_accumulator_value", 0.1}}) == Entries{{"sum", true, 0.1f}});
  CHECK(state("rowwise_adagrad", {{"initial_accumulator_value", 0.1}}) == Entries{{"sum", false, 0.1f}});
  CHECK(state("adam", {}) == adam);
  CHECK(state("amsgrad", {}) == Entries{adam[0], adam[1], {"max_exp_avg_sq", true, 0.0f}});
  CHECK(state("adamw", {}) == adam);
  CHECK(state("lion", {}) == Entries{adam[0]});
  CHECK(state("rmsprop", {}) == Entries{square_avg});
  CHECK(state("rmsprop", {{"momentum", 0.5}}) == Entries{square_avg, buffer});
  CHECK(state("rmsprop", {{"momentum", 0.5}, {"centered", 1.0}}) == Entries{square_avg, grad_avg, buffer});
  CHECK(state("ftrl", {}) == Entries{{"z", true, 0.0f}, {"n", true, 0.0f}});

  CHECK(make_optimizer("sgd", {})->state_floats(16) == 0);
  CHECK(make_optimizer("adam", {})->state_floats(16) == 32);
  CHECK(make_optimizer("rowwise_adagrad", {})->state_floats(16) == 1);
  const auto adagrad = make_optimizer("adagrad", {{"initial_accumulator_value", 0.1}});
  Floats sums(5, -1.0f);
  adagrad->initialize_state(5, sums.data());
  CHECK(sums == Floats(5, 0.1f));
  Floats sum(2, -1.0f);
  make_optimizer("rowwise_adagrad", {{"initial_accumulator_value", 0.1}})->initialize_state(5, sum.data());
  CHECK(sum == Floats{0.1f, -1.0f});
}

TEST_CASE("numbers come in the documented order") {
  const auto check = [](std::string_view name, const Settings& settings, double lr, uint64_t step,
                        const std::vector<double>& expected) {
    const StepNumbers numbers = make_optimizer(name, settings)->numbers(lr, step);
    CAPTURE(name);
    CHECK(std::vector<double>(numbers.value.begin(), numbers.value.begin() + numbers.count) == expected);
  };
  check("sgd", {{"weight_decay", 0.25}, {"momentum", 0.75}, {"dampening", 0.125}}, 0.5, 3,
        {0.5, 0.25, 0.75, 0.125, 0.0});
  check("sgd", {{"momentum", 0.75}, {"nesterov", 1.0}}, 0.5, 3, {0.5, 0.0, 0.75, 0.0, 1.0});
  for (const char* name : {"adagrad", "rowwise_adagrad"}) {
    check(name, {{"eps", 0.125}, {"weight_decay", 0.25}, {"lr_decay", 0.75}}, 0.5, 3, {0.5, 0.125, 0.25, 0.75});
  }
  Settings adam = {{"beta1", 0.5}, {"beta2", 0.75}, {"eps", 0.125}, {"weight_decay", 0.25}};
  check("adam", adam, 0.0625, 3, {0.0625, 0.5, 0.75, 0.125, 0.25, 0.0, 0.0625});
  for (const char* name : {"amsgrad", "adamw"}) check(name, adam, 0.0625, 3, {0.0625, 0.5, 0.75, 0.125, 0.25});
  adam["bias_correction"] = 1.0;
  check("adam", adam, 0.0625, 3, {0.0625, 0.5, 0.75, 0.125, 0.25, 1.0, 0.0625 * std::sqrt(1 - 0.421875) / (1 - 0.125)});
  check("lion", {{"beta1", 0.5}, {"beta2", 0.75}, {"weight_decay", 0.25}}, 0.0625, 3, {0.0625, 0.5, 0.75, 0.25});
  check("rmsprop", {{"alpha", 0.5}, {"eps", 0.125}, {"weight_decay", 0.25}, {"momentum", 0.75}, {"centered", 1.0}},
        0.0625, 3, {0.0625, 0.5, 0.125, 0.25, 0.75, 1.0});
  check("ftrl", {{"beta", 0.5}, {"lambda1", 0.125}, {"lambda2", 0.25}}, 0.0625, 3, {0.0625, 0.5, 0.125, 0.25});
}

TEST_CASE("numbers of a version that had fewer mean what they meant") {
  const std::vector<std::pair<Configuration, size_t>> before = {
      {{"sgd", {{"weight_decay", 0.25}}}, 2}, {{"adagrad", {{"eps", 0.125}, {"weight_decay", 0.25}}}, 3}};
  for (const auto& [configuration, count] : before) {
    const auto optimizer = make_optimizer(configuration.name, configuration.settings);
    const StepNumbers now = optimizer->numbers(0.5, 1);
    StepNumbers then;
    then.count = static_cast<uint32_t>(count);
    std::copy_n(now.value.begin(), count, then.value.begin());
    Batch batch(*optimizer, 20, 16, 3);
    Batch redone = batch;
    optimizer->update_rows(now, 16, batch.rows());
    optimizer->update_rows(then, 16, redone.rows());
    CAPTURE(configuration.name);
    CHECK(same_bits(batch.floats, redone.floats));
  }
}

TEST_CASE("sgd takes one step against the gradient") {
  Floats w = {1.0f, -2.0f};
  const Floats g = {0.5f, 4.0f};
  const auto sgd = make_optimizer("sgd", {{"weight_decay", 0.5}});
  sgd->update(sgd->numbers(0.25, 1), 1, 2, w.data(), nullptr, g.data());
  CHECK(w == Floats{1.0f - 0.25f * (0.5f + 0.5f), -2.0f - 0.25f * (4.0f - 1.0f)});
}

// The update of one row as docs/optimizers.md has it, one operation after the other.
void update_as_documented(const std::string& name, const StepNumbers& numbers, uint32_t count, size_t dimension,
                          float* w, float* state, const float* gradient) {
  const auto number = [&](size_t i) { return static_cast<float>(numbers.value[i]); };
  const auto one_minus = [&](size_t i) { return static_cast<float>(1.0 - numbers.value[i]); };
  const auto decayed = [&](float decay, size_t i) { return decay != 0.0f ? gradient[i] + decay * w[i] : gradient[i]; };
  const auto rate_of_adagrad = static_cast<float>(numbers.value[0] / (1.0 + (count - 1) * numbers.value[3]));
  float* second = state + dimension;
  float* third = second + dimension;
  if (name == "rowwise_adagrad") {
    Floats lanes(16, 0.0f);
    for (size_t i = 0; i < dimension; ++i) {
      const float g = decayed(number(2), i);
      lanes[i % 16] = lanes[i % 16] + g * g;
    }
    for (size_t half = 8; half > 0; half /= 2) {
      for (size_t j = 0; j < half; ++j) lanes[j] = lanes[j] + lanes[j + half];
    }
    state[0] = state[0] + lanes[0] / static_cast<float>(dimension);
  }
  for (size_t i = 0; i < dimension; ++i) {
    if (name == "sgd") {
      float g = decayed(number(1), i);
      if (numbers.value[2] != 0.0) {
        state[i] = number(2) * state[i] + (count == 1 ? 1.0f : one_minus(3)) * g;
        g = numbers.value[4] != 0.0 ? g + number(2) * state[i] : state[i];
      }
      w[i] = w[i] - number(0) * g;
    } else if (name == "adagrad") {
      const float g = decayed(number(2), i);
      state[i] = state[i] + g * g;
      w[i] = w[i] - (rate_of_adagrad * g) / (std::sqrt(state[i]) + number(1));
    } else if (name == "rowwise_adagrad") {
      w[i] = w[i] - (rate_of_adagrad * decayed(number(2), i)) / (std::sqrt(state[0]) + number(1));
    } else if (name == "adam" || name == "amsgrad" || name == "adamw") {
      const float g = name == "adamw" ? gradient[i] : decayed(number(4), i);
      state[i] = state[i] + one_minus(1) * (g - state[i]);
      if (name == "adam" && numbers.value[5] == 1.0) {
        second[i] = second[i] + one_minus(2) * (g * g - second[i]);
        w[i] = w[i] - number(6) * (state[i] / (std::sqrt(second[i]) + number(3)));
        continue;
      }
      second[i] = number(2) * second[i] + (one_minus(2) * g) * g;
      float root = second[i];
      if (name == "amsgrad") root = third[i] = std::max(third[i], second[i]);
      const BiasCorrection c = bias_correction(numbers.value[1], numbers.value[2], count);
      const float rate = number(0) * c.first;
      const float step = (rate * state[i]) / (std::sqrt(root) * c.second + number(3));
      if (name == "adamw") w[i] = static_cast<float>(1.0 - numbers.value[0] * numbers.value[4]) * w[i];
      w[i] = w[i] - step;
    } else if (name == "lion") {
      const float direction = number(1) * state[i] + one_minus(1) * gradient[i];
      const float sign = direction > 0.0f ? 1.0f : (direction < 0.0f ? -1.0f : 0.0f);
      state[i] = number(2) * state[i] + one_minus(2) * gradient[i];
      const auto decay = static_cast<float>(numbers.value[0] * numbers.value[3]);
      w[i] = w[i] - (number(0) * sign + decay * w[i]);
    } else if (name == "rmsprop") {
      const float g = decayed(number(3), i);
      state[i] = number(1) * state[i] + (one_minus(1) * g) * g;
      float variance = state[i];
      float* buffer = second;
      if (numbers.value[5] != 0.0) {
        second[i] = second[i] + one_minus(1) * (g - second[i]);
        variance = std::max(state[i] - second[i] * second[i], 0.0f);
        buffer = third;
      }
      const float root = std::sqrt(variance) + number(2);
      if (numbers.value[4] != 0.0) {
        buffer[i] = number(4) * buffer[i] + g / root;
        w[i] = w[i] - number(0) * buffer[i];
      } else {
        w[i] = w[i] - (number(0) * g) / root;
      }
    } else {
      REQUIRE(name == "ftrl");
      const float g = gradient[i];
      const float before = std::sqrt(second[i]);
      second[i] = second[i] + g * g;
      const float root = std::sqrt(second[i]);
      const float sigma = (root - before) * (1.0f / number(0));
      state[i] = state[i] + (g - sigma * w[i]);
      if (second[i] == 0.0f) continue;
      const float numerator = number(0) * (std::copysign(number(2), state[i]) - state[i]);
      const float divisor = (number(1) + root) + number(0) * number(3);
      w[i] = std::abs(state[i]) <= number(2) ? 0.0f : numerator / divisor;
    }
  }
}

TEST_CASE("updates are the documented float32 operations, bit for bit, at any dimension") {
  for (const Configuration& configuration : configurations()) {
    const std::string& name = configuration.name;
    const auto optimizer = make_optimizer(name, configuration.settings);
    const StepNumbers numbers = optimizer->numbers(0.05, 9);
    for (size_t dimension = 1; dimension <= 70; ++dimension) {
      Batch batch(*optimizer, 5, dimension, 1000 + static_cast<uint32_t>(dimension));
      Batch expected = batch;
      for (const RowUpdate& row : expected.rows()) {
        update_as_documented(name, numbers, row.update_count, dimension, row.weights, row.state, row.gradient);
      }
      optimizer->update_rows(numbers, dimension, batch.rows());
      CAPTURE(name);
      CAPTURE(dimension);
      CHECK(same_bits(batch.floats, expected.floats));
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
  const std::vector<Configuration> smallest = {{"sgd", {{"momentum", 0.5}}},
                                               {"adagrad", {{"eps", kMinNormalFloat}}},
                                               {"rowwise_adagrad", {{"eps", kMinNormalFloat}}},
                                               {"adam", {{"eps", kMinNormalFloat}}},
                                               {"adam", {{"eps", kMinNormalFloat}, {"bias_correction", 1.0}}},
                                               {"amsgrad", {{"eps", kMinNormalFloat}}},
                                               {"adamw", {{"eps", kMinNormalFloat}, {"weight_decay", 0.0}}},
                                               {"lion", {}},
                                               {"rmsprop", {{"eps", kMinNormalFloat}}},
                                               {"rmsprop", {{"eps", kMinNormalFloat}, {"centered", 1.0}}},
                                               {"ftrl", {{"beta", 0.0}}},
                                               {"ftrl", {{"beta", 1.0}, {"lambda1", 1.0}, {"lambda2", 1.0}}}};
  for (const Configuration& configuration : smallest) {
    const auto optimizer = make_optimizer(configuration.name, configuration.settings);
    Floats row(16 + optimizer->state_floats(16), 0.5f);
    optimizer->initialize_state(16, row.data() + 16);
    const Floats before = row;
    const Floats zero(16, 0.0f);
    optimizer->update(optimizer->numbers(100.0, 1), 1, 16, row.data(), row.data() + 16, zero.data());
    CAPTURE(configuration.name);
    CHECK(row == before);
  }
}

TEST_CASE("weight decay acts without a gradient") {
  for (const std::string& name : optimizer_names()) {
    if (name == "ftrl") continue;  // its penalties act on what gradients have added up to
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
  CHECK(message("adadelta", {}) ==
        "[optimizer] unknown name \"adadelta\", expected one of: sgd, adagrad, adam, rowwise_adagrad, amsgrad, adamw, "
        "lion, rmsprop, ftrl");
  CHECK(message("adam", {{"beta3", 0.5}}) ==
        "[optimizer adam] unknown setting \"beta3\", expected one of: lr, beta1, beta2, eps, weight_decay, "
        "bias_correction");
  CHECK(message("sgd", {{"lr", -0.5}}) ==
        "[optimizer sgd] lr is -0.5, expected a number in [0, 3.4028234663852886e+38]");
  CHECK(message("adam", {{"bias_correction", 0.5}}) ==
        "[optimizer adam] bias_correction is 0.5, expected 0 (row) or 1 (global)");
  CHECK(message("rmsprop", {{"centered", 0.5}}) == "[optimizer rmsprop] centered is 0.5, expected 0 or 1");
  CHECK(message("sgd", {{"nesterov", 1.0}}) ==
        "[optimizer sgd] nesterov is 1 with momentum 0 and dampening 0, expected momentum above 0 and dampening 0");
  CHECK(message("sgd", {{"dampening", 0.5}}) ==
        "[optimizer sgd] dampening is 0.5 with momentum 0, expected momentum above 0");
  const double nan = std::nan("");
  const double infinity = std::numeric_limits<double>::infinity();
  struct Bad {
    std::string name, setting;
    std::vector<double> values;
  };
  const std::vector<double> negative = {-1e-9, -1.0, nan, infinity, 1e39};
  const std::vector<double> not_above_0 = {0.0, -1.0, 1e-46, nan, infinity};
  const std::vector<double> not_below_1 = {-0.1, 1.0, 1.0 - 1e-9, nan};
  std::vector<Bad> all_bad = {
      {"sgd", "weight_decay", negative},
      {"sgd", "momentum", not_below_1},
      {"sgd", "dampening", {-0.1, 1.1, nan}},
      {"sgd", "nesterov", {-1.0, 0.5, 2.0, nan}},
      {"lion", "beta1", not_below_1},
      {"lion", "beta2", not_below_1},
      {"lion", "weight_decay", negative},
      {"rmsprop", "alpha", not_below_1},
      {"rmsprop", "eps", not_above_0},
      {"rmsprop", "weight_decay", negative},
      {"rmsprop", "momentum", not_below_1},
      {"rmsprop", "centered", {-1.0, 0.5, 2.0, nan}},
      {"ftrl", "beta", negative},
      {"ftrl", "lambda1", negative},
      {"ftrl", "lambda2", negative},
  };
  for (const std::string& name : optimizer_names()) all_bad.push_back({name, "lr", negative});
  for (const char* name : {"adagrad", "rowwise_adagrad"}) {
    all_bad.push_back({name, "eps", not_above_0});
    for (const char* setting : {"lr_decay", "weight_decay", "initial_accumulator_value"}) {
      all_bad.push_back({name, setting, negative});
    }
  }
  for (const char* name : {"adam", "amsgrad", "adamw"}) {
    all_bad.push_back({name, "beta1", not_below_1});
    all_bad.push_back({name, "beta2", not_below_1});
    all_bad.push_back({name, "eps", not_above_0});
    all_bad.push_back({name, "weight_decay", negative});
  }
  for (const Bad& bad : all_bad) {
    for (const double value : bad.values) {
      CAPTURE(bad.name);
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
