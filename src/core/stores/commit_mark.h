// SPDX-License-Identifier: Apache-2.0
//
// A file that remembers one number, the last commit's, apart from the store's
// own books, so that books with a lost end are noticed.
//
// 1,024 bytes: two slots at 0 and 512, written in turn (the number's lowest bit
// says which), so that a torn write leaves the other. A slot is three u64:
// magic "dammark1", the number, XXH3-64 of its eight bytes seeded by the magic;
// zeros follow. Part of the persistent format.
//
// Thread safety: one writer.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "../file.h"

namespace damo {

class CommitMark {
 public:
  // Nothing when the file is missing; CorruptionError when no slot is whole.
  static std::optional<uint64_t> read(const std::filesystem::path& path);
  // A whole file, for write_file_atomically.
  static std::string contents(uint64_t number);

  void open(const std::filesystem::path& path);  // an existing file
  void write(uint64_t number) const;             // in place; durable on return
  void close() { file_ = FileDescriptor(); }

 private:
  FileDescriptor file_;
};

}  // namespace damo
