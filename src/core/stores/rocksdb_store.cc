// SPDX-License-Identifier: Apache-2.0
//
// The cold tier on RocksDB: only this file and rocksdb_files.cc, its view of the file system, include rocksdb/.
//
// Nothing ever passes through RocksDB's memtable or write-ahead log. A writer
// streams its sorted entries into table files of its own
// ("<directory>/ingest.tmp/N.sst"); commit() hands all of them to one
// IngestExternalFiles call, which links and syncs them, syncs the directory and
// adds them to the synced manifest in one edit: all or nothing, and durable.
// RocksDB keeps each file's CRC-32C in the manifest; for ingested files it is
// the one the table writer made on the way, so nothing is read again.
//
// Every Status goes through check() or a line that says why not. A read ends in
// the value, in "absent", or in an exception. The first failed write is latched.
//
// RocksDB takes a damaged end of its manifest for a write that power loss cut
// short: it drops the edit and deletes the tables it told of. So each commit
// notes its sequence number in a file of ours, "COMMITTED", and a manifest that
// knows less is CorruptionError, found before anything is deleted.
#include <fcntl.h>
#include <rocksdb/cache.h>
#include <rocksdb/compaction_filter.h>
#include <rocksdb/convenience.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/file_checksum.h>
#include <rocksdb/file_system.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/listener.h>
#include <rocksdb/memory_allocator.h>
#include <rocksdb/metadata.h>
#include <rocksdb/snapshot.h>
#include <rocksdb/sst_file_writer.h>
#include <rocksdb/table.h>
#include <rocksdb/universal_compaction.h>
#include <rocksdb/version.h>
#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <shared_mutex>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "../error.h"
#include "../file.h"
#include "../planted.h"
#include "../store.h"
#include "block_pool.h"
#include "blocked_signals.h"
#include "commit_mark.h"
#include "forked_exit.h"
#include "read_pool.h"
#include "rocksdb_files.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

constexpr char kIngestDirectory[] = "ingest.tmp";
constexpr char kMarkName[] = "COMMITTED";
constexpr uint64_t kTableFileBytes = 64 << 20;

// RocksDB splits a MultiGet into batches of 32 by itself; each key of a batch pins one block, so a read thread
// holds at most 32 blocks.
constexpr size_t kMaxChunk = 32;
// Fewer keys than this are not worth waking a thread for.
constexpr size_t kMinChunk = 8;

// A commit waits for compaction while there are this many overlapping table files on top: each costs a lookup one
// filter probe, and their filters and indexes crowd the block cache.
constexpr int kMaxTopFiles = 40;
// ... but no longer than this: a slow disk makes commits slow, a stuck compaction does not make them fail.
constexpr std::chrono::seconds kMaxWait{30};

rocksdb::Slice slice(const StoredKey& key) {
  return {reinterpret_cast<const char*>(key.bytes.data()), StoredKey::kBytes};
}
rocksdb::Slice slice(Bytes bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }
Bytes bytes_of(const rocksdb::Slice& slice) { return std::as_bytes(std::span(slice.data(), slice.size())); }

// The one place where RocksDB's answers become our errors.
void check(std::string_view operation, const fs::path& directory, const rocksdb::Status& status) {
  if (status.ok()) return;
  const std::string message = "[" + std::string(operation) + "] " + directory.string() + ": " + status.ToString();
  if (status.IsCorruption()) throw CorruptionError(message);
  if (status.IsNoSpace()) throw DiskFullError(message);
  throw StorageError(message);
}

void check_opened(const fs::path& directory, const rocksdb::Status& status) {
  // CURRENT names a manifest, which names tables: to RocksDB one that is missing is an I/O error.
  if (std::error_code ignored; status.IsPathNotFound() && fs::exists(directory, ignored))
    throw CorruptionError("[open] " + directory.string() + ": " + status.ToString() +
                          " (RocksDB's file CURRENT, or a file that it leads to, is damaged or lost)");
  check("open", directory, status);
}

// RocksDB keeps no log of its own doings: on a full disk its logger trips an assertion that distributions compile in,
// and a read-only open writes no file at all.
class NoLogger final : public rocksdb::Logger {
 public:
  using rocksdb::Logger::Logv;
  void Logv(const char*, va_list) override {}
};

// ---------------------------------------------------------------- failures

// The first failed write, and news from RocksDB's background threads.
class WriteState final : public rocksdb::EventListener {
 public:
  explicit WriteState(fs::path directory) : directory_(std::move(directory)) {}

  void latch(std::exception_ptr error) noexcept {
    error = with_way_out(std::move(error));
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::move(error);
    changed_.notify_all();
  }
  std::exception_ptr latched() const {
    const std::lock_guard lock(mutex_);
    return error_;
  }
  void rethrow_latched() const {
    const std::lock_guard lock(mutex_);
    if (error_) std::rethrow_exception(error_);
  }
  void stop_waiting() {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  // Sleeps until a compaction ended, a write failed, the store closes, or `deadline`. False at the deadline.
  bool wait_for_news(uint64_t seen, std::chrono::steady_clock::time_point deadline) const {
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, deadline, [&] { return stopping_ || error_ || compactions_ != seen; });
  }
  uint64_t compactions() const {
    const std::lock_guard lock(mutex_);
    return compactions_;
  }

  const char* Name() const override { return "damo.WriteState"; }
  // Called by RocksDB's threads; must not throw.
  void OnCompactionCompleted(rocksdb::DB*, const rocksdb::CompactionJobInfo&) override {
    const std::lock_guard lock(mutex_);
    ++compactions_;
    changed_.notify_all();
  }
  void OnBackgroundError(rocksdb::BackgroundErrorReason, rocksdb::Status* status) override {
    // A compaction that found the disk full changed nothing and is tried again when space is back.
    if (status->IsNoSpace() && status->severity() <= rocksdb::Status::Severity::kSoftError) return;
    try {
      check("compact", directory_, *status);
    } catch (...) {
      latch(std::current_exception());
    }
  }

