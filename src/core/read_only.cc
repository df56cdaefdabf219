// SPDX-License-Identifier: Apache-2.0
//
// A storage that is open to be read only: no lock, no byte of the directory changed, beside a writer or without one.
//
// What is seen is what an opening after a crash would have seen at one moment: the cold tier, and the log done again up
// to its end. Beside a writer the parts of the directory are not of one moment, so they are taken in an order in which
// later ones never lack what earlier ones need:
//
//   1. CURRENT, and the files of all segments of the log, opened
//   2. MANIFEST, and the files of the filters that it names, opened
//   3. the cold tier, all its tables opened
//   4. the segments that came since; where the newest one ends now is the end of the view
//   5. CURRENT and MANIFEST once more
//
// A row is in the cold tier only if the log was synced past it, so 4 has all that 3 may have. The log is cut only below
// what the cold tier and the filters' files have, so 2 and 3 have all that 1 has not. A writer removes a generation
// only after CURRENT names another; that it did not, and that no group came or went, is what 5 is for. From then on
// everything is in files that are open, and read in peace.
//
// What vanishes or changes in between makes one of the steps fail, and the whole is tried again. An error is believed
// when the directory has stood still.
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>

#include "budget.h"
#include "checkpoints.h"
#include "error.h"
#include "log_view.h"
#include "rescue.h"
#include "saved_filter.h"
#include "storage.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

// A writer that cuts its log without a pause lets a view through every few milliseconds.
constexpr int kAttempts = 100;
constexpr std::chrono::milliseconds kPause{10};  // between two of them, at most
constexpr size_t kVerifyCache = size_t{1} << 20;

// All names below a directory, with what changes when their contents do: inode, length, time.
using Traces = std::map<std::string, std::tuple<ino_t, off_t, time_t, long>>;

void add_traces(const fs::path& directory, Traces& traces) {
  for (const fs::path& path : list_directory("open", directory)) {
    struct stat info {};
    if (::lstat(path.c_str(), &info) != 0) continue;
    traces[path.string()] = {info.st_ino, info.st_size, info.st_mtim.tv_sec, info.st_mtim.tv_nsec};
    if (S_ISDIR(info.st_mode)) add_traces(path, traces);
  }
}

Traces traces_of(const fs::path& directory) {
  Traces traces;
  try {
    add_traces(directory, traces);
  } catch (const StorageError&) {
    // One that goes away meanwhile, or may not be read: what there is of it is compared.
  }
  return traces;
}

// Calls `look` until it gets through. What it throws counts when the directory has stood still meanwhile, or at last.
template <class Look>
auto look_beside_a_writer(const fs::path& directory, int attempts, const Look& look) {
  for (int attempt = 1;; ++attempt) {
    const Traces before = traces_of(directory);
    try {
      return look();
    } catch (const std::exception&) {
      if (attempt == attempts || traces_of(directory) == before) throw;
    }
    std::this_thread::sleep_for(std::min(kPause, std::chrono::milliseconds(attempt)));
  }
}

// What a cut of the log changes in the manifest aside.
std::string groups_in(Manifest manifest) {
  manifest.cut = 0;
  for (TableSpec& spec : manifest.tables)
    if (spec.admission) spec.admission->saved = 0;
  return encode_manifest(manifest);
}

}  // namespace

// -------------------------------------------------------------------- view

struct Storage::View {
  fs::path generation;
  std::unique_ptr<LogView> log;  // null: a checkpoint, which needs none
  StorageCounters counters;      // of a checkpoint
  Manifest manifest;
  std::map<uint32_t, FileDescriptor> filters;  // by table id
  FileDescriptor presence;                     // not open: there is none
  std::unique_ptr<Store> rows;

  void hold_files(size_t cache_bytes);
};

