// SPDX-License-Identifier: Apache-2.0
//
// The contract of an optimizer: how many floats of state a row has, how they
// start, and one row's update. Floats in, floats out: no key, no clock, no
// randomness, no I/O, so it is tested by arithmetic.
//
// Thread safety: all methods are const and may run on many threads at once.
// Determinism: the same inputs give the same bits on every x86-64 machine,
// whatever its vector width: elementwise IEEE operations in a fixed order, no
// contraction into fused multiply-add, powers from power.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "format.h"    // StepNumbers
#include "settings.h"  // Settings

namespace damo {

// One block of a row's state, as the manifest keeps it. Reopening compares these.
struct StateEntry {
  std::string name;        // torch.optim's word: exp_avg, exp_avg_sq, sum
  bool per_weight = true;  // `dimension` floats, or one float a row
  float initial = 0.0f;
  bool operator==(const StateEntry&) const = default;
};

// One row of a batch, where it lies. Rows do not overlap, and no row appears twice.
struct RowUpdate {
  float* weights = nullptr;         // dimension floats
  float* state = nullptr;           // state_floats(dimension) floats; unused when that is 0
  const float* gradient = nullptr;  // dimension floats
  uint32_t update_count = 0;        // counts this update
};

class Optimizer {
 public:
  virtual ~Optimizer() = default;

  virtual std::string_view name() const noexcept = 0;             // "adam"; part of the persistent format
  virtual uint32_t id() const noexcept = 0;                       // part of the persistent format (log records)
  virtual uint32_t kernel_version() const noexcept { return 1; }  // raised when the arithmetic changes
  virtual std::vector<StateEntry> state() const = 0;
  virtual double lr() const noexcept = 0;

  // Every number the update needs for a step at rate `lr`, `group_step` being the group's number of
  // apply_gradients calls including this one. Logged; update() reads nothing else that could change.
  virtual StepNumbers numbers(double lr, uint64_t group_step) const = 0;

  // One update of one row, in place. `update_count` counts this update (1 for a row's first).
  // `weights` and `gradient` have `dimension` floats, `state` state_floats(dimension) floats, entry after entry.
  // Works for the numbers of any optimizer of the same name (redo of older settings).
  virtual void update(const StepNumbers& numbers, uint32_t update_count, size_t dimension, float* weights, float* state,
                      const float* gradient) const noexcept = 0;

  // The same as update() for each row in turn, bit for bit, without its cost per call: constants are prepared
  // once, the loops stay in registers, and rows a few places ahead are prefetched. The way to update a batch.
  virtual void update_rows(const StepNumbers& numbers, size_t dimension,
                           std::span<const RowUpdate> rows) const noexcept;

  size_t state_floats(size_t dimension) const;
  void initialize_state(size_t dimension, float* state) const;
};

// Of a row that was never updated: each entry's floats, one after the other.
void fill_state(std::span<const StateEntry> entries, size_t dimension, float* state) noexcept;

// What every rate must be, at construction and per step: finite, at least 0, no larger than a float.
// std::invalid_argument with `operation` in brackets otherwise. Returns `lr`.
double check_lr(std::string_view operation, double lr);

// Checks every setting: std::invalid_argument names the unknown, missing or out-of-range one and what is
// accepted. A name not given takes its default.
std::unique_ptr<Optimizer> make_optimizer(std::string_view name, const Settings& settings);
std::unique_ptr<Optimizer> make_optimizer(uint32_t id);  // default settings, for redo; CorruptionError if unknown
std::vector<std::string> optimizer_names();

}  // namespace damo
