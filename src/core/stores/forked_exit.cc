// SPDX-License-Identifier: Apache-2.0
#include "forked_exit.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

namespace damo {
namespace {

std::atomic<int> open_stores{0};

void leave(int status, void*) {
  ::fflush(nullptr);
  ::_exit(status);
}

// Registered in the child, and so called before all that was registered earlier.
void in_child() {
  if (open_stores.load() > 0) ::on_exit(leave, nullptr);
}

}  // namespace

ForkedExit::ForkedExit() {
  static std::once_flag once;
  std::call_once(once, [] { (void)::pthread_atfork(nullptr, nullptr, in_child); });
  ++open_stores;
}

ForkedExit::~ForkedExit() { --open_stores; }

}  // namespace damo
