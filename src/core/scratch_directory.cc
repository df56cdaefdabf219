// SPDX-License-Identifier: Apache-2.0
#include "scratch_directory.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>

#include "error.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kScratchPrefix = "damo-scratch-";

[[noreturn]] void refuse(const fs::path& place, int error) {
  throw StorageError("[scratch] " + place.string() + ": " + std::strerror(error) +
                     ": rows that do not fit into memory need a directory for temporary files; name one that may be"
                     " written to with TMPDIR, or give more memory");
}

fs::path place_for_temporary_files() {
  std::error_code error;
  const fs::path place = fs::temp_directory_path(error);
  if (error) {
    const char* named = std::getenv("TMPDIR");
    refuse(named != nullptr ? named : "/tmp", error.value());
  }
  return place;
}

// A system that has no such locks keeps nobody from working: there leftovers stay.
bool somebody_has(const FileDescriptor& directory) { return ::flock(directory.get(), LOCK_EX | LOCK_NB) != 0; }

void remove_leftovers(const fs::path& place) {
  std::vector<fs::path> entries;
  try {
    entries = list_directory("scratch", place);
  } catch (const Error&) {
    return;  // where names cannot be read, there may be leftovers
  }
  for (const fs::path& path : entries) {
    if (!path.filename().string().starts_with(kScratchPrefix)) continue;
    try {
      const FileDescriptor directory("scratch", path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
      struct stat info {};
      if (::fstat(directory.get(), &info) != 0 || info.st_uid != ::geteuid() || somebody_has(directory)) continue;
      try_to_remove_tree(path);
    } catch (const Error&) {
      // Not ours to look into, or gone already.
    }
  }
}

}  // namespace

ScratchDirectory::ScratchDirectory() {
  const fs::path place = place_for_temporary_files();
  remove_leftovers(place);
  while (true) {
    std::string name = (place / (std::string(kScratchPrefix) + "XXXXXX")).string();
    if (::mkdtemp(name.data()) == nullptr) refuse(place, errno);
    path_ = name;
    try {
      lock_ = FileDescriptor("scratch", path_, O_RDONLY | O_DIRECTORY);
    } catch (const MissingFileError&) {
      continue;  // another process took it for a leftover before it was locked
    }
    struct stat there {};
    if (::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) continue;
    if (::stat(path_.c_str(), &there) == 0) return;
  }
}

ScratchDirectory::~ScratchDirectory() { try_to_remove_tree(path_); }

}  // namespace damo
