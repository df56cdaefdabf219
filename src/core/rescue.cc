// SPDX-License-Identifier: Apache-2.0
//
// Reading everything, to see whether it is whole; and bringing what is whole of a damaged storage into a new one.
//
// A row that can be read is not always a row to keep. Where a block of a table file is damaged, an older table may
// still have an older version of its rows; and an update in the log that finds no row would start from first weights.
// So a range of keys that cannot be read from all tables is lost as a whole, also for the log. And behind the first
// record of the log that cannot be read nothing of the log is done: which rows it changed is not known. Nor is anything
// done when a group's filter is lost: which keys got a row is for the filter to say.
#include "rescue.h"

#include <fcntl.h>
#include <stdio.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <map>

#include "budget.h"
#include "checkpoints.h"
#include "error.h"
#include "log_segment.h"
#include "saved_filter.h"
#include "staged_directory.h"
#include "storage.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

constexpr size_t kSalvageMemory = size_t{64} << 20;
constexpr size_t kSalvageBatch = 4096;

// The next stored key; nothing after the last one.
std::optional<StoredKey> successor(const StoredKey& key) {
  if (key.mixed() != std::numeric_limits<uint64_t>::max()) return StoredKey::make(key.table_id(), key.mixed() + 1);
  if (key.table_id() == std::numeric_limits<uint32_t>::max()) return std::nullopt;
  return StoredKey::make(key.table_id() + 1, 0);
}

using Visit = std::function<void(const StoredKey& key, Bytes value)>;
using Lost = std::function<void(const StoredKey& first, const StoredKey& last, const std::string& what)>;  // both in

// Every row of a table; what cannot be read is told and passed over.
void scan_past_damage(const Store& store, const StoreSnapshot& rows, uint32_t table_id, const Visit& visit,
                      const Lost& lost) {
  const StoredKey end = StoredKey::make(table_id + 1, 0);
  std::optional<StoredKey> from = StoredKey::make(table_id, 0);
  std::optional<StoredKey> lost_from;
  std::string what;
  const auto tell = [&](const StoredKey& until) {  // not included
    if (!lost_from) return;
    const uint64_t last = until.table_id() == table_id ? until.mixed() - 1 : std::numeric_limits<uint64_t>::max();
    lost(*lost_from, StoredKey::make(table_id, last), what);
    lost_from.reset();
  };
  while (from && *from < end) {
    std::optional<StoredKey> reached = from;
    bool reading = true;  // or the error is of who visits
    try {
      const auto row = rows.scan(*from, end);
      while (row->next()) {
        reading = false;
        tell(*from);
        visit(row->key(), row->value());
        reading = true;
        reached = successor(row->key());
      }
      reading = false;
      tell(*from);
      return;
    } catch (const ClosedError&) {
      throw;
    } catch (const Error& wrong) {
      if (!reading) throw;
      if (!lost_from) {
        lost_from = reached;
        what = wrong.what();
      }
    }
    if (!reached) return;
    from = store.place_after(*reached);
  }
  tell(end);
}

uint64_t unmixed(const StoredKey& key) { return unmix_key(key.mixed()); }

Damage range_of(const std::string& file, const TableSpec& spec, const StoredKey& first, const StoredKey& last,
                const std::string& what) {
  Damage damage{file, what, spec.group, {}, {}};
  if (first == last) damage.key = unmixed(first);
  damage.mixed = {first.mixed(), last.mixed()};
  return damage;
}

Manifest read_manifest(const fs::path& file) {
  const std::string bytes = read_file(file, kMaxManifestBytes);
  Manifest manifest = decode_manifest(std::as_bytes(std::span(bytes)), file.string());
  check_settings_are_known(manifest, file.string());
  return manifest;
}

