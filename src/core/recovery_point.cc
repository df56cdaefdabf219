// SPDX-License-Identifier: Apache-2.0
//
// Mode commit: what a crash goes back to.
//
// The recovery point is a generation like any other, with an empty log, and CURRENT names it. The process works in
// another one, which CURRENT does not name: its table files were hard links of the same files at first, and nothing
// else of it is ever read again. A commit builds the next recovery point aside, of one cut, and switches CURRENT to it.
// So whoever opens the directory after a crash, in whatever mode, finds a storage that was closed at the last commit,
// and has nothing to repair; the generation that the process worked in is removed as what an interrupted restore leaves
// is.
#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "error.h"
#include "planted.h"
#include "saved_filters.h"
#include "storage.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

bool is_table_file(const LinkedFile& file) { return fs::path(file.name).extension() == ".sst"; }

}  // namespace

void Storage::begin_recovery_points() {
  const std::lock_guard cutting(cutting_);
  make_recovery_point({}, /*with_presence=*/true);
  {
    // Who writes rows back, and asks the log before, holds this lock.
    const std::lock_guard write(tiers_->write_mutex());
    log_ = OperationLog::unwritten(log_->last_sequence() + 1);
    logs_ = false;
  }
  // Of the generation that was live until now only the table files are needed. The rest would take space.
  try {
    for (const fs::path& path : list_directory("open", generation_))
      if (path.filename() != "rocksdb") try_to_remove_tree(path);
  } catch (const StorageError&) {
    // It stays, until the storage is opened again.
  }
}

void Storage::make_recovery_point(const std::function<void()>& first, bool with_presence) {
  if (point_) point_->manifest.clear();  // until there is a new one: CURRENT may be switched and an error come after it
  auto point = std::make_unique<RecoveryPoint>();
  Manifest manifest;
  StorageCounters counters;
  std::optional<SavedFilters> filters;
  directory_->replace_generation(
      [&](const fs::path& fresh) {
        filters.emplace(*this, fresh);
        if (planted("recovery point linked before the cut")) point->files = store_->link_into(fresh / "rocksdb");
        cut(
            [&](const CutInfo& info) {
              manifest = info.manifest;
              counters = info.counters;
              if (point->files.empty()) point->files = store_->link_into(fresh / "rocksdb");
            },
            &*filters, first);
        filters->save();
        filters->note_in(manifest);
        if (!filters->empty()) manifest.cut = counters.sequence;
        for (const TableSpec& spec : manifest.tables) {
          if (!spec.admission || spec.admission->saved == 0) continue;
          const std::string name = SavedFilter{manifest.storage_id, spec.table_id, spec.admission->saved}.name();
          // One that has not counted since it was saved.
          if (!fs::exists(fresh / name)) link_or_copy(record_directory() / name, fresh / name);
        }
        // To write it takes longer than most commits.
        if (with_presence) save_presence_if_it_can(fresh, counters.sequence);
        point->directory = fresh;
        point->sequence = counters.sequence;
        point->manifest = encode_manifest(manifest);
        write_file_atomically(fresh / "MANIFEST", point->manifest);
        make_directory(fresh / "log");
        OperationLog::create({.directory = fresh / "log", .storage_id = manifest.storage_id}, counters.sequence + 1,
                             encode_counters(counters));
      },
      generation_);
  uint64_t bytes = 0;
  for (const LinkedFile& file : point->files)
    if (is_table_file(file)) bytes += file.bytes;
  point_bytes_ = bytes;
  {
    const std::lock_guard order(order_);
    point_ = std::move(point);
  }
  adopt_files(*filters, counters.sequence);
  log_->note_synced(counters.sequence);
  let_expire(counters);
}

bool Storage::is_recovery_point() const {
  return point_->sequence == log_->last_sequence() &&
         (planted("recovery point keeps the old manifest") || point_->manifest == encode_manifest(manifest_));
}

// When nothing has happened since the recovery point, its counters alone are to say something new: false if not so.
bool Storage::advance_recovery_point(const std::function<void()>& first) {
  StorageCounters now;
  {
    const std::lock_guard order(order_);
    if (!is_recovery_point()) return false;
    first();
    now = counters();
  }
  const std::string manifest = std::exchange(point_->manifest, {});  // as above
  OperationLog::replace_empty({.directory = point_->directory / "log", .storage_id = id()}, now.sequence + 1,
                              encode_counters(now));
  point_->manifest = manifest;
  point_->sequence = now.sequence;
  log_->note_synced(now.sequence);
  return true;
}

void Storage::commit_recovery_point(CommitRecord record) {
  const std::lock_guard cutting(cutting_);
  std::optional<CommitRecord> before;
  bool begun = false;
  const auto begin = [&] {  // the order lock is held
    check_writable();
    append(RecordType::kCommit, {});
    before = std::exchange(last_commit_, std::move(record));
    begun = true;
  };
  try {
    if (!advance_recovery_point(begin)) make_recovery_point(begin, /*with_presence=*/false);
  } catch (...) {
    const std::lock_guard order(order_);
    if (begun) last_commit_ = before;
    throw;
  }
}

void Storage::close_at_recovery_point() {
  const std::lock_guard cutting(cutting_);
  bool done = false;
  {
    const std::lock_guard order(order_);
    done = is_recovery_point();
  }
  if (!done) return make_recovery_point({}, /*with_presence=*/true);
  save_presence_if_it_can(point_->directory, log_->last_sequence());
}

// It can be built again from the rows: a full disk is no reason to complain, and less so to lose a recovery point.
void Storage::save_presence_if_it_can(const fs::path& directory, uint64_t sequence) {
  if (!tiers_->presence().complete() && !planted("unfinished presence filter saved")) return;
  try {
    tiers_->presence().save(directory / "presence", sequence);
  } catch (const std::exception&) {
    std::error_code ignored;
    fs::remove(directory / "presence.tmp", ignored);
  }
}

uint64_t Storage::recovery_bytes() const {
  uint64_t bytes = 0;
  if (!point_) return bytes;
  for (const LinkedFile& file : point_->files)
    if (is_table_file(file) && !fs::exists(generation_ / "rocksdb" / file.name)) bytes += file.bytes;
  return bytes;
}

}  // namespace damo
