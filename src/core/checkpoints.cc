// SPDX-License-Identifier: Apache-2.0
#include "checkpoints.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <optional>
#include <tuple>

#include "budget.h"
#include "error.h"
#include "file.h"
#include "planted.h"
#include "saved_filter.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

std::string lineage_text(const std::array<std::byte, 16>& storage_id) {
  uint64_t lineage = 0;
  std::memcpy(&lineage, storage_id.data(), sizeof lineage);
  char text[20];
  std::snprintf(text, sizeof text, "%016" PRIx64, lineage);
  return text;
}

auto order_of(const CheckpointInfo& info) { return std::tie(info.created, info.sequence, info.path); }

// Without its file CHECKPOINT first: whatever is left of it then is no checkpoint, under any name.
void remove_directory(const fs::path& directory) {
  std::error_code absent;
  fs::remove(directory / "CHECKPOINT", absent);
  if (absent) throw_system_error("checkpoint", directory / "CHECKPOINT", absent.value());
  fsync_directory(directory);
  remove_tree("checkpoint", directory);
}

// Nothing where somebody builds it. Who has this may remove it: whoever would lock it waits.
std::optional<FileDescriptor> lock_of_leftover(const fs::path& staged) {
  FileDescriptor directory("open", staged, O_RDONLY | O_DIRECTORY);
  if (::flock(directory.get(), LOCK_EX | LOCK_NB) != 0) return std::nullopt;
  return directory;
}

void expect_listed(const fs::path& checkpoint, const CheckpointManifest& manifest, const std::string& needed) {
  if (std::none_of(manifest.files.begin(), manifest.files.end(), [&](const auto& file) { return file.name == needed; }))
    throw CorruptionError("[restore] " + (checkpoint / "CHECKPOINT").string() + " does not list the file " + needed +
                          ": it is not of a whole checkpoint");
}

}  // namespace

CheckpointManifest read_checkpoint(const fs::path& checkpoint) {
  std::string bytes;
  try {
    bytes = read_file(checkpoint / "CHECKPOINT", size_t{256} << 20);
  } catch (const MissingFileError&) {
    throw StorageError("[restore] " + checkpoint.string() + " is not a checkpoint: it has no file CHECKPOINT" +
                       (fs::exists(checkpoint / "CURRENT") ? "; it is a storage: open it with Storage(path)" : ""));
  }
  CheckpointManifest manifest =
      decode_checkpoint(std::as_bytes(std::span(bytes)), (checkpoint / "CHECKPOINT").string());
  for (const char* needed : {"MANIFEST", "rocksdb/CURRENT"}) expect_listed(checkpoint, manifest, needed);
  return manifest;
}

void check_lengths(const fs::path& checkpoint, const CheckpointManifest& manifest) {
  for (const CheckpointFile& file : manifest.files) {
    const fs::path at = checkpoint / file.name;
    std::error_code error;
    const uintmax_t size = fs::file_size(at, error);
    if (error)
      throw CorruptionError("[restore] the checkpoint's file " + at.string() + " is missing: " + error.message());
    if (size != file.bytes)
      throw CorruptionError("[restore] " + at.string() + " has " + std::to_string(size) + " bytes, expected " +
                            std::to_string(file.bytes) + " (damaged at offset " +
                            std::to_string(std::min<uintmax_t>(size, file.bytes)) + ")");
  }
}

CheckpointManifest verify_checkpoint(const fs::path& checkpoint) {
  CheckpointManifest manifest = read_checkpoint(checkpoint);
  check_lengths(checkpoint, manifest);
  for (const CheckpointFile& file : manifest.files) {
    const fs::path at = checkpoint / file.name;
    if (crc32c_of_file(at) != file.crc32c && !planted("checkpoint's sums not looked at"))
      throw CorruptionError("[restore] " + at.string() + " is damaged: the checksum of its bytes (offset 0 to " +
                            std::to_string(file.bytes) + ") does not agree");
  }
  const std::string source = (checkpoint / "MANIFEST").string();
  const std::string groups = read_file(checkpoint / "MANIFEST", kMaxManifestBytes);
  const Manifest decoded = decode_manifest(std::as_bytes(std::span(groups)), source);
  check_settings_are_known(decoded, source);
  for (const TableSpec& spec : decoded.tables)
    if (spec.admission && spec.admission->saved != 0)
      expect_listed(checkpoint, manifest, SavedFilter{decoded.storage_id, spec.table_id, spec.admission->saved}.name());
  return manifest;
}

void check_layouts(const fs::path& checkpoint, const std::vector<TableSpec>& wanted, size_t memory_bytes) {
  const std::string source = (checkpoint / "MANIFEST").string();
  const std::string groups = read_file(checkpoint / "MANIFEST", kMaxManifestBytes);
  Manifest manifest = decode_manifest(std::as_bytes(std::span(groups)), source);
  for (const TableSpec& table : wanted) {
    const auto stored = std::find_if(manifest.tables.begin(), manifest.tables.end(), [&](const TableSpec& spec) {
      return table.name.empty() ? table.group == spec.group : table.name == spec.name;
    });
    if (stored == manifest.tables.end()) {
      if (table.admission) manifest.tables.push_back(table);
      continue;
    }
    check_same_layout(*stored, table);
    if (table.admission && stored->admission) check_same_filter(*stored, table.admission->filter);
    if (!stored->admission) stored->admission = table.admission;
  }
  check_filters_fit("restore", filter_bytes(manifest), memory_bytes, false);
}