 private:
  const fs::path directory_;
  mutable std::mutex mutex_;  // protects what follows
  mutable std::condition_variable changed_;
  std::exception_ptr error_;
  uint64_t compactions_ = 0;
  bool stopping_ = false;
};

// The cache's blocks, so that its size is the memory it takes.
class CacheAllocator final : public rocksdb::MemoryAllocator {
 public:
  const char* Name() const override { return "damo.CacheAllocator"; }
  void* Allocate(size_t bytes) override { return pool_.allocate(bytes); }
  void Deallocate(void* block) override { pool_.free(block); }
  size_t UsableSize(void* block, size_t) const override { return BlockPool::usable_bytes(block); }

 private:
  BlockPool pool_;
};

// -------------------------------------------------------------- disposable

// Leaves disposable entries out of what a compaction writes. RocksDB hides entries that a filter removes from
// snapshots, too, so there is a filter only while there is no snapshot; one that is taken later is of a moment at which
// what the filter takes for disposable was so.
class DisposalFilter final : public rocksdb::CompactionFilter {
 public:
  explicit DisposalFilter(std::shared_ptr<const Store::Disposable> disposable) : disposable_(std::move(disposable)) {}
  const char* Name() const override { return "damo.DisposalFilter"; }
  // Called by RocksDB's threads; must not throw.
  Decision FilterV2(int, const rocksdb::Slice& key, ValueType type, const rocksdb::Slice& value, std::string*,
                    std::string*) const override {
    if (type != ValueType::kValue || key.size() != StoredKey::kBytes) return Decision::kKeep;
    return (*disposable_)(StoredKey::from_bytes(bytes_of(key)), bytes_of(value)) ? Decision::kRemove : Decision::kKeep;
  }

 private:
  const std::shared_ptr<const Store::Disposable> disposable_;
};

class Disposal final : public rocksdb::CompactionFilterFactory {
 public:
  const char* Name() const override { return "damo.Disposal"; }
  std::unique_ptr<rocksdb::CompactionFilter> CreateCompactionFilter(
      const rocksdb::CompactionFilter::Context&) override {
    const std::lock_guard lock(mutex_);
    if (!disposable_ || (snapshots_ > 0 && !planted("expired rows dropped under a snapshot"))) return nullptr;
    return std::make_unique<DisposalFilter>(disposable_);
  }
  void set(Store::Disposable disposable) {
    auto shared = std::make_shared<const Store::Disposable>(std::move(disposable));
    const std::lock_guard lock(mutex_);
    disposable_ = std::move(shared);
  }
  void note_snapshot(int change) {
    const std::lock_guard lock(mutex_);
    snapshots_ += change;
  }

 private:
  std::mutex mutex_;  // protects what follows
  std::shared_ptr<const Store::Disposable> disposable_;
  int snapshots_ = 0;
};

// ----------------------------------------------------------------- options

size_t tables_in(const fs::path& directory) {
  size_t tables = 0;
  for (const fs::path& file : list_directory("open", directory))
    if (file.extension() == ".sst") ++tables;
  return tables;
}

bool is_unmade(const fs::path& directory) {
  return CommitMark::read(directory / kMarkName).value_or(0) == 0 && !fs::exists(directory / "CURRENT") &&
         tables_in(directory) == 0;
}

// For a store that holds all its table files open.
void check_open_files(const fs::path& directory) {
  constexpr rlim_t kOthers = 64;  // files of ours, and those of whoever the process belongs to
  const rlim_t tables = tables_in(directory);
  struct rlimit limit {};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return;
  if (tables + kOthers > limit.rlim_cur)
    throw StorageError("[open] " + directory.string() + " has " + std::to_string(tables) +
                       " table files, which are all held open, and this process may have " +
                       std::to_string(limit.rlim_cur) + " files open: let it have more, e.g. with ulimit -n " +
                       std::to_string(2 * (tables + kOthers)));
}

int max_open_files() {
  // Half of what the process may open is left to its owner. Above the limit RocksDB closes and reopens files.
  struct rlimit limit {};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return 512;
  return static_cast<int>(std::clamp<rlim_t>(limit.rlim_cur / 2, 32, 512));
}