// Segments before the one that starts behind the operation `cut` were to be removed, and would count keys twice. False
// if it cannot be told which those are.
bool leave_out_dropped(SegmentFiles& files, const StorageId& id, uint64_t cut) {
  if (cut == 0 || files.segments.empty()) return true;
  for (auto next = files.segments.rbegin(); next != files.segments.rend(); ++next) {
    uint64_t first = 0;
    try {
      const FileDescriptor file("salvage", next->second, O_RDONLY);
      first = SegmentReader(file, id).first_sequence();
    } catch (const Error&) {
      return false;
    }
    if (first > cut + 1) continue;
    files.segments.erase(files.segments.begin(), files.segments.find(next->first));
    return first == cut + 1;
  }
  return true;
}

// Rows are lost, and the log tells of others: at open they are counted as they are.
void count_anew(StorageCounters& counters, const Manifest& manifest) {
  for (const TableSpec& spec : manifest.tables)
    if (std::none_of(counters.tables.begin(), counters.tables.end(),
                     [&](const auto& table) { return table.table_id == spec.table_id; }))
      counters.tables.push_back({spec.table_id, 0, {}, {}});
  for (TableCounters& table : counters.tables) {
    table.lifetime = kUnknownLifetime;
    table.rows = {};
  }
}

// What the oldest segment whose head can be read began with.
StorageCounters counters_of_oldest(const SegmentFiles& files, const StorageId& id) {
  for (const auto& [number, path] : files.segments) {
    try {
      const FileDescriptor file("salvage", path, O_RDONLY);
      const SegmentReader reader(file, id);
      return decode_counters(std::as_bytes(std::span(reader.state())), path.string());
    } catch (const Error&) {
      // It is among what is lost already.
    }
  }
  return {};
}

// Those that an operation changes rows of.
std::vector<uint32_t> tables_of(const LogRecord& record) {
  ByteReader body(record.body, record.source, record.offset);
  std::vector<uint32_t> tables;
  switch (record.type) {
    case RecordType::kApplyTogether:
      for (ByteReader& part : decode_together(body)) tables.push_back(part.get<uint32_t>());
      break;
    case RecordType::kApply:
    case RecordType::kInsert:
    case RecordType::kErase:
    case RecordType::kCount:
    case RecordType::kImport:
      tables.push_back(body.get<uint32_t>());
      break;
    case RecordType::kExpire:
    case RecordType::kCommit:
      break;
  }
  return tables;
}

// Reads a segment's records in order until one is bad; false then, with what is wrong in `damages`.
bool read_segment(const fs::path& path, const StorageId& id, bool is_newest, std::optional<uint64_t>& last,
                  std::vector<Damage>& damages, const std::function<void(const SegmentReader&)>& head,
                  const std::function<void(const LogRecord&)>& visit) {
  const auto bad = [&](uint64_t offset, const std::string& what) {
    damages.push_back({path.string(), "at offset " + std::to_string(offset) + ": " + what, {}, {}, {}});
    return false;
  };
  uint64_t offset = 0;
  bool reading = true;  // or the error is of who visits
  try {
    const FileDescriptor file("verify", path, O_RDONLY);
    SegmentReader reader(file, id);
    if (last && reader.first_sequence() != *last + 1)
      return bad(40, "it starts with operation " + std::to_string(reader.first_sequence()) + ", expected " +
                         std::to_string(*last + 1));
    last = reader.first_sequence() - 1;
    reading = false;
    head(reader);
    reading = true;
    while (!reader.at_end()) {
      offset = reader.offset();
      LogRecord record;
      const std::optional<std::string> wrong = reader.read(record);
      // Behind what is synced, the end of the newest segment may be torn: there the log ends.
      if (wrong && is_newest && offset >= reader.mark().offset) return true;
      if (wrong) return bad(offset, *wrong);
      if (record.sequence != *last + 1)
        return bad(offset,
                   "it has operation " + std::to_string(record.sequence) + ", expected " + std::to_string(*last + 1));
      reading = false;
      visit(record);
      reading = true;
      last = record.sequence;
      reader.next();
    }
    return true;
  } catch (const Error& wrong) {
    if (!reading) throw;
    damages.push_back({path.string(), wrong.what(), {}, {}, {}});
    return false;
  }
}

}  // namespace

// ------------------------------------------------------------------ verify

