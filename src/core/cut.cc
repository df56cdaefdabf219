// SPDX-License-Identifier: Apache-2.0
//
// Everything that needs one moment of the storage: cutting the log, checkpoint and restore, dump and scan.
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <ctime>

#include "budget.h"
#include "checkpoints.h"
#include "error.h"
#include "planted.h"
#include "saved_filters.h"
#include "staged_directory.h"
#include "storage.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

// What is built before it gets the name `wanted`: under a name of its own, so that two calls for one name do not meet.
fs::path staging_path(const fs::path& wanted) {
  static std::atomic<uint64_t> number{0};
  fs::path staged = wanted;
  staged += ".building-" + std::to_string(getpid()) + "-" + std::to_string(number++);
  return staged;
}

// Between two reports of a dump: a few tens of milliseconds, and so many bytes that reporting costs nothing beside
// them. By work and not by the clock, so that two runs report the same.
constexpr size_t kDumpReportBytes = size_t{16} << 20;

class DumpReport {
 public:
  DumpReport(const Storage::DumpProgress& progress, uint64_t total) : progress_(progress), total_(total) { report(0); }
  // Rows that have expired are work, but none of those that there are.
  void add_row(size_t bytes, bool alive) {
    done_ += alive;
    bytes_ += bytes;
    if (bytes_ < kDumpReportBytes) return;
    bytes_ = 0;
    report(std::min(done_, total_));
  }
  void end() { report(total_); }

 private:
  void report(uint64_t done) const {
    if (progress_) progress_(done, total_);
  }

  const Storage::DumpProgress& progress_;
  const uint64_t total_;
  uint64_t done_ = 0;
  size_t bytes_ = 0;  // read and written since the last report
};

CheckpointFile describe_file(const fs::path& directory, const std::string& name) {
  return {name, fs::file_size(directory / name), crc32c_of_file(directory / name)};
}

}  // namespace

void Storage::cut(const std::function<void(const CutInfo&)>& closed, SavedFilters* filters,
                  const std::function<void()>& first) {
  // Most of the log goes to disk before anybody is stopped. (A storage that is open read-only has none.)
  if (log_) {
    check_in_place();
    log_->sync();
  }
  // Neither is waited for while the other is held: an operation that holds the order lock may wait for an eviction, and
  // the eviction for the write lock.
  std::unique_lock write(tiers_->write_mutex(), std::defer_lock);
  std::unique_lock order(order_, std::defer_lock);
  std::lock(write, order);
  const auto stopped = std::chrono::steady_clock::now();
  if (first) first();
  if (manifest_changed_) save_manifest();  // before the log counts rows of a new group
  const CutInfo info{counters(), manifest_, read_clock()};
  if (log_ && !log_->newest_segment_is_empty()) log_->rotate(encode_counters(info.counters));
  if (filters != nullptr) filters->begin(info.counters.sequence);
  tiers_->note_cut_pause(std::chrono::steady_clock::now() - stopped);
  try {
    tiers_->cut(std::move(write), std::move(order), info.counters.sequence, [&] {
      if (closed) closed(info);
    });
  } catch (...) {
    // Where nothing more can be written (a full disk alone is not that), whoever changes rows hears of it now, and not
    // when memory or the log is full.
    if (std::exception_ptr failure = store_->failure()) tiers_->fail(std::move(failure));
    throw;
  }
}

std::shared_ptr<const StoreSnapshot> Storage::snapshot(CutInfo& info) {
  check_writable();
  std::shared_ptr<const StoreSnapshot> snapshot;
  cut([&](const CutInfo& cut_info) {
    info = cut_info;
    snapshot = store_->snapshot();
  });
  return snapshot;
}

// -------------------------------------------------------------- checkpoint