rocksdb::Options make_options(const StoreOptions& settings, std::shared_ptr<WriteState> write_state) {
  rocksdb::BlockBasedTableOptions table;
  // Not strict: a strict cache fails reads when all of it is pinned. What can be pinned at once is bounded
  // (kMaxChunk blocks a read thread, the top of each open file's index), so the excess is, too.
  rocksdb::LRUCacheOptions cache;
  cache.capacity = settings.cache_bytes;
  // A shard must take many of the 256 KiB pieces in which other memory is charged to the cache.
  cache.num_shard_bits = settings.cache_bytes >= (64 << 20) ? 4 : settings.cache_bytes >= (16 << 20) ? 2 : 0;
  cache.strict_capacity_limit = false;
  cache.high_pri_pool_ratio = 0.8;  // filters and indexes: one block of them serves hundreds of rows
  cache.memory_allocator = std::make_shared<CacheAllocator>();
  table.block_cache = rocksdb::NewLRUCache(cache);
  table.cache_index_and_filter_blocks = true;
  table.cache_index_and_filter_blocks_with_high_priority = true;
  table.index_type = rocksdb::BlockBasedTableOptions::kTwoLevelIndexSearch;
  table.partition_filters = true;
  table.metadata_block_size = 4096;
  table.pin_top_level_index_and_filter = true;
  table.pin_l0_filter_and_index_blocks_in_cache = false;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  table.whole_key_filtering = true;
  table.block_size = 4096;
  table.format_version = 5;  // these two are what table_tail.cc reads
  table.checksum = rocksdb::kXXH3;
  const auto charge = [&](rocksdb::CacheEntryRole role) {
    table.cache_usage_options.options_overrides[role].charged = rocksdb::CacheEntryRoleOptions::Decision::kEnabled;
  };
  charge(rocksdb::CacheEntryRole::kFilterConstruction);
  charge(rocksdb::CacheEntryRole::kBlockBasedTableReader);
  charge(rocksdb::CacheEntryRole::kFileMetadata);

  rocksdb::Options options;
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  options.create_if_missing = true;
  options.compression = rocksdb::kNoCompression;  // floats of trained weights do not compress
  options.listeners.push_back(std::move(write_state));

  // Checks.
  options.paranoid_checks = true;
  options.paranoid_file_checks = true;
  options.file_checksum_gen_factory = rocksdb::GetFileChecksumGenCrc32cFactory();

  // Compaction.
  options.compaction_style = rocksdb::kCompactionStyleUniversal;
  options.num_levels = 7;
  options.target_file_size_base = kTableFileBytes;
  options.level0_file_num_compaction_trigger = 8;
  options.compaction_options_universal.max_size_amplification_percent = 100;
  // Nothing is ever deleted because of its age.
  options.ttl = 0;
  options.periodic_compaction_seconds = 0;
  // One merges small tables while another is busy with large ones: with a single one a commit waited up to 22 s for
  // it, with two 3 s. (Of the three jobs one is for flushes, of which there are none.)
  options.max_background_jobs = 3;

  // Memory beside the cache. The memtable stays empty.
  options.write_buffer_size = 64 << 10;
  options.max_open_files = max_open_files();
  options.writable_file_max_buffer_size = std::clamp<size_t>(settings.write_bytes / 16, 64 << 10, 1 << 20);
  // Each input of a compaction has such a buffer, and a compaction may take all the files on top.
  options.compaction_readahead_size = std::clamp<size_t>(settings.write_bytes / (2 * kMaxTopFiles), 32 << 10, 1 << 20);
  options.bytes_per_sync = 1 << 20;  // written to disk as it goes, so that the sync at the end is short

  // Files beside the tables.
  options.max_manifest_file_size = 16 << 20;  // a copy of the store copies it
  options.manifest_preallocation_size = 64 << 10;
  options.info_log = std::make_shared<NoLogger>();
  options.stats_dump_period_sec = 0;
  options.stats_persist_period_sec = 0;
  options.skip_stats_update_on_db_open = true;  // else it reads the end of every table file
  options.avoid_flush_during_shutdown = true;
  return options;
}

// ------------------------------------------------------------------ engine

class RocksdbIterator;

// The open database and what store, writers, snapshots and iterators share; each may be the last one left.
// close() takes the database from all of them.
struct Engine {
  Engine(const StoreOptions& settings)
      : settings(settings),
        write_state(std::make_shared<WriteState>(settings.directory)),
        environment(rocksdb::NewCompositeEnv(rocksdb_files(settings.read_only, forsaken))),
        options(make_options(settings, write_state)),
        pool(static_cast<size_t>(std::max(settings.read_threads, 1))) {
    options.compaction_filter_factory = disposal;
    options.env = environment.get();
  }

  // Every call that touches the database holds this.
  std::shared_lock<std::shared_mutex> enter(std::string_view operation) const {
    if (!closing) {
      std::shared_lock lock(gate);
      if (!closing) return lock;
    }
    throw ClosedError("[" + std::string(operation) + "] the store in " + settings.directory.string() + " is closed");
  }
  void check_status(std::string_view operation, const rocksdb::Status& status) const {
    check(operation, settings.directory, status);
  }
  fs::path ingest_directory() const { return settings.directory / kIngestDirectory; }
  fs::path mark_path() const { return settings.directory / kMarkName; }

  const ForkedExit forked_exit;
  const StoreOptions settings;
  const std::shared_ptr<WriteState> write_state;
  const std::shared_ptr<Disposal> disposal = std::make_shared<Disposal>();
  const std::shared_ptr<std::atomic<bool>> forsaken = std::make_shared<std::atomic<bool>>(false);
  const std::unique_ptr<rocksdb::Env> environment;  // outlives the database
  rocksdb::Options options;                         // holds the block cache; emptied by close()

  // Shared by calls in progress, alone by close().
  mutable std::shared_mutex gate;
  std::atomic<bool> closing{false};
  std::unique_ptr<rocksdb::DB> db;  // null once closed
  CommitMark mark;                  // open unless read-only; used by the writer

  // What must be given back before the database closes.
  std::mutex open_mutex;  // protects the two sets
  std::set<RocksdbIterator*> iterators;
  std::set<const rocksdb::Snapshot*> snapshots;

  ReadPool pool;
  std::atomic<uint64_t> next_file{0};
  std::atomic<uint64_t> keys_read{0}, keys_found{0}, keys_written{0}, bytes_written{0}, commits{0};
};

// ------------------------------------------------------------------ writer

