// SPDX-License-Identifier: Apache-2.0
//
// The interpreter lock, given up for the time of a call.
#pragma once

#include <nanobind/nanobind.h>
#include <unistd.h>

namespace damo::bindings {

// A daemon thread that comes out of a call when the interpreter has gone: before 3.14 Python ends it with pthread_exit,
// which unwinds the stack, and the first destructor there that may not throw would end the process with SIGABRT. So
// such a thread stays where it is until the process has ended, as Python itself has it since 3.14.
struct StayWhenUnwound {
  ~StayWhenUnwound() {
    while (!came_back) ::pause();
  }
  bool came_back = false;
};

// Not inlined: the unwinder must find it before it finds a destructor.
[[gnu::noinline]] inline void take_gil(PyThreadState* state) {
  StayWhenUnwound here;
  PyEval_RestoreThread(state);
  here.came_back = true;
}

class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() { take_gil(state_); }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace damo::bindings
