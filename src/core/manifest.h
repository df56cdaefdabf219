// SPDX-License-Identifier: Apache-2.0
//
// The manifest of a generation: the storage's identity and its groups. Small, rewritten whole and
// atomically before the first operation after groups were made; everything that changes with every step is in the log
// instead.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "format.h"
#include "table_spec.h"

namespace damo {

struct Manifest {
  std::array<std::byte, 16> storage_id{};
  uint32_t next_table_id = 1;
  Lifetime lifetime;              // of the groups that were given none
  std::vector<TableSpec> tables;  // in order of group
  // The log is needed from the record after this operation on: the cold tier has all before, and so have the files of
  // the filters. Moved on only when such a file is replaced; older records may be there still.
  uint64_t cut = 0;
};

inline constexpr size_t kMaxManifestBytes = size_t{64} << 20;

std::string encode_manifest(const Manifest& manifest);
// CorruptionError names `source` and the offset; a newer format is refused in words.
Manifest decode_manifest(Bytes bytes, const std::string& source);
// CorruptionError for a group whose optimizer, initializer or settings this version does not know. To be asked before
// anything that the manifest tells of is opened or replaced: what is a newer version's stays as it is.
void check_settings_are_known(const Manifest& manifest, const std::string& source);

// A storage's id: the half that is its lineage's, which a restore keeps, and the half that is its own. Checkpoints of
// one lineage are moments of one storage; the own half tells the log of one restore from that of another.
std::array<std::byte, 16> make_storage_id();
std::array<std::byte, 16> make_restored_id(const std::array<std::byte, 16>& checkpoint);
bool is_same_lineage(const std::array<std::byte, 16>& one, const std::array<std::byte, 16>& other) noexcept;

// What a checkpoint directory says of itself, in its file CHECKPOINT.
struct CheckpointFile {
  std::string name;  // relative to the checkpoint, '/' between parts
  uint64_t bytes = 0;
  uint32_t crc32c = 0;
};
struct CheckpointManifest {
  std::array<std::byte, 16> storage_id{};
  StorageCounters counters;  // of the cut
  int64_t step = -1;         // the caller's; -1: none given
  std::string extra;
  int64_t created = 0;  // wall time, seconds
  std::vector<CheckpointFile> files;
};
// As they go on from: its own step and extra, when given, are the last commit.
StorageCounters restored_counters(const CheckpointManifest& manifest);
std::string encode_checkpoint(const CheckpointManifest& manifest);
CheckpointManifest decode_checkpoint(Bytes bytes, const std::string& source);

}  // namespace damo
