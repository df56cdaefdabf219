// SPDX-License-Identifier: Apache-2.0
//
// The storage's directory:
//   LOCK                 held by the one writer; its text names the holder
//   CURRENT              the name of the live generation, with a checksum; replaced by rename
//   CREATING             only while a storage is being made for the first time
//   generation-NNNNNN/   MANIFEST, rocksdb/, log/: everything of one lineage, so that a restore can
//                        build a new one aside and switch by replacing CURRENT
//
// In mode commit CURRENT names the recovery point, and the process works in a generation that it does not name.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "file.h"
#include "file_lock.h"
#include "manifest.h"

namespace damo {

// The live generation of the storage at `path`. CorruptionError when CURRENT is damaged or names nothing.
std::filesystem::path live_generation(const std::filesystem::path& path);

// StorageError when something new, `wanted`, would take the place of a file of the storage, whose end that would be, or
// lie in a generation, with which it would go; or anywhere in the directory, where nothing in it may be touched.
void check_is_not_of_storage(const char* operation, const std::filesystem::path& wanted,
                             const std::filesystem::path& storage, bool nothing_in_it);

// What a generation says of itself. CorruptionError: its MANIFEST is missing, damaged or of a newer version.
Manifest manifest_of(const std::filesystem::path& generation);
// CorruptionError when the directory of the cold tier or of the log is missing: damage, never a reason to start with an
// empty one.
void check_parts(const std::filesystem::path& generation);

enum class OpenMode { kOpenOrCreate, kCreate, kOpen, kReadOnly };

class StorageDirectory {
 public:
  // Takes the lock. AlreadyOpenError names the holder; StorageError: not ours, absent (kOpen), already a
  // storage (kCreate), not a directory, not writable. A creation that was interrupted starts again.
  // kReadOnly: changes nothing and takes no lock; a checkpoint will do, too. Nor does it look whether somebody holds
  // it: a process that closes any descriptor of LOCK would give up the lock that it may have itself.
  StorageDirectory(const std::filesystem::path& path, OpenMode mode);
  StorageDirectory(const StorageDirectory&) = delete;
  StorageDirectory& operator=(const StorageDirectory&) = delete;

  const std::filesystem::path& path() const noexcept { return path_; }
  bool is_new() const noexcept { return is_new_; }  // there is no generation yet
  bool is_checkpoint() const noexcept { return is_checkpoint_; }
  // The live generation's directory. CorruptionError when CURRENT is damaged or names nothing.
  std::filesystem::path generation() const;
  // Calls build(directory) with a fresh, empty directory, syncs it, makes it the live generation, for good, and removes
  // the others but `working`. When `build` throws, nothing has changed. When what follows throws, either may be live.
  void replace_generation(const std::function<void(const std::filesystem::path&)>& build,
                          const std::filesystem::path& working = {});
  // Generations that are not live: left by a restore that was interrupted, or by a process in mode commit.
  void remove_stale_generations();

  // Whether the path still leads to the directory that is locked.
  bool is_in_place() const noexcept { return lock_ && lock_->is_in_place(); }
  // Gives the lock up. Idempotent.
  void unlock() noexcept { lock_.reset(); }

 private:
  void remove_generations_but(const std::filesystem::path& live, const std::filesystem::path& working) noexcept;

  std::filesystem::path path_;
  std::optional<FileLock> lock_;
  bool is_new_ = false;
  bool is_checkpoint_ = false;
};

}  // namespace damo
