// SPDX-License-Identifier: Apache-2.0
//
// Lets chosen system calls of this test program fail: system_faults.cc defines pwritev, fdatasync, fsync and ftruncate
// in front of the C library's. Without a fault set they are the system's.
//
// Thread safety: set and clear faults while no other thread makes these calls.
#pragma once

#include <atomic>
#include <cstddef>

namespace damo::testing {

struct SystemFaults {
  std::atomic<int> pwritev_error{0};          // errno of every pwritev, or 0
  std::atomic<size_t> pwritev_limit{0};       // a pwritev writes at most this many bytes; 0: all
  std::atomic<int> pwritev_error_after{0};    // errno of the call after one that pwritev_limit made short
  std::atomic<int> pwritev_interruptions{0};  // so many calls fail with EINTR first
  std::atomic<int> fdatasync_error{0};
  std::atomic<int> fdatasync_milliseconds{0};  // how long a good one takes in addition
  std::atomic<int> fdatasync_calls{0};         // counted
  std::atomic<int> fsync_directory_error{0};   // errno of fsync on directories only
  std::atomic<int> ftruncate_error{0};
  std::atomic<bool> skip_syncs{false};  // fsync and fdatasync do nothing: for tests of very many files

  void clear();
};

inline SystemFaults system_faults;

// Clears all faults at the start and at the end of a test.
struct FaultScope {
  FaultScope() { system_faults.clear(); }
  ~FaultScope() { system_faults.clear(); }
};

}  // namespace damo::testing