std::vector<std::string> Storage::checkpoint(const fs::path& directory, int64_t step, std::string extra, uint64_t keep,
                                             const FillCheckpoint& fill) {
  const Use use(*this, "checkpoint");
  check_may_change("checkpoint");  // its table files and filters are shared with the storage's, which are the writer's
  check_writable();
  if (extra.size() > kMaxExtraBytes)
    throw std::invalid_argument("[checkpoint] extra has " + std::to_string(extra.size()) +
                                " bytes, expected at most 16 MiB");
  fs::path wanted = fs::absolute(directory).lexically_normal();
  if (!wanted.has_filename()) wanted = wanted.parent_path();  // it ended in a slash
  if (fs::exists(fs::symlink_status(wanted)))
    throw StorageError("[checkpoint] " + wanted.string() +
                       " exists already: a checkpoint never replaces anything; give another name");
  if (!fs::is_directory(wanted.parent_path()))
    throw StorageError("[checkpoint] the directory " + wanted.parent_path().string() +
                       " does not exist: make it first");
  check_is_not_of_storage("checkpoint", wanted, path_, false);
  StagedDirectory staged(wanted, building_suffix(id()));
  CheckpointManifest manifest;
  Manifest groups;
  if (fill) {
    fill(staged.path());
    for (const fs::path& file : list_directory("checkpoint", staged.path())) {
      if (!planted("dense part not synced")) fsync_file(file);
      manifest.files.push_back(describe_file(staged.path(), file.filename()));
    }
  }
  {
    const std::lock_guard cutting(cutting_);  // the filters' files stay
    SavedFilters filters(*this, staged.path());
    cut(
        [&](const CutInfo& info) {
          groups = info.manifest;
          manifest.counters = info.counters;
          for (const LinkedFile& file : store_->link_into(staged.path() / "rocksdb"))
            manifest.files.push_back({"rocksdb/" + file.name, file.bytes, file.crc32c});
        },
        &filters);
    filters.save();
    filters.note_in(groups);
    if (!filters.empty()) groups.cut = manifest.counters.sequence;
    for (const TableSpec& spec : groups.tables) {
      if (!spec.admission || spec.admission->saved == 0) continue;
      const std::string name = SavedFilter{groups.storage_id, spec.table_id, spec.admission->saved}.name();
      // One that has not counted since it was saved.
      if (!fs::exists(staged.path() / name)) link_or_copy(record_directory() / name, staged.path() / name);
      manifest.files.push_back(describe_file(staged.path(), name));
    }
  }
  manifest.storage_id = groups.storage_id;
  manifest.step = step;
  manifest.extra = std::move(extra);
  std::vector<CheckpointInfo> siblings = list_checkpoints(wanted.parent_path()).complete;
  std::erase_if(siblings, [&](const auto& other) { return !is_same_lineage(other.storage_id, groups.storage_id); });
  manifest.created = next_created(siblings, static_cast<int64_t>(std::time(nullptr)), manifest.counters.sequence);
  write_file_atomically(staged.path() / "MANIFEST", encode_manifest(groups));
  manifest.files.push_back(describe_file(staged.path(), "MANIFEST"));
  // Last: a directory without it is no checkpoint.
  write_file_atomically(staged.path() / "CHECKPOINT", encode_checkpoint(manifest));
  staged.publish("checkpoint");
  if (keep == 0) return {};
  siblings.resize(siblings.size() - std::min<size_t>(siblings.size(), keep - 1));
  return remove_checkpoints(wanted.parent_path(), groups.storage_id, siblings);
}

void Storage::restore(const fs::path& checkpoint, const fs::path& path, size_t memory_bytes) {
  const fs::path from = fs::absolute(checkpoint).lexically_normal();
  const CheckpointManifest manifest = verify_checkpoint(from);
  const std::string groups = read_file(from / "MANIFEST", kMaxManifestBytes);
  Manifest restored = decode_manifest(std::as_bytes(std::span(groups)), (from / "MANIFEST").string());
  check_filters_fit("restore", filter_bytes(restored), memory_bytes, false);
  std::vector<std::pair<AdmissionSpec, SavedFilter>> filters;
  for (const TableSpec& spec : restored.tables) {
    if (!spec.admission || spec.admission->saved == 0) continue;
    filters.push_back({*spec.admission, {restored.storage_id, spec.table_id, spec.admission->saved}});
  }
  // An identity of its own: the log of one restore is never taken for that of another.
  restored.storage_id = make_restored_id(manifest.storage_id);
  const StorageCounters counters = restored_counters(manifest);

  StorageDirectory directory(path, OpenMode::kOpenOrCreate);
  directory.replace_generation([&](const fs::path& generation) {
    make_directory(generation / "rocksdb");
    for (const CheckpointFile& file : manifest.files) {
      if (!file.name.starts_with("rocksdb/")) continue;
      const fs::path to = generation / file.name;
      if (!fs::exists(to.parent_path())) fs::create_directories(to.parent_path());
      // Table files never change and may be shared with the checkpoint; RocksDB rewrites or appends to the others.
      if (to.extension() == ".sst" || planted("restore links more than tables")) {
        link_or_copy(from / file.name, to);
      } else {
        fs::copy_file(from / file.name, to);
      }
      // Also what is linked: who copied the checkpoint here had no reason to sync it.
      if (!planted("restored files not synced")) fsync_file(to);
    }
    fsync_directory(generation / "rocksdb");
    for (const auto& [spec, saved] : filters)
      reseal_saved_filter(from, saved, spec.filter, generation, {restored.storage_id, saved.table_id, saved.sequence});
    write_file_atomically(generation / "MANIFEST", encode_manifest(restored));
    make_directory(generation / "log");
    OperationLog::create({.directory = generation / "log", .storage_id = restored.storage_id}, counters.sequence + 1,
                         encode_counters(counters));
  });
}