VerifyReport Storage::verify() {
  const Use use(*this, "verify");
  VerifyReport report;
  const std::lock_guard cutting(cutting_);  // no segment goes meanwhile
  CutInfo info;
  const bool filtered = tiers_->presence().complete();  // else it says nothing yet
  const std::shared_ptr<const StoreSnapshot> rows = snapshot(info);
  const auto attempt = [&](const fs::path& file, const auto& read) {
    try {
      read();
    } catch (const ClosedError&) {
      throw;
    } catch (const Error& wrong) {
      report.damages.push_back({file.string(), wrong.what(), {}, {}, {}});
    }
  };
  const fs::path& record = record_directory();
  if (options_.read_only) {
    verify_files(report);
  } else {
    attempt(path_ / "CURRENT", [&] { (void)directory_->generation(); });
    attempt(record / "MANIFEST", [&] { read_manifest(record / "MANIFEST"); });
    const SegmentFiles log = list_segments(record / "log");
    std::optional<uint64_t> last;
    for (const auto& [number, path] : log.segments) {
      const bool is_newest = number == log.segments.rbegin()->first;
      std::unique_lock order(order_, std::defer_lock);
      if (is_newest) order.lock();  // it does not grow meanwhile; the cut began it, so it is short
      if (!read_segment(
              path, info.manifest.storage_id, is_newest, last, report.damages, [](const SegmentReader&) {},
              [&](const LogRecord&) { ++report.records; }))
        last.reset();
      ++report.files;
      std::error_code ignored;
      report.bytes += fs::file_size(path, ignored);
    }

    for (const TableSpec& spec : info.manifest.tables) {
      if (!spec.admission || spec.admission->saved == 0) continue;
      const SavedFilter saved{info.manifest.storage_id, spec.table_id, spec.admission->saved};
      attempt(record / saved.name(), [&] {
        CountingBloomFilter filter(spec.admission->filter);
        read_saved_filter(record, saved, filter);
      });
      ++report.files;
    }
  }

  const fs::path cold = generation_ / "rocksdb";
  for (const StoreDamage& damage : store_->verify(report.files, report.bytes))
    report.damages.push_back({damage.file.string(), damage.what, {}, {}, {}});

  // Those of the recovery point that this process does not read itself.
  for (const LinkedFile& file : point_ ? point_->files : std::vector<LinkedFile>()) {
    const fs::path path = record / "rocksdb" / file.name;
    std::error_code ignored;
    if (fs::equivalent(path, cold / file.name, ignored)) continue;
    attempt(path, [&] {
      if (crc32c_of_file(path) != file.crc32c || fs::file_size(path) != file.bytes)
        throw CorruptionError("[verify] " + path.string() + " is damaged: the checksum of its bytes (offset 0 to " +
                              std::to_string(file.bytes) + ") does not agree");
    });
    ++report.files;
    report.bytes += file.bytes;
  }

  uint64_t not_in_filter = 0;
  for (const TableSpec& spec : info.manifest.tables) {
    const TableShape shape(spec);
    const Expiry expiry = info.expiry(spec);
    const size_t before = report.damages.size();
    uint64_t alive = 0;
    scan_past_damage(
        *store_, *rows, spec.table_id,
        [&](const StoredKey& key, Bytes value) {
          if (filtered && !tiers_->presence().may_contain(key)) ++not_in_filter;
          try {
            const DecodedRow row = decode_row(key, value, shape.num_floats());
            alive += expiry.alive(row.header.time, row.header.step);
            ++report.rows;
          } catch (const NewerVersionError&) {
            throw;
          } catch (const CorruptionError& wrong) {
            report.damages.push_back(range_of(cold.string(), spec, key, key, wrong.what()));
          }
        },
        [&](const StoredKey& first, const StoredKey& until, const std::string& what) {
          report.damages.push_back(range_of(cold.string(), spec, first, until, what));
        });
    if (report.damages.size() != before) continue;  // rows are missing, of course
    uint64_t counted = 0;
    for (const TableCounters& table : info.counters.tables)
      if (table.table_id == spec.table_id) counted = table.rows.since(spec.lifetime.first_bucket(expiry));
    if (counted != alive)
      report.damages.push_back(
          {cold.string(),
           spec.label() + " has " + std::to_string(alive) + " rows, but " + std::to_string(counted) + " are counted",
           spec.group,
           {},
           {}});
  }
  if (not_in_filter > 0)
    report.damages.push_back({presence_file().string(),
                              std::to_string(not_in_filter) + " rows are absent for the filter of keys on disk",
                              {},
                              {},
                              {}});
  return report;
}

