// SPDX-License-Identifier: Apache-2.0
#include "staged_directory.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>

#include "error.h"

namespace damo {

StagedDirectory::StagedDirectory(const std::filesystem::path& wanted, const std::string& suffix)
    : wanted_(wanted), staged_(wanted) {
  staged_ += suffix;
  try_to_remove_tree(staged_);
  while (true) {
    make_directory(staged_);
    try {
      lock_ = FileDescriptor("lock", staged_, O_RDONLY | O_DIRECTORY);
    } catch (const MissingFileError&) {
      continue;  // taken for a leftover before it was locked
    }
    // Who removes it has the lock: then it is waited for. A system that has no such locks is no reason to stop: there a
    // leftover is not told from what is being built, and stays.
    (void)::flock(lock_.get(), LOCK_EX);
    struct stat there {};
    struct stat ours {};
    if (::stat(staged_.c_str(), &there) == 0 && ::fstat(lock_.get(), &ours) == 0 && there.st_ino == ours.st_ino) return;
  }
}

StagedDirectory::~StagedDirectory() {
  if (!done_) try_to_remove_tree(staged_);
}

void StagedDirectory::publish(const char* operation) {
  if (renameat2(AT_FDCWD, staged_.c_str(), AT_FDCWD, wanted_.c_str(), RENAME_NOREPLACE) != 0)
    throw_system_error(operation, wanted_);
  done_ = true;
  fsync_directory(wanted_.parent_path());
}

}  // namespace damo
