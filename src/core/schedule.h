// SPDX-License-Identifier: Apache-2.0
//
// A learning rate as a function of a group's step: doubles in, a double out. No key, no clock, no state, so it is
// tested by arithmetic. `step` is the number of updates applied to the group before the one that asks, so 0 for its
// first, as TensorFlow and torch.optim.lr_scheduler count.
//
// With r = lr, s = step, S = decay_steps and m = min(s, S); the six decays are those of tf.compat.v1.train, without
// staircase and cycle:
//   constant                   r
//   exponential_decay          r * decay_rate^(s / S)
//   polynomial_decay           (r - end_lr) * (1 - m / S)^power + end_lr
//   natural_exponential_decay  r * e^(-decay_rate * s / S)
//   inverse_time_decay         r / (1 + decay_rate * s / S)
//   cosine_decay               r * (1 + cos(pi * m / S)) / 2
//   linear_cosine_decay        r * ((alpha + 1 - m / S) * (1 + cos(2 * pi * num_periods * m / S)) / 2 + beta)
//   linear_warmup              start_lr + (then(0) - start_lr) * s / warmup_steps while s < warmup_steps,
//                              then(s - warmup_steps) from there on: what follows begins at its own step 0
//
// pow, exp and cos are libm's, whose last bit differs between versions. That harms nothing: the log keeps the rate of
// every update, so redo never asks again.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "settings.h"

namespace damo {

// Thread safety: rate() from any thread.
class Schedule {
 public:
  virtual ~Schedule() = default;
  // Whoever asks checks what comes: growth may reach infinity, and a caller's function may return anything or throw.
  virtual double rate(uint64_t step) const = 0;
};

// As make_optimizer: checks every setting, std::invalid_argument names what is wrong. `then` is what follows a
// linear_warmup, and null for all others.
std::shared_ptr<const Schedule> make_schedule(std::string_view name, const Settings& settings,
                                              std::shared_ptr<const Schedule> then = nullptr);
std::vector<std::string> schedule_names();

}  // namespace damo