// ----------------------------------------------------------------- salvage

SalvageReport Storage::salvage(const fs::path& path, const fs::path& out, const fs::path& manifest_of) {
  const fs::path from = fs::absolute(path).lexically_normal();
  fs::path wanted = fs::absolute(out).lexically_normal();
  if (!wanted.has_filename()) wanted = wanted.parent_path();
  if (!fs::is_directory(from)) throw StorageError("[salvage] " + from.string() + " is not a directory");
  if (fs::exists(fs::symlink_status(wanted)) && !(fs::is_directory(wanted) && fs::is_empty(wanted)))
    throw StorageError("[salvage] " + wanted.string() + " exists already: give an absent or empty directory");
  if (!fs::is_directory(wanted.parent_path()))
    throw StorageError("[salvage] the directory " + wanted.parent_path().string() + " does not exist: make it first");
  check_is_not_of_storage("salvage", wanted, from, /*nothing_in_it=*/true);
  std::optional<FileLock> lock;
  try {
    if (fs::exists(from / "LOCK")) lock.emplace(from / "LOCK", FileLock::Words{from.string(), "Storage", "directory"});
  } catch (const StorageError&) {
    // A disk that is mounted to be read only: nobody has it open to write.
  }

  SalvageReport report;
  const auto note = [&](const fs::path& file, const std::string& what) {
    report.lost.push_back({file.string(), what, {}, {}, {}});
  };
  fs::path generation;
  try {
    generation = live_generation(from);
  } catch (const Error& wrong) {
    std::vector<fs::path> found;
    for (const fs::path& path : list_directory("salvage", from))
      if (path.filename().string().starts_with("generation-")) found.push_back(path);
    // The one in which a process in mode commit worked has none, and is not a storage by itself.
    if (found.size() > 1) std::erase_if(found, [](const fs::path& one) { return !fs::exists(one / "MANIFEST"); });
    if (found.empty() && !fs::exists(from / "CURRENT"))
      throw StorageError("[salvage] " + from.string() +
                         (fs::exists(from / "CHECKPOINT")
                              ? " is a checkpoint: restore it into another directory with Storage.restore(checkpoint,"
                                " path), or look at it with Storage(checkpoint, read_only=True)"
                              : " is not a storage: it has no generation-* directory; give that of a storage"));
    if (found.size() != 1)
      throw CorruptionError("[salvage] " + from.string() + " has " + std::to_string(found.size()) +
                            " generations, and which of them counts is not known: " + wrong.what());
    generation = found.front();
    note(from / "CURRENT", wrong.what());
  }
  Manifest manifest;
  try {
    manifest = read_manifest(generation / "MANIFEST");
  } catch (const NewerVersionError&) {
    throw;
  } catch (const Error& wrong) {
    if (manifest_of.empty())
      throw CorruptionError(
          "[salvage] without its MANIFEST it is not known how rows are to be read: give a checkpoint"
          " of this storage as manifest_of. " +
          std::string(wrong.what()));
    manifest = read_manifest(manifest_of / "MANIFEST");
    note(generation / "MANIFEST", std::string(wrong.what()) + "; groups are those of " + manifest_of.string());
  }
  const StorageId damaged_id = manifest.storage_id;
  manifest.storage_id = make_restored_id(damaged_id);
  std::sort(manifest.tables.begin(), manifest.tables.end(),
            [](const auto& one, const auto& other) { return one.table_id < other.table_id; });

  const fs::path cold = generation / "rocksdb";
  std::unique_ptr<Store> source;
  try {
    StoreOptions options;
    options.directory = cold;
    options.read_only = true;
    options.tolerate_damage = true;
    source = open_rocksdb_store(options);
  } catch (const Error& wrong) {
    throw CorruptionError(
        "[salvage] which table files count is not known, so no row can be told from an old one:"
        " restore a checkpoint. " +
        std::string(wrong.what()));
  }

  struct Range {
    uint32_t table_id;
    StoredKey first, last;  // both in
  };
  std::vector<Range> ranges;
  uint64_t newest_row = 0;
  int64_t newest_time = 0;
  std::map<uint32_t, uint64_t> newest_steps;  // by table

  StagedDirectory staged(wanted, building_suffix(manifest.storage_id));
  const fs::path& scratch = staged.path();
  {
    StorageDirectory directory(scratch, OpenMode::kOpenOrCreate);
    directory.replace_generation([&](const fs::path& fresh) {
      StoreOptions options;
      options.directory = fresh / "rocksdb";
      const std::unique_ptr<Store> target = open_rocksdb_store(options);
      const std::unique_ptr<StoreWriter> writer = target->begin_write();
      const std::shared_ptr<const StoreSnapshot> rows = source->snapshot();
      for (const TableSpec& spec : manifest.tables) {
        const TableShape shape(spec);
        scan_past_damage(
            *source, *rows, spec.table_id,
            [&](const StoredKey& key, Bytes value) {
              try {
                const RowHeader header = decode_row(key, value, shape.num_floats()).header;
                newest_row = std::max(newest_row, header.sequence);
                newest_time = std::max(newest_time, header.time);
                newest_steps[spec.table_id] = std::max<uint64_t>(newest_steps[spec.table_id], header.step);
              } catch (const NewerVersionError&) {
                throw;
              } catch (const CorruptionError& wrong) {
                report.lost.push_back(range_of(cold.string(), spec, key, key, wrong.what()));
                ranges.push_back({spec.table_id, key, key});
                return;
              }
              writer->put(key, value);
            },
            [&](const StoredKey& first, const StoredKey& last, const std::string& what) {
              report.lost.push_back(range_of(cold.string(), spec, first, last, what));
              ranges.push_back({spec.table_id, first, last});
            });
      }
      writer->commit();
      target->close();

      // The log, up to where it can be read.
      make_directory(fresh / "log");
      std::unique_ptr<OperationLog> log;
      SegmentFiles files = list_segments(generation / "log");
      const SegmentFiles all_files = files;
      if (files.segments.empty()) note(generation / "log", "there is no segment of the log");
      if (!leave_out_dropped(files, damaged_id, manifest.cut)) {
        note(generation / "log",
             "it is lost, but for rows that have been written to the table files since: it is not"
             " known where it starts");
        files.segments.clear();
      }
      bool filter_lost = false;
      for (TableSpec& spec : manifest.tables) {
        if (!spec.admission || spec.admission->saved == 0) continue;
        const SavedFilter saved{damaged_id, spec.table_id, spec.admission->saved};
        try {
          reseal_saved_filter(generation, saved, spec.admission->filter, fresh,
                              {manifest.storage_id, saved.table_id, saved.sequence});
        } catch (const CorruptionError& wrong) {
          report.lost.push_back({(generation / saved.name()).string(),
                                 std::string(wrong.what()) + "; the filter of " + spec.label() + " counts anew",
                                 spec.group,
                                 {},
                                 {}});
          spec.admission->saved = 0;
          filter_lost = true;
        }
      }
      if (filter_lost && !files.segments.empty()) {
        note(generation / "log",
             "it is lost, but for rows that have been written to the table files since: without the"
             " filter it is not known which keys got a row");
        files.segments.clear();
      }
      if (files.segments.empty()) manifest.cut = 0;
      std::optional<uint64_t> last;
      uint64_t expected = files.segments.empty() ? 0 : files.segments.begin()->first;
      for (const auto& [number, path] : files.segments) {
        const fs::path& segment = path;  // a name that lambdas may take (Clang before 16)
        const bool whole =
            number == expected++ &&
            read_segment(
                segment, damaged_id, number == files.segments.rbegin()->first, last, report.lost,
                [&](const SegmentReader& reader) {
                  if (log) return;
                  StorageCounters counters =
                      decode_counters(std::as_bytes(std::span(reader.state())), segment.string());
                  count_anew(counters, manifest);
                  log = OperationLog::create({.directory = fresh / "log", .storage_id = manifest.storage_id},
                                             reader.first_sequence(), encode_counters(counters));
                },
                [&](const LogRecord& record) {
                  for (const uint32_t table_id : tables_of(record)) {
                    if (table_id < manifest.next_table_id || table_id >= uint32_t{1} << 31) continue;
                    note(segment, "rows of table " + std::to_string(table_id) + ", a group that is not known");
                    manifest.next_table_id = table_id + 1;
                  }
                  const std::array<Bytes, 1> parts{record.body};
                  log->append(record.type, parts);
                  ++report.records;
                });
        if (whole) continue;
        note(segment, "operations " + (last ? "from " + std::to_string(*last + 1) + " on" : std::string("of the log")) +
                          " are lost, but for rows that have been written to the table files since");
        break;
      }
      if (!log) {
        // Steps, clock and commit are those of the oldest head that can be read, or later where a row says so. And no
        // number is given twice: a filter's file is of an operation, too.
        StorageCounters counters = counters_of_oldest(all_files, damaged_id);
        count_anew(counters, manifest);
        for (TableCounters& table : counters.tables)
          table.group_step = std::max(table.group_step, newest_steps[table.table_id]);
        counters.clock = std::max(counters.clock, newest_time);
        counters.sequence = std::max(counters.sequence, newest_row);
        for (const TableSpec& spec : manifest.tables)
          if (spec.admission) counters.sequence = std::max(counters.sequence, spec.admission->saved);
        log = OperationLog::create({.directory = fresh / "log", .storage_id = manifest.storage_id},
                                   counters.sequence + 1, encode_counters(counters));
      }
      log->sync();
      std::sort(manifest.tables.begin(), manifest.tables.end(),
                [](const auto& one, const auto& other) { return one.group < other.group; });
      write_file_atomically(fresh / "MANIFEST", encode_manifest(manifest));
    });
  }
  source->close();

  StorageOptions options;
  options.memory_bytes = kSalvageMemory;
  while (Budget(options.memory_bytes).filters() < filter_bytes(manifest)) options.memory_bytes += kSalvageMemory;
  StorageCounters counters;
  {
    const std::unique_ptr<Storage> storage = open(scratch, options, OpenMode::kOpen);
    storage->set_now(0);  // the time of the last operation: what is alive then is brought along
    // Rows that the log made anew in the place of lost ones.
    CutInfo info;
    std::shared_ptr<const StoreSnapshot> rows = storage->snapshot(info);
    for (const Range& range : ranges) {
      Table* table = storage->table_by_id(range.table_id);
      if (table == nullptr) continue;
      std::vector<uint64_t> keys;
      const auto row = rows->scan(range.first, successor(range.last));
      for (bool more = true; more;) {
        more = row->next();
        if (more) keys.push_back(unmixed(row->key()));
        if (keys.size() < (more ? kSalvageBatch : 1)) continue;
        table->erase(keys);
        keys.clear();
      }
    }
    rows.reset();
    storage->cut_log();
    for (const auto& group : storage->stats().groups) report.rows += group.rows;
    {
      const std::lock_guard order(storage->order_);
      counters = storage->counters();
    }
    storage->close();
  }
  if (counters.sequence < newest_row) {
    // The log ended before some rows were written. An operation to come has a higher number than every row, or redo
    // would take it for done.
    counters.sequence = newest_row;
    const fs::path log = live_generation(scratch) / "log";
    remove_tree("salvage", log);
    make_directory(log);
    OperationLog::create({.directory = log, .storage_id = manifest.storage_id}, newest_row + 1,
                         encode_counters(counters));
  }
  fs::remove(scratch / "LOCK");
  if (fs::is_directory(wanted)) fs::remove(wanted);
  staged.publish("salvage");
  return report;
}

}  // namespace damo
