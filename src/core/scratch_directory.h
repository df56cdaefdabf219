// SPDX-License-Identifier: Apache-2.0
//
// A private directory among the system's temporary files (TMPDIR, or else /tmp), removed with everything in it. What a
// process leaves that is killed is removed by the next one that makes such a directory: each is locked as long as
// somebody uses it.
//
// Thread safety: different objects from any thread.
#pragma once

#include <filesystem>

#include "file.h"

namespace damo {

class ScratchDirectory {
 public:
  // StorageError: there is no place for temporary files, or it may not be written to.
  ScratchDirectory();
  ~ScratchDirectory();
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;

  const std::filesystem::path& path() const noexcept { return path_; }

 private:
  std::filesystem::path path_;
  FileDescriptor lock_;
};

}  // namespace damo