// All but the log.
void Storage::View::hold_files(size_t cache_bytes) {
  manifest = manifest_of(generation);
  for (const TableSpec& spec : manifest.tables)
    if (spec.admission && spec.admission->saved != 0)
      filters[spec.table_id] =
          open_saved_filter(generation, {manifest.storage_id, spec.table_id, spec.admission->saved});
  try {
    // Of no later moment than the rows: it may have been built anew since, without what was erased.
    presence = FileDescriptor("open", generation / "presence", O_RDONLY);
  } catch (const MissingFileError&) {
  }
  StoreOptions options;
  options.directory = generation / "rocksdb";
  options.cache_bytes = cache_bytes;
  options.read_only = true;
  options.hold_files = true;
  rows = open_rocksdb_store(options);
}

Storage::View Storage::hold_view(const StorageDirectory& directory, size_t cache_bytes) {
  if (directory.is_checkpoint()) {
    // Nobody changes it; its rows' bytes are looked at when they are read.
    View view;
    view.generation = directory.path();
    const CheckpointManifest made = read_checkpoint(view.generation);
    check_lengths(view.generation, made);
    view.counters = restored_counters(made);
    view.hold_files(cache_bytes);
    return view;
  }
  return look_beside_a_writer(directory.path(), kAttempts, [&] {
    View view;
    view.generation = directory.generation();
    check_parts(view.generation);
    // Whose log it is, which never changes.
    const StorageId id = manifest_of(view.generation).storage_id;
    view.log = std::make_unique<LogView>(view.generation / "log", id);
    view.hold_files(cache_bytes);
    view.log->extend();
    if (groups_in(manifest_of(view.generation)) != groups_in(view.manifest) ||
        directory.generation() != view.generation)
      throw StorageError("[open] " + directory.path().string() +
                         " changes faster than it can be looked at: try again, or open a checkpoint of it");
    return view;
  });
}

// -------------------------------------------------------------------- open

std::unique_ptr<Storage> Storage::open_read_only(const fs::path& path, const StorageOptions& options) {
  const size_t cache_bytes = Budget(options.memory_bytes).cache;
  auto storage =
      std::make_unique<Storage>(Private{}, std::make_unique<StorageDirectory>(path, OpenMode::kReadOnly), options);
  storage->open_view(hold_view(*storage->directory_, cache_bytes - cache_bytes / 4));
  return storage;
}

void Storage::open_view(View view) {
  generation_ = view.generation;
  manifest_ = std::move(view.manifest);
  check_filter_memory("open", 0);
  for (const TableSpec& spec : manifest_.tables) {
    tables_[spec.group] = std::make_unique<Table>(*this, spec);
    tables_by_id_[spec.table_id] = tables_[spec.group].get();
    const auto saved = view.filters.find(spec.table_id);
    if (saved != view.filters.end())
      read_saved_filter(saved->second, {manifest_.storage_id, spec.table_id, spec.admission->saved},
                        *tables_[spec.group]->admission()->filter);
  }
  next_table_id_ = manifest_.next_table_id;

  // Rows that the log changes and that do not fit into memory have to go somewhere.
  const Budget budget(options_.memory_bytes);
  StoreOptions above;
  above.directory = generation_ / "rocksdb";  // what messages name
  above.cache_bytes = budget.cache / 4;
  above.write_bytes = budget.write;
  store_ = open_layered_store(std::move(view.rows), budget.write, above);
  tiers_ = std::make_unique<Tiers>(
      budget.rows, budget.presence, std::bit_ceil(std::clamp<size_t>(pool_->size() * 4, 8, 256)), *store_, *pool_,
      [](uint64_t) {},  // the log is somebody else's
      [this](uint32_t table_id) -> const TableShape* {
        const Table* table = table_by_id(table_id);
        return table != nullptr ? &table->shape() : nullptr;
      });
  tiers_->lend(check_filter_memory("open", 0));

  const auto begin = [&](const StorageCounters& counters) {
    redo_sequence_ = counters.sequence;
    // Where there is none, every key is looked for on the disk: to build it would be to read all rows.
    if (store_->stats().files == 0 ||
        (view.presence.is_open() && tiers_->presence().load(view.presence, counters.sequence)))
      tiers_->presence().set_complete();
    clock_ = counters.clock;
    last_commit_ = counters.last_commit;
    for (const TableCounters& table : counters.tables)
      if (Table* known = table_by_id(table.table_id)) known->set_counters(table);
  };
  if (view.log) {
    view_log_bytes_ = view.log->bytes();
    view_synced_ = view.log->synced_sequence();
    view.log->read(
        [&](uint64_t first_sequence, std::string_view state) {
          StorageCounters counters =
              decode_counters(std::as_bytes(std::span(state)), (generation_ / "log" / "(oldest segment)").string());
          counters.sequence = first_sequence - 1;
          begin(counters);
        },
        [&](const LogRecord& record) { redo(record); }, manifest_.cut);
  } else {
    begin(view.counters);
    view_synced_ = view.counters.sequence;
  }
  note_lifetimes();
  for (const auto& table : tables_)
    if (table && table->counters().lifetime != table->spec().lifetime) count_rows_anew(*table);
  prefetcher_ = start_quiet_thread([this] { prefetch_loop(); });
}

