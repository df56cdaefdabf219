// SPDX-License-Identifier: Apache-2.0
//
// A schedule as Python holds it.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "schedule.h"

namespace damo::bindings {

// The one reference to a function of Python's that a schedule has. Let go of with the interpreter lock, by whoever is
// last, on whatever thread; not at all once the interpreter is gone.
struct Function {
  explicit Function(nanobind::object given) : object(std::move(given)) {}
  ~Function() {
    if (!nanobind::is_alive()) {
      (void)object.release();
      return;
    }
    const nanobind::gil_scoped_acquire held;
    object.reset();
  }
  Function(const Function&) = delete;
  Function& operator=(const Function&) = delete;
  nanobind::object object;
};

struct Rate {
  std::shared_ptr<const Schedule> schedule;
  std::shared_ptr<Function> function;  // the one in it, or null
};

}  // namespace damo::bindings
