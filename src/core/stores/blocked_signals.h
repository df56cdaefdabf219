// SPDX-License-Identifier: Apache-2.0
//
// While it lives, the calling thread takes no signals; threads started
// meanwhile inherit that and never do. So Ctrl-C always reaches Python's main
// thread and interrupts no read of ours.
//
// Signals a thread raises by its own fault stay as they are: blocking SIGSEGV
// would take the traceback away from faulthandler and the sanitizers.
#pragma once

#include <signal.h>

namespace damo {

class BlockedSignals {
 public:
  BlockedSignals() noexcept {
    sigset_t blocked;
    sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) sigdelset(&blocked, fault);
    pthread_sigmask(SIG_SETMASK, &blocked, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;

 private:
  sigset_t before_;
};

}  // namespace damo
