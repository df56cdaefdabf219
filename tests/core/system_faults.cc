// SPDX-License-Identifier: Apache-2.0
#include "system_faults.h"

#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>
#include <vector>

using damo::testing::system_faults;

namespace damo::testing {

void SystemFaults::clear() {
  pwritev_error = 0;
  pwritev_limit = 0;
  pwritev_error_after = 0;
  pwritev_interruptions = 0;
  fdatasync_error = 0;
  fdatasync_milliseconds = 0;
  fdatasync_calls = 0;
  fsync_directory_error = 0;
  ftruncate_error = 0;
  skip_syncs = false;
}

}  // namespace damo::testing

namespace {

int refuse(int error) {
  errno = error;
  return -1;
}

}  // namespace

// The linker takes these before the C library's. syscall() reaches the system directly.
extern "C" {

ssize_t pwritev(int fd, const iovec* pieces, int count, off_t offset) {
  if (system_faults.pwritev_error != 0) return refuse(system_faults.pwritev_error);
  if (system_faults.pwritev_interruptions > 0) {
    --system_faults.pwritev_interruptions;
    return refuse(EINTR);
  }
  std::vector<iovec> taken(pieces, pieces + count);
  if (size_t left = system_faults.pwritev_limit; left != 0) {
    for (iovec& piece : taken) {
      piece.iov_len = std::min(piece.iov_len, left);
      left -= piece.iov_len;
    }
    if (system_faults.pwritev_error_after != 0) system_faults.pwritev_error = system_faults.pwritev_error_after.load();
  }
  return ::syscall(SYS_pwritev, fd, taken.data(), count, offset, 0);
}

int fdatasync(int fd) {
  ++system_faults.fdatasync_calls;
  if (system_faults.fdatasync_error != 0) return refuse(system_faults.fdatasync_error);
  if (const int pause = system_faults.fdatasync_milliseconds; pause != 0)
    std::this_thread::sleep_for(std::chrono::milliseconds(pause));
  return system_faults.skip_syncs ? 0 : static_cast<int>(::syscall(SYS_fdatasync, fd));
}

int fsync(int fd) {
  struct stat info {};
  if (system_faults.fsync_directory_error != 0 && ::fstat(fd, &info) == 0 && S_ISDIR(info.st_mode))
    return refuse(system_faults.fsync_directory_error);
  return system_faults.skip_syncs ? 0 : static_cast<int>(::syscall(SYS_fsync, fd));
}

int ftruncate(int fd, off_t length) noexcept {
  if (system_faults.ftruncate_error != 0) return refuse(system_faults.ftruncate_error);
  return static_cast<int>(::syscall(SYS_ftruncate, fd, length));
}

}  // extern "C"
