// SPDX-License-Identifier: Apache-2.0
//
// The few calls to the operating system that decide whether a file is there
// after power loss. Whoever writes a file of ours uses these: write, sync,
// rename, sync the directory.
//
// Errors: StorageError with the operation in brackets, the path and what the
// system said; MissingFileError when the file (or a directory above it) does
// not exist. Interrupted calls are repeated.
//
// Thread safety: no state; two writers of one path at once are the caller's mistake.
#pragma once

#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"
#include "format.h"

namespace damo {

// A file that does not exist, apart from one that cannot be read.
class MissingFileError : public StorageError {
 public:
  using StorageError::StorageError;
};

// Throws StorageError (MissingFileError for ENOENT and ENOTDIR): "[operation] path: strerror(error)".
[[noreturn]] void throw_system_error(std::string_view operation, const std::filesystem::path& path, int error = errno);

// An open file, closed by the destructor. Every descriptor is close-on-exec.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  // open(2) with O_CLOEXEC added.
  FileDescriptor(std::string_view operation, const std::filesystem::path& path, int flags, unsigned mode = 0644);
  FileDescriptor(FileDescriptor&& other) noexcept;
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor();

  int get() const noexcept { return fd_; }
  bool is_open() const noexcept { return fd_ >= 0; }
  const std::filesystem::path& path() const noexcept { return path_; }

  uint64_t bytes() const;                            // the file's length
  void write(Bytes data) const;                      // all of it, at the file's position
  void write_at(Bytes data, uint64_t offset) const;  // all of it
  // Fills `data` from `offset`; returns fewer bytes only at the end of the file.
  size_t read_at(std::span<std::byte> data, uint64_t offset) const;
  void sync() const;  // fsync: bytes and length
  // The bytes from `begin` to `end` as they are. After a failed sync the kernel may hold pages that never reached the
  // disk and call them clean, so that a sync would not write them; this makes them dirty.
  void write_again(uint64_t begin, uint64_t end) const;
  void sync_data() const;                           // fdatasync: bytes and what is needed to read them
  void truncate(uint64_t bytes) const;              // not synced
  void rename_to(const std::filesystem::path& to);  // replaces `to`; sync the directory to make it durable
  // Closes and reports what close(2) says; nothing when it is closed already.
  void close();

 private:
  int fd_ = -1;
  std::filesystem::path path_;
};

void fsync_file(const std::filesystem::path& path);
// Makes the name of a file or directory durable that is there already: whoever made it may have died before that. Where
// its directory may not be read, or it is a mount of its own, it was not we who made it, and nothing is done.
void sync_name(const std::filesystem::path& path);
// Makes names created in, renamed into or removed from `path` durable.
void fsync_directory(const std::filesystem::path& path);

// The paths of what a directory holds, in no order. (libstdc++'s iterator ends the process when memory runs out.)
std::vector<std::filesystem::path> list_directory(std::string_view operation, const std::filesystem::path& path);

// Removes a file, or a directory with all below it; nothing if there is none. Symbolic links are not followed.
void remove_tree(std::string_view operation, const std::filesystem::path& path);
// As far as it can.
void try_to_remove_tree(const std::filesystem::path& path) noexcept;

// Creates one directory (its parent exists, itself it does not) and syncs the parent.
void make_directory(const std::filesystem::path& path);

// Replaces `path` or creates it: after power loss it holds the old bytes or the new ones, whole. Durable on return.
// Writes "<path>.tmp" first (a leftover is overwritten). On error `path` is what it was, unless only the last step,
// the directory's sync, failed: then the new bytes are there but perhaps not durable.
void write_file_atomically(const std::filesystem::path& path, Bytes bytes);
void write_file_atomically(const std::filesystem::path& path, std::string_view text);

// The whole file. One longer than `limit` is CorruptionError and is not read: nothing of ours grows past what its
// reader expects.
std::string read_file(const std::filesystem::path& path, size_t limit);

// A second name for the file where the file system can (true), a synced copy of its bytes where it cannot (false).
// `to` must not exist; no part of a failed copy stays. Neither form syncs the directory of `to`.
bool link_or_copy(const std::filesystem::path& from, const std::filesystem::path& to);

// CRC-32C (Castagnoli, reflected, not masked), as RocksDB keeps it for its files. `crc` continues an earlier result.
uint32_t crc32c(Bytes bytes, uint32_t crc = 0) noexcept;
uint32_t crc32c_of_file(const std::filesystem::path& path);

namespace detail {
// What crc32c does on a processor without the SSE4.2 instruction; here for the test that compares the two.
uint32_t crc32c_portable(Bytes bytes, uint32_t crc) noexcept;
}  // namespace detail

}  // namespace damo
