// SPDX-License-Identifier: Apache-2.0
#include "error.h"

#include <new>
#include <string>

namespace damo {
namespace {

std::string with_words(const std::exception& error) {
  std::string said = error.what();
  if (!said.ends_with(kUntilOpenedAgain))
    said.append("; nothing more is written to the disk ").append(kUntilOpenedAgain);
  return said;
}

// In the middle of an operation that is in the log. No memory is needed to say so.
class OutOfMemoryError final : public std::bad_alloc {
 public:
  const char* what() const noexcept override {
    return "memory ran out in the middle of an operation; nothing more is changed until the storage is closed and"
           " opened again";
  }
};

}  // namespace

std::exception_ptr with_way_out(std::exception_ptr error) noexcept {
  try {
    try {
      std::rethrow_exception(error);
    } catch (const DiskFullError& full) {
      return std::make_exception_ptr(DiskFullError(with_words(full)));
    } catch (const NewerVersionError& newer) {
      return std::make_exception_ptr(NewerVersionError(with_words(newer)));
    } catch (const CorruptionError& damaged) {
      return std::make_exception_ptr(CorruptionError(with_words(damaged)));
    } catch (const StorageError& refused) {
      return std::make_exception_ptr(StorageError(with_words(refused)));
    } catch (const std::bad_alloc&) {
      return std::make_exception_ptr(OutOfMemoryError());
    }
  } catch (...) {  // another type, or no memory for the words
  }
  return error;
}

}  // namespace damo