// The log's counts are of another lifetime than the manifest's, after a kill amid a change of it.
void Storage::count_rows_anew(Table& table) {
  const TableSpec& spec = table.spec();
  CutInfo info;
  const std::shared_ptr<const StoreSnapshot> rows = snapshot(info);
  const Expiry expiry = spec.lifetime.at(info.now, table.step());
  AgeCounts counts;
  const auto row = rows->scan(StoredKey::make(spec.table_id, 0), StoredKey::make(spec.table_id + 1, 0));
  while (row->next()) {
    const RowHeader header = decode_row(row->key(), row->value(), table.shape().num_floats()).header;
    if (expiry.alive(header.time, header.step))
      counts.add(spec.lifetime.bucket(expiry.mark(header.time, header.step)), 1);
  }
  const std::lock_guard order(order_);
  table.adopt(spec.lifetime, spec.own_lifetime, std::move(counts));
}

// ------------------------------------------------------------------- verbs

void Storage::throw_no_such_group(const TableSpec& wanted) const {
  std::string known;
  for (const TableSpec& spec : manifest_.tables) known += (known.empty() ? "" : ", ") + spec.label();
  throw ReadOnlyError("[embedding] there is no " + wanted.label() + " in " + path_.string() +
                      ", which is open read-only: it has " + (known.empty() ? "none" : known) +
                      "; open it without read_only to make one");
}

// What a new opening would read, but for the rows.
void Storage::verify_files(VerifyReport& report) const {
  const auto attempt = [&](const auto& read) {
    try {
      read();
    } catch (const ClosedError&) {
      throw;
    } catch (const Error& wrong) {
      report.damages.push_back({path_.string(), wrong.what(), {}, {}, {}});
    }
  };
  if (directory_->is_checkpoint()) {
    attempt([&] { verify_checkpoint(path_); });
    ++report.files;
    return;
  }
  attempt([&] {
    const View view = hold_view(*directory_, kVerifyCache);
    report.files += view.log->num_segments() + view.filters.size();
    report.bytes += view.log->bytes();
    attempt([&] {
      view.log->read([](uint64_t, std::string_view) {}, [&](const LogRecord&) { ++report.records; }, view.manifest.cut);
    });
    for (const TableSpec& spec : view.manifest.tables) {
      const auto saved = view.filters.find(spec.table_id);
      if (saved == view.filters.end()) continue;
      attempt([&] {
        CountingBloomFilter filter(spec.admission->filter);
        read_saved_filter(saved->second, {view.manifest.storage_id, spec.table_id, spec.admission->saved}, filter);
      });
    }
  });
}

}  // namespace damo