class RocksdbWriter final : public StoreWriter {
 public:
  explicit RocksdbWriter(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {}

  ~RocksdbWriter() override {
    writer_.reset();
    if (*engine_->forsaken) return;
    for (const fs::path& path : paths_) {
      std::error_code ignored;  // the next open removes what is left
      fs::remove(path, ignored);
    }
  }

  void put(const StoredKey& key, Bytes value) override {
    add("put", key, value.size(), [&] { return writer_->Put(slice(key), slice(value)); });
  }
  void erase(const StoredKey& key) override {
    add("erase", key, 0, [&] { return writer_->Delete(slice(key)); });
  }

  void commit() override {
    const auto lock = engine_->enter("commit");
    check_uncommitted("commit");
    committed_ = true;
    if (num_keys_ == 0) return;
    write([&] {
      finish_file("commit");
      wait_for_compaction();
      ingesting_ = true;
      ingest();
    });
    engine_->keys_written += num_keys_;
    engine_->bytes_written += num_bytes_;
    ++engine_->commits;
  }

 private:
  void check_uncommitted(const char* operation) const {
    if (committed_) throw std::invalid_argument("[" + std::string(operation) + "] this batch is committed already");
  }

  // Runs `change`; what it throws is the store's first failed write, unless another was. Not so a full disk before
  // RocksDB has heard of the files: the writer takes them away, and the next one may find space.
  template <class Change>
  void write(Change change) {
    engine_->write_state->rethrow_latched();
    const BlockedSignals blocked;  // RocksDB may start threads
    try {
      change();
    } catch (const ClosedError&) {
      throw;
    } catch (const DiskFullError&) {
      if (ingesting_) engine_->write_state->latch(std::current_exception());
      throw;
    } catch (...) {
      engine_->write_state->latch(std::current_exception());
      throw;
    }
  }

  template <class Add>
  void add(const char* operation, const StoredKey& key, size_t value_bytes, Add add_entry) {
    const auto lock = engine_->enter(operation);
    check_uncommitted(operation);
    if (num_keys_ > 0 && key <= last_)
      throw std::invalid_argument("[" + std::string(operation) + "] keys of a batch must be strictly ascending");
    if (writer_ == nullptr || writer_->FileSize() >= kTableFileBytes) {
      write([&] {
        if (!planted("full table file left out")) finish_file(operation);
        start_file(operation);
      });
    }
    const rocksdb::Status status = add_entry();
    if (!status.ok()) write([&] { engine_->check_status(operation, status); });
    last_ = key;
    ++num_keys_;
    num_bytes_ += StoredKey::kBytes + value_bytes;
  }

  void start_file(const char* operation) {
    paths_.push_back(engine_->ingest_directory() / (std::to_string(engine_->next_file++) + ".sst"));
    writer_ = std::make_unique<rocksdb::SstFileWriter>(rocksdb::EnvOptions(engine_->options), engine_->options,
                                                       engine_->db->DefaultColumnFamily(),
                                                       /*invalidate_page_cache=*/false);
    engine_->check_status(operation, writer_->Open(paths_.back().string()));
  }

  // Writes, syncs and closes the file at hand, and keeps its checksum.
  void finish_file(const char* operation) {
    if (writer_ == nullptr) return;
    rocksdb::ExternalSstFileInfo info;
    engine_->check_status(operation, writer_->Finish(&info));
    writer_.reset();
    files_.external_files.push_back(info.file_path);
    files_.files_checksums.push_back(info.file_checksum);
    files_.files_checksum_func_names.push_back(info.file_checksum_func_name);
  }

  void wait_for_compaction() const {
    const auto deadline = std::chrono::steady_clock::now() + kMaxWait;
    for (;;) {
      const uint64_t seen = engine_->write_state->compactions();
      std::string top_files;
      if (!engine_->db->GetProperty(rocksdb::DB::Properties::kNumFilesAtLevelPrefix + "0", &top_files) ||
          std::stoi(top_files) < kMaxTopFiles)
        return;
      const bool news = engine_->write_state->wait_for_news(seen, deadline);
      engine_->write_state->rethrow_latched();
      if (engine_->closing)
        throw ClosedError("[commit] the store in " + engine_->settings.directory.string() + " is closing");
      if (!news) return;
    }
  }

  void ingest() {
    files_.column_family = engine_->db->DefaultColumnFamily();
    files_.options.move_files = true;
    files_.options.failed_move_fall_back_to_copy = false;  // one file system, so a failure is a real one
    files_.options.snapshot_consistency = true;
    files_.options.allow_global_seqno = true;
    files_.options.write_global_seqno = false;    // a table file never changes, so it can be hard-linked and summed
    files_.options.verify_file_checksum = false;  // the sums were made on the way; do not read it all again
    // With a snapshot open RocksDB gives each batch a sequence number of its own, greater than 0. The mark needs that;
    // and rows of number 0, which it gives to a batch that overlaps nothing, are dropped by its compaction under a
    // snapshot of number 0 (seen in 7.8; the snapshot test of store_conformance.h shows it).
    {
      const rocksdb::ManagedSnapshot own_number(engine_->db.get());
      engine_->check_status("commit", engine_->db->IngestExternalFiles({files_}));
    }
    if (!planted("commit mark not written")) engine_->mark.write(engine_->db->GetLatestSequenceNumber());
  }

  std::shared_ptr<Engine> engine_;
  std::unique_ptr<rocksdb::SstFileWriter> writer_;  // null between files
  std::vector<fs::path> paths_;                     // every file made; RocksDB removes those it took
  rocksdb::IngestExternalFileArg files_;
  StoredKey last_{};
  uint64_t num_keys_ = 0, num_bytes_ = 0;
  bool committed_ = false, ingesting_ = false;
};

// --------------------------------------------------------- snapshot, scans

class RocksdbSnapshot final : public StoreSnapshot, public std::enable_shared_from_this<RocksdbSnapshot> {
 public:
  explicit RocksdbSnapshot(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {
    const auto lock = engine_->enter("snapshot");
    engine_->disposal->note_snapshot(+1);
    snapshot_ = engine_->db->GetSnapshot();
    const std::lock_guard open_lock(engine_->open_mutex);
    engine_->snapshots.insert(snapshot_);
  }
  ~RocksdbSnapshot() override {
    const std::shared_lock lock(engine_->gate);
    const std::lock_guard open_lock(engine_->open_mutex);
    if (engine_->snapshots.erase(snapshot_) > 0) engine_->db->ReleaseSnapshot(snapshot_);
    engine_->disposal->note_snapshot(-1);
  }
  std::unique_ptr<StoreIterator> scan(const StoredKey& first, const std::optional<StoredKey>& last) const override;

  const std::shared_ptr<Engine>& engine() const { return engine_; }
  const rocksdb::Snapshot* get() const { return snapshot_; }

 private:
  std::shared_ptr<Engine> engine_;
  const rocksdb::Snapshot* snapshot_;
};

class RocksdbIterator final : public StoreIterator {
 public:
  RocksdbIterator(std::shared_ptr<const RocksdbSnapshot> snapshot, const StoredKey& first,
                  const std::optional<StoredKey>& last)
      : snapshot_(std::move(snapshot)), engine_(*snapshot_->engine()), first_(first), last_(last) {
    const auto lock = engine_.enter("scan");
    rocksdb::ReadOptions read;
    read.snapshot = snapshot_->get();
    read.fill_cache = false;  // a pass over everything would throw out what lookups need
    read.readahead_size = 256 << 10;
    if (last_) {
      bound_ = slice(*last_);
      read.iterate_upper_bound = &bound_;
    }
    iterator_.reset(engine_.db->NewIterator(read));
    const std::lock_guard open_lock(engine_.open_mutex);
    engine_.iterators.insert(this);
  }
  ~RocksdbIterator() override {
    const std::shared_lock lock(engine_.gate);
    iterator_.reset();
    const std::lock_guard open_lock(engine_.open_mutex);
    engine_.iterators.erase(this);
  }

