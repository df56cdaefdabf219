// SPDX-License-Identifier: Apache-2.0
//
// How a forked child ends. RocksDB has one thread for its timers, for all the stores of a process, and joins it when
// the process exits. A child has no such thread, and when it has threads of its own, they may have its stack: the join
// would end in SIGSEGV. So a child that inherits an open store leaves without the exit handlers of libraries, as the
// children of Python's multiprocessing do. What stdio has buffered is written before.
#pragma once

namespace damo {

// For as long as a store is open. Thread-safe.
class ForkedExit {
 public:
  ForkedExit();
  ~ForkedExit();
  ForkedExit(const ForkedExit&) = delete;
  ForkedExit& operator=(const ForkedExit&) = delete;
};

}  // namespace damo
