// SPDX-License-Identifier: Apache-2.0
//
// optimizer.h and initializer.h on arrays of the caller's: one row's update and one row's first weights. For the tests,
// which hold the arithmetic beside NumPy's, and for who keeps a row in an array; training goes through Storage and
// Embedding.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>

#include "initializer.h"
#include "optimizer.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutFloats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using SettingsArgument = std::map<std::string, double>;

damo::Settings as_settings(const SettingsArgument& settings) { return {settings.begin(), settings.end()}; }

void expect_length(const char* argument, size_t length, size_t expected) {
  if (length == expected) return;
  throw std::invalid_argument(std::string("[optimizer_update] ") + argument + " has " + std::to_string(length) +
                              " floats, expected " + std::to_string(expected));
}

void expect_apart(const char* what, const float* a, size_t a_length, const float* b, size_t b_length) {
  if (a_length == 0 || b_length == 0 || a + a_length <= b || b + b_length <= a) return;
  throw std::invalid_argument(std::string("[optimizer_update] ") + what + " share memory, expected arrays apart");
}

// Kept for many updates: making an optimizer may cost more than a thousand of them (Adam tabulates its corrections).
class RowOptimizer {
 public:
  RowOptimizer(const std::string& name, const SettingsArgument& settings)
      : optimizer_(damo::make_optimizer(name, as_settings(settings))) {}

  size_t state_floats(size_t dimension) const { return optimizer_->state_floats(dimension); }

  void start(size_t dimension, OutFloats state) const {
    expect_length("state", state.size(), state_floats(dimension));
    optimizer_->initialize_state(dimension, state.data());
  }

  void update(double lr, uint64_t group_step, uint32_t update_count, OutFloats weights, OutFloats state,
              Floats gradient) const {
    damo::check_lr("optimizer_update", lr);
    if (group_step == 0 || update_count == 0) {
      throw std::invalid_argument("[optimizer_update] group_step is " + std::to_string(group_step) +
                                  " and update_count is " + std::to_string(update_count) +
                                  ", expected both to count this update, so at least 1");
    }
    expect_length("state", state.size(), state_floats(weights.size()));
    expect_length("gradient", gradient.size(), weights.size());
    expect_apart("weights and gradient", weights.data(), weights.size(), gradient.data(), gradient.size());
    expect_apart("weights and state", weights.data(), weights.size(), state.data(), state.size());
    expect_apart("state and gradient", state.data(), state.size(), gradient.data(), gradient.size());
    optimizer_->update(optimizer_->numbers(lr, group_step), update_count, weights.size(), weights.data(), state.data(),
                       gradient.data());
  }

 private:
  std::unique_ptr<damo::Optimizer> optimizer_;
};

void optimizer_update(const std::string& name, const SettingsArgument& settings, double lr, uint64_t group_step,
                      uint32_t update_count, OutFloats weights, OutFloats state, Floats gradient) {
  RowOptimizer(name, settings).update(lr, group_step, update_count, weights, state, gradient);
}

void initializer_fill(const std::string& name, const SettingsArgument& settings, uint64_t seed, uint64_t stream,
                      uint64_t key, OutFloats out) {
  damo::make_initializer(name, as_settings(settings))->fill(seed, stream, key, {out.data(), out.size()});
}

std::vector<std::tuple<std::string, bool, float>> optimizer_state(const std::string& name,
                                                                  const SettingsArgument& settings) {
  std::vector<std::tuple<std::string, bool, float>> entries;
  for (const damo::StateEntry& entry : damo::make_optimizer(name, as_settings(settings))->state()) {
    entries.emplace_back(entry.name, entry.per_weight, entry.initial);
  }
  return entries;
}

}  // namespace

void bind_optimizers(nb::module_& m) {
  nb::class_<RowOptimizer>(m, "RowOptimizer", "An optimizer for rows in arrays.")
      .def(nb::init<const std::string&, const SettingsArgument&>(), "name"_a, "settings"_a)
      .def("state_floats", &RowOptimizer::state_floats, "dimension"_a, "Floats of state of a row.")
      .def("start", &RowOptimizer::start, "dimension"_a, "state"_a.noconvert(), "Fills a new row's state.")
      .def("update", &RowOptimizer::update, "lr"_a, "group_step"_a, "update_count"_a, "weights"_a.noconvert(),
           "state"_a.noconvert(), "gradient"_a.noconvert(),
           "One update of one row in place; both counts are 1 for the first.");
  m.def("optimizer_update", &optimizer_update, "name"_a, "settings"_a, "lr"_a, "group_step"_a, "update_count"_a,
        "weights"_a.noconvert(), "state"_a.noconvert(), "gradient"_a.noconvert(),
        "One update of one row in place; state holds the entries of optimizer_state one after the other.");
  m.def("optimizer_state", &optimizer_state, "name"_a, "settings"_a,
        "The blocks of a row's state in order: (name, whether it is per weight, initial value).");
  m.def("optimizer_names", &damo::optimizer_names, "Every optimizer of the core.");
  m.def("initializer_fill", &initializer_fill, "name"_a, "settings"_a, "seed"_a, "stream"_a, "key"_a,
        "out"_a.noconvert(), "Fills a row's first weights.");
  m.def("initializer_names", &damo::initializer_names, "Every initializer of the core.");
}