  bool next() override {
    const auto lock = engine_.enter("scan");
    if (done_) return false;
    if (last_ && *last_ <= first_) {
      done_ = true;
      return false;
    }
    if (std::exchange(started_, true)) {
      iterator_->Next();
    } else {
      iterator_->Seek(slice(first_));
    }
    if (iterator_->Valid()) {
      key_ = StoredKey::from_bytes(bytes_of(iterator_->key()));
      value_.assign(iterator_->value().data(), iterator_->value().size());
      return true;
    }
    done_ = true;
    engine_.check_status("scan", iterator_->status());
    return false;
  }
  StoredKey key() const override { return key_; }
  Bytes value() const override { return std::as_bytes(std::span(value_)); }

  // By close(), which holds the gate alone.
  void release() { iterator_.reset(); }

 private:
  std::shared_ptr<const RocksdbSnapshot> snapshot_;
  Engine& engine_;  // lives as long as the snapshot
  const StoredKey first_;
  const std::optional<StoredKey> last_;
  rocksdb::Slice bound_;
  std::unique_ptr<rocksdb::Iterator> iterator_;
  // Copies: close() on another thread takes the blocks away that RocksDB's iterator points into.
  StoredKey key_{};
  std::string value_;
  bool started_ = false;
  bool done_ = false;
};

std::unique_ptr<StoreIterator> RocksdbSnapshot::scan(const StoredKey& first,
                                                     const std::optional<StoredKey>& last) const {
  return std::make_unique<RocksdbIterator>(shared_from_this(), first, last);
}

// ------------------------------------------------------------------- store

class RocksdbStore final : public Store {
 public:
  explicit RocksdbStore(const StoreOptions& settings) : engine_(std::make_shared<Engine>(settings)) {
    const BlockedSignals blocked;  // RocksDB starts its threads here
    try {
      if (settings.read_only) {
        engine_->db = open_read_only(CommitMark::read(engine_->mark_path()).value_or(0));
      } else {
        open_for_writing();
      }
    } catch (const fs::filesystem_error& error) {
      throw_system_error("open", error.path1(), error.code().value());
    }
  }

  ~RocksdbStore() override {
    try {
      RocksdbStore::close();
    } catch (...) {
      // Everything committed is durable already, so a failed close loses nothing.
    }
  }

  void multi_get(std::span<const StoredKey> keys, const Found& found) const override {
    const auto lock = engine_->enter("multi_get");
    if (std::adjacent_find(keys.begin(), keys.end(), std::greater_equal<>()) != keys.end())
      throw std::invalid_argument("[multi_get] keys must be strictly ascending");
    if (keys.empty()) return;
    const size_t threads = static_cast<size_t>(std::max(engine_->settings.read_threads, 1));
    const size_t chunk = std::clamp((keys.size() + threads - 1) / threads, kMinChunk, kMaxChunk);
    const size_t num_chunks = (keys.size() + chunk - 1) / chunk;

    rocksdb::ReadOptions read;
    // The cache is for filters and indexes, which are loaded when a table is opened. Of the rows in a data block one is
    // wanted, and the caller keeps that; blocks that are read often stay in the system's page cache. (Measured: as many
    // keys a second as with filling, warm and cold, and 16 threads take 7 MB instead of 60 MB beside 32 MiB of cache.)
    read.fill_cache = false;
    // The chunks of one call see one moment.
    std::optional<rocksdb::ManagedSnapshot> moment;
    if (num_chunks > 1) read.snapshot = moment.emplace(engine_->db.get()).snapshot();
    engine_->pool.run(num_chunks, [&](size_t i) {
      const size_t first = i * chunk;
      read_chunk(read, keys.subspan(first, std::min(chunk, keys.size() - first)), first, found);
    });
  }

  std::unique_ptr<StoreWriter> begin_write() override {
    const auto lock = engine_->enter("begin_write");
    if (engine_->settings.read_only)
      throw StorageError("[begin_write] the store in " + engine_->settings.directory.string() +
                         " was opened read-only");
    engine_->write_state->rethrow_latched();
    return std::make_unique<RocksdbWriter>(engine_);
  }

  std::shared_ptr<const StoreSnapshot> snapshot() const override { return std::make_shared<RocksdbSnapshot>(engine_); }

