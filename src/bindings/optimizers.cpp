// SPDX-License-Identifier: Apache-2.0
//
// optimizer.h and initializer.h for the tests: one row's update and one row's
// first weights on arrays of the caller's. Training goes through Storage and
// Embedding; these functions let a test hold the arithmetic beside NumPy's.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

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

void optimizer_update(const std::string& name, const SettingsArgument& settings, double lr, uint64_t group_step,
                      uint32_t update_count, OutFloats weights, OutFloats state, Floats gradient) {
  const auto optimizer = damo::make_optimizer(name, as_settings(settings));
  damo::check_lr("optimizer_update", lr);
  if (group_step == 0 || update_count == 0) {
    throw std::invalid_argument("[optimizer_update] group_step is " + std::to_string(group_step) +
                                " and update_count is " + std::to_string(update_count) +
                                ", expected both to count this update, so at least 1");
  }
  expect_length("state", state.size(), optimizer->state_floats(weights.size()));
  expect_length("gradient", gradient.size(), weights.size());
  optimizer->update(optimizer->numbers(lr, group_step), update_count, weights.size(), weights.data(), state.data(),
                    gradient.data());
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
