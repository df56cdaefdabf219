// SPDX-License-Identifier: Apache-2.0
//
// A directory that is built aside, and gets its name when it is complete.
#pragma once

#include <filesystem>
#include <string>

#include "file.h"

namespace damo {

// Removed again unless it is published. As long as it lives nobody takes it for a leftover: it is locked, and who
// removes leftovers (remove_checkpoints) holds their locks meanwhile.
class StagedDirectory {
 public:
  // Beside `wanted`, its name with `suffix`.
  StagedDirectory(const std::filesystem::path& wanted, const std::string& suffix);
  ~StagedDirectory();
  StagedDirectory(const StagedDirectory&) = delete;
  StagedDirectory& operator=(const StagedDirectory&) = delete;
  const std::filesystem::path& path() const { return staged_; }
  // The names in it are synced already: whoever wrote its last file did that. Never over anything.
  void publish(const char* operation);

 private:
  std::filesystem::path wanted_, staged_;
  FileDescriptor lock_;
  bool done_ = false;
};

}  // namespace damo