  std::vector<LinkedFile> link_into(const fs::path& directory) override;
  void set_disposable(Disposable disposable) override {
    const auto lock = engine_->enter("set_disposable");
    engine_->disposal->set(std::move(disposable));
  }
  void compact(std::atomic<bool>* cancelled) override;
  std::vector<StoreDamage> verify(uint64_t& files, uint64_t& bytes) override;
  std::optional<StoredKey> place_after(const StoredKey& key) const override;
  StoreStats stats() const override;
  std::exception_ptr failure() const override { return engine_->write_state->latched(); }
  void forsake() noexcept override { *engine_->forsaken = true; }
  void close() override;

 private:
  std::unique_ptr<rocksdb::DB> open_read_only(uint64_t committed) const;
  void open_for_writing();
  void read_chunk(const rocksdb::ReadOptions& read, std::span<const StoredKey> keys, size_t first,
                  const Found& found) const;

  std::shared_ptr<Engine> engine_;
};

// Deletes and writes nothing. CorruptionError when a file is missing, or the manifest does not know the mark's commit.
std::unique_ptr<rocksdb::DB> RocksdbStore::open_read_only(uint64_t committed) const {
  const fs::path& directory = engine_->settings.directory;
  rocksdb::Options options = engine_->options;
  options.create_if_missing = false;
  if (engine_->settings.hold_files) {
    check_open_files(directory);
    options.max_open_files = -1;
  }
  if (engine_->settings.tolerate_damage) options.paranoid_checks = false;
  rocksdb::DB* raw = nullptr;
  const rocksdb::Status status = rocksdb::DB::OpenForReadOnly(options, directory.string(), &raw);
  std::unique_ptr<rocksdb::DB> db(raw);
  check_opened(directory, status);
  if (const uint64_t known = db->GetLatestSequenceNumber(); known < committed)
    throw CorruptionError("[open] " + directory.string() + ": the manifest ends at sequence number " +
                          std::to_string(known) + ", but " + std::to_string(committed) + " was committed (" +
                          kMarkName + "): its end is damaged");
  return db;
}

void RocksdbStore::open_for_writing() {
  const fs::path& directory = engine_->settings.directory;
  if (!fs::exists(directory)) make_directory(directory);
  if (!fs::is_directory(directory)) throw StorageError("[open] " + directory.string() + " is not a directory");
  const std::optional<uint64_t> committed = CommitMark::read(engine_->mark_path());
  if (!committed || !fs::exists(directory / "CURRENT")) {
    // A new store, or one whose creation was cut short; neither has tables. RocksDB would delete them.
    for (const fs::path& file : list_directory("open", directory)) {
      if (file.extension() == ".sst" || committed.value_or(0) > 0)
        throw CorruptionError("[open] " + directory.string() + " holds committed rows but no file " +
                              (committed ? "CURRENT" : kMarkName));
    }
  }
  if (committed.value_or(0) > 0) open_read_only(*committed);

  // What a writer left that never committed.
  remove_tree("open", engine_->ingest_directory());
  make_directory(engine_->ingest_directory());
  rocksdb::DB* db = nullptr;
  const rocksdb::Status status = rocksdb::DB::Open(engine_->options, directory.string(), &db);
  engine_->db.reset(db);
  check_opened(directory, status);
  if (!committed) write_file_atomically(engine_->mark_path(), CommitMark::contents(0));
  engine_->mark.open(engine_->mark_path());
}

void RocksdbStore::read_chunk(const rocksdb::ReadOptions& read, std::span<const StoredKey> keys, size_t first,
                              const Found& found) const {
  std::array<rocksdb::Slice, kMaxChunk> names;
  std::array<rocksdb::PinnableSlice, kMaxChunk> values;
  std::array<rocksdb::Status, kMaxChunk> statuses;
  std::transform(keys.begin(), keys.end(), names.begin(), [](const StoredKey& key) { return slice(key); });
  rocksdb::DB& db = *engine_->db;
  db.MultiGet(read, db.DefaultColumnFamily(), keys.size(), names.data(), values.data(), statuses.data(),
              /*sorted_input=*/true);
  uint64_t num_found = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (statuses[i].IsNotFound() || (planted("read error taken for a missing row") && !statuses[i].ok())) continue;
    engine_->check_status("multi_get", statuses[i]);
    ++num_found;
    found(first + i, bytes_of(values[i]));
  }
  engine_->keys_read += keys.size();
  engine_->keys_found += num_found;
}

rocksdb::Status allow_deletions(rocksdb::DB& db) {
#if ROCKSDB_MAJOR >= 9
  return db.EnableFileDeletions();
#else
  return db.EnableFileDeletions(/*force=*/false);
#endif
}

uint32_t crc32c_of(const rocksdb::FileStorageInfo& table) {
  uint32_t crc = 0;
  for (const char byte : table.file_checksum) crc = crc << 8 | static_cast<uint8_t>(byte);
  return crc;
}

// What a store is at one moment. Not GetLiveFilesStorageInfo, which asks for the write-ahead logs, and may wait for
// ever there when an iterator is let go of meanwhile (facebook/rocksdb#14069, in RocksDB 7 to 10).
struct LiveFiles {
  std::vector<rocksdb::LiveFileMetaData> tables;
  std::vector<std::string> others;  // CURRENT, the manifest, the options
  std::string manifest;
  uint64_t manifest_bytes = 0;  // of those that count; it grows on
};

// While deletions are off.
LiveFiles live_files_of(rocksdb::DB& db, const std::function<void(const rocksdb::Status&)>& check) {
  std::map<std::string, rocksdb::LiveFileMetaData> known;
  for (;;) {
    std::vector<rocksdb::LiveFileMetaData> tables;
    db.GetLiveFilesMetaData(&tables);
    for (rocksdb::LiveFileMetaData& table : tables) known.try_emplace(table.relative_filename, std::move(table));
    std::vector<std::string> names;
    LiveFiles live;
    check(db.GetLiveFiles(names, &live.manifest_bytes, /*flush_memtable=*/false));
    bool all_known = true;
    for (std::string& name : names) {
      name.erase(0, name.find_first_not_of('/'));
      if (name.starts_with("MANIFEST-")) live.manifest = name;
      if (!name.ends_with(".sst")) {
        live.others.push_back(std::move(name));
      } else if (const auto table = known.find(name); table != known.end()) {
        live.tables.push_back(table->second);
      } else {
        all_known = false;  // made since
      }
    }
    if (all_known) return live;
  }
}

std::vector<LinkedFile> RocksdbStore::link_into(const fs::path& directory) {
  const auto lock = engine_->enter("link_into");
  const BlockedSignals blocked;
  rocksdb::DB& db = *engine_->db;
  make_directory(directory);
  const auto copy = [&] {
    // The memtable is empty, and so is the write-ahead log: a copy opens without it.
    const LiveFiles live =
        live_files_of(db, [&](const rocksdb::Status& status) { engine_->check_status("link_into", status); });
    std::vector<LinkedFile> files;
    for (const rocksdb::LiveFileMetaData& table : live.tables) {
      // Its bytes are synced: RocksDB takes no table that is not, and a copy of one is. The name is synced with the
      // directory, once for all: a sync for each of a thousand files would cost a second.
      const fs::path from = fs::path(table.directory) / table.relative_filename;
      files.push_back({table.relative_filename, table.size, crc32c_of(table)});
      link_or_copy(from, directory / table.relative_filename);
      if (table.file_checksum_func_name != rocksdb::kStandardDbFileChecksumFuncName || table.file_checksum.size() != 4)
        throw StorageError("[link_into] " + from.string() + ": RocksDB knows no CRC-32C of this table");
    }
    for (const std::string& name : live.others) {
      std::string text = live.manifest + "\n";
      if (name != "CURRENT") {
        const fs::path from = engine_->settings.directory / name;
        const FileDescriptor in("link_into", from, O_RDONLY);
        // The manifest is still growing: no link, but a copy of what counts.
        text.resize(name == live.manifest ? live.manifest_bytes : in.bytes());
        if (in.read_at(std::as_writable_bytes(std::span(text)), 0) != text.size())
          throw CorruptionError("[link_into] " + from.string() + " is shorter than its " + std::to_string(text.size()) +
                                " bytes");
      }
      files.push_back({name, text.size(), crc32c(std::as_bytes(std::span(text)))});
      FileDescriptor out("link_into", directory / name, O_WRONLY | O_CREAT | O_EXCL);
      out.write(std::as_bytes(std::span(text)));
      if (!planted("checkpoint's manifest not synced")) out.sync();
      out.close();
    }
    const std::string mark = CommitMark::contents(db.GetLatestSequenceNumber());
    write_file_atomically(directory / kMarkName, mark);
    files.push_back({kMarkName, mark.size(), crc32c(std::as_bytes(std::span(mark)))});
    return files;
  };
  try {
    engine_->check_status("link_into", db.DisableFileDeletions());
    std::vector<LinkedFile> files;
    std::exception_ptr error;
    try {
      files = copy();
    } catch (...) {
      error = std::current_exception();
    }
    const rocksdb::Status status = allow_deletions(db);
    if (error) std::rethrow_exception(error);
    engine_->check_status("link_into", status);
    return files;
  } catch (...) {
    try_to_remove_tree(directory);
    throw;
  }
}

void RocksdbStore::compact(std::atomic<bool>* cancelled) {
  const auto lock = engine_->enter("compact");
  rocksdb::CompactRangeOptions options;
  options.exclusive_manual_compaction = false;
  options.canceled = cancelled;
  // Else tables that are at the bottom already stay as they are.
  options.bottommost_level_compaction = rocksdb::BottommostLevelCompaction::kForce;
  // Closing the store ends it early, too.
  const rocksdb::Status status = engine_->db->CompactRange(options, nullptr, nullptr);
  if (!status.IsIncomplete() && !status.IsShutdownInProgress()) engine_->check_status("compact", status);
}

std::vector<StoreDamage> RocksdbStore::verify(uint64_t& files, uint64_t& bytes) {
  const auto lock = engine_->enter("verify");
  const BlockedSignals blocked;
  rocksdb::DB& db = *engine_->db;
  std::vector<StoreDamage> damages;
  const auto attempt = [&](const fs::path& file, const auto& read) {
    try {
      read();
    } catch (const Error& wrong) {
      damages.push_back({file, wrong.what()});
    }
  };
  const auto verify_table = [&](const rocksdb::FileStorageInfo& table, const fs::path& path) {
    const uint64_t size = FileDescriptor("verify", path, O_RDONLY).bytes();
    ++files;
    bytes += table.size;
    if (size != table.size)
      throw CorruptionError("[verify] " + path.string() + " has " + std::to_string(size) + " bytes, expected " +
                            std::to_string(table.size));
    if (crc32c_of_file(path) != crc32c_of(table))
      throw CorruptionError("[verify] " + path.string() + " is damaged: the checksum of its bytes (offset 0 to " +
                            std::to_string(size) + ") does not agree");
  };
  const auto verify_tables = [&] {
    std::vector<rocksdb::LiveFileMetaData> tables;
    db.GetLiveFilesMetaData(&tables);
    for (const rocksdb::LiveFileMetaData& table : tables) {
      const fs::path path = fs::path(table.directory) / table.relative_filename;
      attempt(path, [&] {
        try {
          verify_table(table, path);
        } catch (const MissingFileError&) {
          // Held open, and nobody else's any more: who writes the store has replaced it. Its rows can be read.
          if (!engine_->settings.read_only) throw;
        }
      });
    }
  };
  if (engine_->settings.read_only) {
    verify_tables();
    return damages;
  }
  engine_->check_status("verify", db.DisableFileDeletions());
  try {
    // Its manifest, as the next open would read it.
    attempt(engine_->settings.directory, [&] { open_read_only(CommitMark::read(engine_->mark_path()).value_or(0)); });
    verify_tables();
  } catch (...) {
    allow_deletions(db);
    throw;
  }
  engine_->check_status("verify", allow_deletions(db));
  return damages;
}

std::optional<StoredKey> RocksdbStore::place_after(const StoredKey& key) const {
  const auto lock = engine_->enter("scan");
  __extension__ using Number = unsigned __int128;
  const auto number_of = [](const StoredKey& stored) { return Number{stored.table_id()} << 64 | stored.mixed(); };
  const auto key_of = [](Number number) {
    return StoredKey::make(static_cast<uint32_t>(number >> 64), static_cast<uint64_t>(number));
  };
  const Number from = number_of(key), end = (Number{1} << 96) - 1;
  rocksdb::SizeApproximationOptions how;
  how.include_files = true;
  // From the indexes alone: 0 as long as both ends lie in the same blocks.
  const auto is_elsewhere = [&](Number start, Number other) {
    const StoredKey first = key_of(start), last = key_of(other);
    const rocksdb::Range range(slice(first), slice(last));
    uint64_t size = 0;
    const rocksdb::Status status =
        engine_->db->GetApproximateSizes(how, engine_->db->DefaultColumnFamily(), &range, 1, &size);
    return status.ok() && size > 0;
  };
  // The first place in (low, high] that is `beyond`, as `high` is and `low` is not.
  const auto first_beyond = [](Number low, Number high, const auto& beyond) {
    while (high - low > 1) {
      const Number middle = low + (high - low) / 2;
      (beyond(middle) ? high : low) = middle;
    }
    return high;
  };
  std::optional<Number> found;  // the next place where a file begins or has ended
  std::vector<rocksdb::LiveFileMetaData> files;
  engine_->db->GetLiveFilesMetaData(&files);
  for (const rocksdb::LiveFileMetaData& file : files) {
    const Number smallest = number_of(StoredKey::from_bytes(bytes_of(rocksdb::Slice(file.smallestkey))));
    const Number beyond = number_of(StoredKey::from_bytes(bytes_of(rocksdb::Slice(file.largestkey)))) + 1;
    for (const Number place : {smallest, beyond})
      if (place > from && place <= end && (!found || place < *found)) found = place;
  }
  // Where an index cannot be read, each two neighbours seem to lie in different blocks: on to where it can, or else to
  // the end of the file. By single keys it would never come to an end.
  const auto is_untold = [&](Number place) { return place < end && is_elsewhere(place, place + 1); };
  if (from < end && is_elsewhere(from, end)) {
    Number block = 0;
    if (is_untold(from)) {
      // In growing steps, for there may be more than one such place, and what lies between them is to be read.
      const Number until = found.value_or(end);
      Number low = from, step = 1;
      for (; low + step < until && is_untold(low + step); step *= 2) low += step;
      block = first_beyond(low, std::min(low + step, until), [&](Number place) { return !is_untold(place); });
    } else {
      block = first_beyond(from, end, [&](Number place) { return is_elsewhere(from, place); });
    }
    if (!found || block < *found) found = block;
  }
  if (!found) return std::nullopt;
  return key_of(*found);
}

StoreStats RocksdbStore::stats() const {
  const auto lock = engine_->enter("stats");
  StoreStats stats;
  rocksdb::ColumnFamilyMetaData tables;
  engine_->db->GetColumnFamilyMetaData(&tables);
  stats.disk_bytes = tables.size;
  stats.files = tables.file_count;
  uint64_t cache_bytes = 0;
  if (engine_->db->GetIntProperty(rocksdb::DB::Properties::kBlockCacheUsage, &cache_bytes))
    stats.cache_bytes = cache_bytes;
  stats.keys_read = engine_->keys_read;
  stats.keys_found = engine_->keys_found;
  stats.keys_written = engine_->keys_written;
  stats.bytes_written = engine_->bytes_written;
  stats.commits = engine_->commits;
  return stats;
}

void RocksdbStore::close() {
  engine_->closing = true;
  engine_->write_state->stop_waiting();
  if (const std::shared_lock lock(engine_->gate); engine_->db != nullptr) engine_->db->DisableManualCompaction();
  const std::lock_guard lock(engine_->gate);
  if (engine_->db == nullptr) return;
  const BlockedSignals blocked;
  for (RocksdbIterator* iterator : engine_->iterators) iterator->release();
  for (const rocksdb::Snapshot* snapshot : engine_->snapshots) engine_->db->ReleaseSnapshot(snapshot);
  engine_->snapshots.clear();
  // A compaction at work notices at its next row and leaves its inputs as they were.
  rocksdb::CancelAllBackgroundWork(engine_->db.get(), /*wait=*/true);
  const rocksdb::Status status = engine_->db->Close();
  engine_->db.reset();
  engine_->options = rocksdb::Options();
  engine_->mark.close();
  engine_->check_status("close", status);
}

}  // namespace

std::unique_ptr<Store> open_rocksdb_store(const StoreOptions& options) {
  // A store that is just being made, or whose creation was cut short: no rows yet.
  if (options.hold_files && is_unmade(options.directory)) {
    StoreOptions empty;
    empty.read_only = true;
    return open_memory_store(empty);
  }
  return std::make_unique<RocksdbStore>(options);
}

}  // namespace damo
