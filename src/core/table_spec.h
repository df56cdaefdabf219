// SPDX-License-Identifier: Apache-2.0
//
// What a group is: its number and name, dimension, optimizer and state layout, initializer, seed. Kept in
// the manifest; everything that decides how a stored row is read or how a new one starts.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "counting_bloom_filter.h"
#include "initializer.h"
#include "lifetime.h"
#include "optimizer.h"

namespace damo {

inline constexpr uint32_t kMaxDimension = 4096;
inline constexpr size_t kMaxGroupName = 255;  // bytes
inline constexpr int kNumGroups = 256;

// The filter that decides which keys get a row.
struct AdmissionSpec {
  FilterSettings filter;
  // Its file has the counts after this operation, and the log those since. 0: no file, the log has all counts.
  uint64_t saved = 0;
};

struct TableSpec {
  uint32_t group = 0;     // 0-255
  std::string name;       // empty: the group is known by its number
  uint32_t table_id = 0;  // never reused
  uint32_t dimension = 0;
  std::string optimizer;
  Settings optimizer_settings;
  std::vector<StateEntry> state;
  std::string initializer;
  Settings initializer_settings;
  uint64_t seed = 0;
  uint64_t stream = 0;  // tells this group's first weights from another's: stream_of(...)
  Lifetime lifetime;
  bool own_lifetime = false;               // given for this group; else it follows the storage's
  std::optional<AdmissionSpec> admission;  // absent: every key gets a row

  // `group "user"` or `group 7`, for messages.
  std::string label() const;
};

// The number itself, or a hash of the name: so that a named group's first weights do not depend on
// the order in which groups were made.
uint64_t stream_of(uint32_t group, std::string_view name);

// Checks what the caller gave; std::invalid_argument says what is wrong.
void check_spec(const TableSpec& spec);

// SchemaMismatchError that names the first difference a stored row would feel, and the way out.
void check_same_layout(const TableSpec& stored, const TableSpec& wanted);

// SchemaMismatchError that says which settings of the filter differ, and the way out.
void check_same_filter(const TableSpec& stored, const FilterSettings& wanted);

// A group as the loops see it.
struct TableShape {
  TableSpec spec;
  std::unique_ptr<Optimizer> optimizer;
  std::unique_ptr<Initializer> initializer;
  std::vector<StateEntry> state;  // the optimizer's, which makes them anew at each call
  size_t state_floats = 0;

  explicit TableShape(TableSpec spec);
  size_t num_floats() const noexcept { return spec.dimension + state_floats; }
  // The first weights of a row, and its first state behind them.
  void first_weights(uint64_t mixed, float* weights) const noexcept;
  void first_floats(uint64_t mixed, float* floats) const noexcept;
};

}  // namespace damo