size_t filter_bytes(const Manifest& manifest) {
  size_t bytes = 0;
  for (const TableSpec& spec : manifest.tables)
    if (spec.admission) bytes += CountingBloomFilter::memory_bytes(spec.admission->filter);
  return bytes;
}

CheckpointList list_checkpoints(const fs::path& directory) {
  CheckpointList list;
  std::error_code error;
  (void)fs::status(directory, error);
  if (error == std::errc::no_such_file_or_directory) return list;  // below a file, say, is an error
  for (const fs::path& path : list_directory("list checkpoints", directory)) {
    if (is_no_checkpoint_by_name(path.filename()) || !fs::is_directory(fs::symlink_status(path))) continue;
    std::error_code ignored;
    if (!fs::exists(path / "CHECKPOINT", ignored)) {
      // A copy that was cut short, say.
      if (!ignored && fs::exists(path / "MANIFEST", ignored) && fs::exists(path / "rocksdb", ignored))
        list.damaged.push_back({path, path.string() + " has no file CHECKPOINT: it is not complete"});
      continue;
    }
    try {
      const CheckpointManifest manifest = read_checkpoint(path);
      check_lengths(path, manifest);
      list.complete.push_back({path, manifest.storage_id, manifest.step, manifest.counters.sequence, manifest.created});
    } catch (const Error& wrong) {
      list.damaged.push_back({path, wrong.what(), dynamic_cast<const NewerVersionError*>(&wrong) != nullptr});
    }
  }
  std::sort(list.complete.begin(), list.complete.end(),
            [](const auto& one, const auto& other) { return order_of(one) < order_of(other); });
  std::sort(list.damaged.begin(), list.damaged.end(),
            [](const auto& one, const auto& other) { return one.path < other.path; });
  return list;
}

int64_t next_created(const std::vector<CheckpointInfo>& siblings, int64_t now, uint64_t sequence) {
  for (const CheckpointInfo& sibling : siblings) {
    if (std::pair(sibling.created, sibling.sequence) < std::pair(now, sequence)) continue;
    now = sibling.created + (sibling.sequence >= sequence ? 1 : 0);
  }
  return now;
}

std::string building_suffix(const std::array<std::byte, 16>& storage_id) {
  static std::atomic<uint64_t> number{0};
  return ".building-" + lineage_text(storage_id) + "-" + std::to_string(getpid()) + "-" + std::to_string(number++);
}

std::string removing_suffix(const std::array<std::byte, 16>& storage_id) {
  return ".removing-" + lineage_text(storage_id);
}

bool is_no_checkpoint_by_name(const std::string& name) {
  return name.find(".building-") != std::string::npos || name.find(".removing-") != std::string::npos;
}

std::vector<std::string> remove_checkpoints(const fs::path& directory, const std::array<std::byte, 16>& storage_id,
                                            const std::vector<CheckpointInfo>& checkpoints) {
  std::vector<std::string> problems;
  const auto attempt = [&](const auto& removal) {
    try {
      removal();
    } catch (const MissingFileError&) {  // another thread or process removes the same
    } catch (const fs::filesystem_error& refused) {
      if (refused.code() != std::errc::no_such_file_or_directory) problems.emplace_back(refused.what());
    } catch (const std::exception& refused) {
      problems.emplace_back(refused.what());
    }
  };
  const std::string removing = removing_suffix(storage_id);
  const std::string building = ".building-" + lineage_text(storage_id) + "-";
  // Leftovers first: a name that is wanted now may be among them.
  attempt([&] {
    for (const fs::path& path : list_directory("checkpoint", directory)) {
      const std::string name = path.filename();
      if (!fs::is_directory(fs::symlink_status(path))) continue;
      if (name.ends_with(removing)) attempt([&] { remove_directory(path); });
      if (name.find(building) == std::string::npos) continue;
      std::optional<FileDescriptor> lock;
      try {
        lock = lock_of_leftover(path);
      } catch (const MissingFileError&) {
        continue;  // it is complete by now, or removed by another
      }
      if (lock) attempt([&] { remove_directory(path); });
    }
  });
  std::vector<fs::path> renamed;
  for (const CheckpointInfo& checkpoint : checkpoints) {
    attempt([&] {
      fs::path aside = checkpoint.path;
      aside += removing;
      fs::rename(checkpoint.path, aside);
      renamed.push_back(aside);
    });
  }
  if (renamed.empty()) return problems;
  attempt([&] { fsync_directory(directory); });
  for (const fs::path& aside : renamed) attempt([&] { remove_directory(aside); });
  attempt([&] { fsync_directory(directory); });
  return problems;
}

}  // namespace damo