// -------------------------------------------------------------------- dump

uint64_t Storage::dump(const fs::path& file, const DumpConditions& conditions, const DumpProgress& progress) {
  const Use use(*this, "dump");
  const fs::path wanted = fs::absolute(file).lexically_normal();
  const fs::file_status there = fs::status(wanted);
  if (fs::is_directory(there)) throw StorageError("[dump] " + wanted.string() + " is a directory: give a file name");
  // The rename at the end would put a file in the place of /dev/null.
  if (fs::exists(there) && !fs::is_regular_file(there))
    throw StorageError("[dump] " + wanted.string() + " is a device, a pipe or a socket: give the name of a file");
  if (!fs::is_directory(wanted.parent_path()))
    throw StorageError("[dump] the directory " + wanted.parent_path().string() + " does not exist: make it first");
  check_is_not_of_storage("dump", wanted, path_, options_.read_only);
  CutInfo info;
  const std::shared_ptr<const StoreSnapshot> rows = snapshot(info);

  // Written aside and renamed. The header's counts are known at the end, and put in then.
  const fs::path staged = staging_path(wanted);
  struct Remove {
    const fs::path& path;
    ~Remove() {
      std::error_code ignored;
      fs::remove(path, ignored);
    }
  } remove{staged};
  FileDescriptor out("dump", staged, O_WRONLY | O_CREAT | O_TRUNC);
  std::array<int32_t, kNumGroups> dimensions{};
  std::array<uint64_t, kNumGroups> counts{};
  uint64_t total = 0;
  std::string buffer(sizeof dimensions + sizeof counts, '\0');
  uint64_t rows_of_groups = 0;
  for (const TableSpec& spec : info.manifest.tables) {
    if (conditions.group && *conditions.group != spec.group) continue;
    for (const TableCounters& table : info.counters.tables)
      if (table.table_id == spec.table_id)
        rows_of_groups += table.rows.since(spec.lifetime.first_bucket(info.expiry(spec)));
  }
  DumpReport report(progress, rows_of_groups);
  const auto flush = [&] {
    out.write(std::as_bytes(std::span(buffer)));
    buffer.clear();
  };
  for (const TableSpec& spec : info.manifest.tables) {
    if (conditions.group && *conditions.group != spec.group) continue;
    const TableShape shape(spec);
    dimensions[spec.group] = static_cast<int32_t>(spec.dimension);
    const Expiry expiry = info.expiry(spec);
    std::vector<float> weights(spec.dimension);
    const auto iterator = rows->scan(StoredKey::make(spec.table_id, 0), StoredKey::make(spec.table_id + 1, 0));
    while (iterator->next()) {
      const StoredKey key = iterator->key();
      const DecodedRow row = decode_row(key, iterator->value(), shape.num_floats());
      const bool alive = expiry.alive(row.header.time, row.header.step);
      report.add_row(iterator->value().size() + spec.dimension * sizeof(float), alive);
      if (!alive) continue;
      if (row.header.update_count < conditions.min_count) continue;
      if (conditions.updated_since && row.header.time < *conditions.updated_since) continue;
      if (row.header.has_floats)
        std::memcpy(weights.data(), row.floats.data(), weights.size() * sizeof(float));
      else
        shape.first_weights(key.mixed(), weights.data());
      ByteWriter writer(buffer);
      writer.put(unmix_key(key.mixed()));
      writer.put(static_cast<int32_t>(spec.group));
      writer.put_bytes(weights.data(), weights.size() * sizeof(float));
      ++counts[spec.group];
      ++total;
      if (buffer.size() > (size_t{1} << 20)) flush();
    }
  }
  flush();
  out.write_at(std::as_bytes(std::span(dimensions)), 0);
  out.write_at(std::as_bytes(std::span(counts)), sizeof dimensions);
  report.end();
  out.sync();
  out.close();
  fs::rename(staged, wanted);
  fsync_directory(wanted.parent_path());
  return total;
}

}  // namespace damo
