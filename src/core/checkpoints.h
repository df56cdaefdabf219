// SPDX-License-Identifier: Apache-2.0
//
// The checkpoints that lie beside each other in one directory: which are complete, which of them is the newest, and
// the removal of the oldest. One checkpoint's contents are cut.cc's and manifest.h's business.
//
// Siblings are the checkpoints of one lineage (manifest.h) in one directory. They are in the order in which they were
// made: by `created`, then by sequence number. next_created() keeps that so when the wall clock runs back, and when a
// storage goes on from an older checkpoint.
//
// Complete is a directory whose CHECKPOINT is whole and whose files are all there with their lengths; their checksums
// are a restore's business.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "manifest.h"

namespace damo {

struct CheckpointInfo {
  std::filesystem::path path;
  std::array<std::byte, 16> storage_id{};
  int64_t step = -1;  // -1: none given
  uint64_t sequence = 0;
  int64_t created = 0;
};

struct CheckpointList {
  std::vector<CheckpointInfo> complete;  // oldest first
  // What has the looks of a checkpoint and is not complete, with what is wrong. Never touched.
  struct Damaged {
    std::filesystem::path path;
    std::string wrong;
    bool newer = false;  // not damaged, but of a newer version
  };
  std::vector<Damaged> damaged;
};

// Reads the file CHECKPOINT of `checkpoint`. StorageError: it is no checkpoint; CorruptionError: damaged.
CheckpointManifest read_checkpoint(const std::filesystem::path& checkpoint);
// CorruptionError when a file of the manifest is missing or has another length.
void check_lengths(const std::filesystem::path& checkpoint, const CheckpointManifest& manifest);

// Reads all of `checkpoint`, and returns what it says of itself. StorageError: it is none; CorruptionError names the
// file that is missing, damaged, or of a newer version.
CheckpointManifest verify_checkpoint(const std::filesystem::path& checkpoint);

// SchemaMismatchError when a group of the checkpoint could not be opened as `wanted` has it; std::invalid_argument when
// `memory_bytes` have no room for the filters. `wanted` has the filters that were asked for, not those that there are.
void check_layouts(const std::filesystem::path& checkpoint, const std::vector<TableSpec>& wanted, size_t memory_bytes);

// What the filters of its groups take in memory.
size_t filter_bytes(const Manifest& manifest);

// What lies in `directory`; nothing when it does not exist. StorageError when it cannot be read. Links are not
// followed: what they lead to is somewhere else.
CheckpointList list_checkpoints(const std::filesystem::path& directory);

// The time that makes a checkpoint of `sequence` the newest of `siblings`: `now`, or later.
int64_t next_created(const std::vector<CheckpointInfo>& siblings, int64_t now, uint64_t sequence);

// A name beside `wanted` for what is not a checkpoint yet, or is none any more: ".building-LINEAGE-PID-N",
// ".removing-LINEAGE".
std::string building_suffix(const std::array<std::byte, 16>& storage_id);
std::string removing_suffix(const std::array<std::byte, 16>& storage_id);
bool is_no_checkpoint_by_name(const std::string& name);

// Removes `checkpoints`: each is renamed first, so that what a crash leaves of it is not taken for a checkpoint. Then
// what earlier crashes have left in `directory` of this lineage: half-removed ones, and half-built ones that nobody is
// building. Returns what could not be removed, in words.
std::vector<std::string> remove_checkpoints(const std::filesystem::path& directory,
                                            const std::array<std::byte, 16>& storage_id,
                                            const std::vector<CheckpointInfo>& checkpoints);

}  // namespace damo
