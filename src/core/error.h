// SPDX-License-Identifier: Apache-2.0
//
// The exceptions of the core. The bindings translate each to the Python class
// of the same name in damo_embedding/errors.py; std::invalid_argument becomes
// ValueError. A message says the operation in brackets, what came, what was
// expected, and the way out:
//   [lookup] out has shape (3, 8), expected (3, 16) for group "user"
#pragma once

#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>

namespace damo {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Bytes on disk are not what was written. Names the file and the key or offset.
class CorruptionError : public Error {
 public:
  using Error::Error;
};

// The bytes are right, but of a newer version: nothing to repair, and nothing to go on without.
class NewerVersionError : public CorruptionError {
 public:
  using CorruptionError::CorruptionError;
};

// The storage holds a group, or the file a filter, of other settings.
class SchemaMismatchError : public Error {
 public:
  using Error::Error;
};

// The operating system or the cold tier refused: I/O error, disk full, memory.
class StorageError : public Error {
 public:
  using Error::Error;
};

// No space on the disk, or within its quota: nothing was changed, and the same may go well once there is space again.
// For users a StorageError.
class DiskFullError : public StorageError {
 public:
  using StorageError::StorageError;
};

inline bool is_disk_full(const std::exception_ptr& error) noexcept {
  try {
    std::rethrow_exception(error);
  } catch (const DiskFullError&) {
    return true;
  } catch (...) {
    return false;
  }
}

// How every error ends that stays.
inline constexpr std::string_view kUntilOpenedAgain = "until the storage is closed and opened again";

// An error that stays, of the same type, with the way out said if it does not say it yet.
std::exception_ptr with_way_out(std::exception_ptr error) noexcept;

// A change was asked of a storage that is open to be read only.
class ReadOnlyError : public Error {
 public:
  using Error::Error;
};

class ClosedError : public Error {
 public:
  using Error::Error;
};

class AlreadyOpenError : public Error {
 public:
  using Error::Error;
};

class ForkedHandleError : public Error {
 public:
  using Error::Error;
};

}  // namespace damo
