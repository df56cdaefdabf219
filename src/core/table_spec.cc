// SPDX-License-Identifier: Apache-2.0
#include "table_spec.h"

#include <cstdio>
#include <stdexcept>

#include "error.h"
#include "format.h"
#include "settings.h"

namespace damo {
namespace {

std::string show(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

std::string show(const Settings& settings) {
  std::string text;
  for (const auto& [name, value] : settings) text += (text.empty() ? "" : ", ") + name + "=" + show(value);
  return "(" + text + ")";
}

std::string show(const std::vector<StateEntry>& state) {
  std::string text;
  for (const StateEntry& entry : state)
    text += (text.empty() ? "" : ", ") + entry.name + (entry.per_weight ? "" : " (one a row)") +
            (entry.initial != 0.0f ? " starting at " + show(static_cast<double>(entry.initial)) : "");
  return "[" + text + "]";
}

}  // namespace

std::string TableSpec::label() const {
  return name.empty() ? "group " + std::to_string(group) : "group \"" + name + "\"";
}

uint64_t stream_of(uint32_t group, std::string_view name) {
  // The top bit keeps names and numbers apart.
  return name.empty() ? group : checksum64(std::as_bytes(std::span(name))) | uint64_t{1} << 63;
}

void check_spec(const TableSpec& spec) {
  if (spec.dimension < 1 || spec.dimension > kMaxDimension)
    throw std::invalid_argument("[embedding] dimension is " + std::to_string(spec.dimension) + ", expected 1 to " +
                                std::to_string(kMaxDimension));
  if (spec.name.size() > kMaxGroupName)
    throw std::invalid_argument("[embedding] the group's name has " + std::to_string(spec.name.size()) +
                                " bytes, expected at most " + std::to_string(kMaxGroupName));
  if (spec.group >= kNumGroups)
    throw std::invalid_argument("[embedding] group is " + std::to_string(spec.group) + ", expected 0 to 255 or a name");
}

void check_same_layout(const TableSpec& stored, const TableSpec& wanted) {
  const auto differ = [&](const std::string& what, const std::string& is, const std::string& came,
                          const std::string& way_out) {
    throw SchemaMismatchError("[embedding] " + stored.label() + " is stored with " + what + " " + is +
                              ", opened with " + came + ": " + way_out);
  };
  const std::string other = "open it with what it is stored with, or give another group";
  if (stored.name != wanted.name)
    differ("the name", stored.name.empty() ? "(none)" : '"' + stored.name + '"',
           wanted.name.empty() ? "its number " + std::to_string(wanted.group) : '"' + wanted.name + '"',
           stored.name.empty() ? "open it by its number" : "open it by its name");
  if (stored.dimension != wanted.dimension)
    differ("dimension", std::to_string(stored.dimension), std::to_string(wanted.dimension), other);
  if (stored.optimizer != wanted.optimizer) differ("optimizer", stored.optimizer, wanted.optimizer, other);
  if (stored.state != wanted.state) differ("optimizer state", show(stored.state), show(wanted.state), other);
  if (stored.initializer != wanted.initializer || stored.initializer_settings != wanted.initializer_settings)
    differ("initializer", stored.initializer + show(stored.initializer_settings),
           wanted.initializer + show(wanted.initializer_settings), other);
  if (stored.seed != wanted.seed) differ("seed", std::to_string(stored.seed), std::to_string(wanted.seed), other);
}

void check_same_filter(const TableSpec& stored, const FilterSettings& wanted) {
  const FilterSettings& is = stored.admission->filter;
  std::string differences;
  const auto compare = [&](const char* name, const std::string& a, const std::string& b) {
    if (a == b) return;
    differences += (differences.empty() ? "" : ", ") + std::string(name) + "=" + a + " (opened with " + b + ")";
  };
  const auto halving = [](uint64_t every) { return every == 0 ? std::string("None") : std::to_string(every); };
  compare("capacity", std::to_string(is.capacity), std::to_string(wanted.capacity));
  compare("count", std::to_string(is.count), std::to_string(wanted.count));
  compare("fpr", format_number(is.fpr), format_number(wanted.fpr));
  compare("halve_every", halving(is.halve_every), halving(wanted.halve_every));
  if (differences.empty()) return;
  throw SchemaMismatchError("[embedding] " + stored.label() + " is stored with an admission filter of " + differences +
                            ": give its settings, or leave admission out to go on with it; to count anew with others,"
                            " open the group once with admission=\"all\", which drops the filter");
}

TableShape::TableShape(TableSpec given)
    : spec(std::move(given)),
      optimizer(make_optimizer(spec.optimizer, spec.optimizer_settings)),
      initializer(make_initializer(spec.initializer, spec.initializer_settings)),
      state(optimizer->state()),
      state_floats(optimizer->state_floats(spec.dimension)) {}

void TableShape::first_weights(uint64_t mixed, float* weights) const noexcept {
  initializer->fill(spec.seed, spec.stream, unmix_key(mixed), {weights, spec.dimension});
}

void TableShape::first_floats(uint64_t mixed, float* floats) const noexcept {
  first_weights(mixed, floats);
  fill_state(state, spec.dimension, floats + spec.dimension);
}

}  // namespace damo
