// SPDX-License-Identifier: Apache-2.0
#include "optimizer.h"

#include <algorithm>
#include <stdexcept>

#include "error.h"
#include "optimizers/list.h"

namespace damo {
namespace {

struct Entry {
  std::string_view name;
  std::unique_ptr<Optimizer> (*make)(const Settings&);
};

// Every optimizer there is. Names and ids are part of the persistent format: add, never change.
constexpr Entry kOptimizers[] = {
    {"sgd", make_sgd},         {"adagrad", make_adagrad},
    {"adam", make_adam},       {"rowwise_adagrad", make_rowwise_adagrad},
    {"amsgrad", make_amsgrad}, {"adamw", make_adamw},
    {"lion", make_lion},       {"rmsprop", make_rmsprop},
    {"ftrl", make_ftrl},
};

}  // namespace

void Optimizer::update_rows(const StepNumbers& numbers, size_t dimension,
                            std::span<const RowUpdate> rows) const noexcept {
  for (const RowUpdate& row : rows) {
    update(numbers, row.update_count, dimension, row.weights, row.state, row.gradient);
  }
}

size_t Optimizer::state_floats(size_t dimension) const {
  size_t floats = 0;
  for (const StateEntry& entry : state()) floats += entry.per_weight ? dimension : 1;
  return floats;
}

void Optimizer::initialize_state(size_t dimension, float* state) const { fill_state(this->state(), dimension, state); }

void fill_state(std::span<const StateEntry> entries, size_t dimension, float* state) noexcept {
  for (const StateEntry& entry : entries) state = std::fill_n(state, entry.per_weight ? dimension : 1, entry.initial);
}

double check_lr(std::string_view operation, double lr) {
  if (!(lr >= 0.0 && lr <= kMaxFloat)) {
    throw std::invalid_argument("[" + std::string(operation) + "] lr is " + format_number(lr) +
                                ", expected a number in [0, " + format_number(kMaxFloat) + "]");
  }
  return lr;
}

std::unique_ptr<Optimizer> make_optimizer(std::string_view name, const Settings& settings) {
  std::string known;
  for (const Entry& entry : kOptimizers) {
    if (entry.name == name) return entry.make(settings);
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw std::invalid_argument("[optimizer] unknown name \"" + std::string(name) + "\", expected one of: " + known);
}

std::unique_ptr<Optimizer> make_optimizer(uint32_t id) {
  for (const Entry& entry : kOptimizers) {
    auto optimizer = entry.make({});
    if (optimizer->id() == id) return optimizer;
  }
  throw CorruptionError("[optimizer] unknown optimizer id " + std::to_string(id) +
                        "; the record was written by a newer version, or is damaged");
}

std::vector<std::string> optimizer_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kOptimizers) names.emplace_back(entry.name);
  return names;
}

}  // namespace damo
