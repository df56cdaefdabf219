// SPDX-License-Identifier: Apache-2.0
//
// One writer: a lock on a file made for it, whose text names the holder for the error of the second one. The lock is
// the process's own (fcntl): it goes when the process goes, however that ends, and a forked child does not hold it.
// The file is not removed.
//
// Thread safety: locks of different files from any thread; one object from one thread at a time.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <tuple>

#include "file.h"

namespace damo {

class FileLock {
 public:
  // How messages speak of what is locked.
  struct Words {
    std::string shown;   // "/data/ctr.damo"
    std::string handle;  // "Storage": what has it open
    std::string place;   // "directory": what else could be opened
  };

  // Takes the lock; `file` is made if it is absent. AlreadyOpenError names the holder, also when it is this process.
  FileLock(const std::filesystem::path& file, const Words& words);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

  // Whether its path still leads to the file that is locked. If not, somebody has removed or replaced it, and may hold
  // a lock of the same name.
  bool is_in_place() const noexcept;

  // Gives the lock up. Idempotent; nothing in a forked child.
  void unlock() noexcept;

 private:
  // Process, then the directory's device and inode, then the file's name: the same for every path that leads to it,
  // and also when somebody has removed the file.
  using Holding = std::tuple<pid_t, uint64_t, uint64_t, std::string>;
  struct Held;
  static Held& held();

  Holding holding_;
  FileDescriptor file_;
  uint64_t device_ = 0, inode_ = 0;
};

}  // namespace damo
