// SPDX-License-Identifier: Apache-2.0
#include "storage.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <ctime>
#include <limits>
#include <stdexcept>
#include <utility>

#include "budget.h"
#include "error.h"
#include "planted.h"
#include "saved_filters.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxQueuedPrefetches = 4;
constexpr std::chrono::milliseconds kLookAgain{100};
constexpr std::chrono::seconds kLookForSpace{1};
constexpr size_t kPrefetchRows = 256;  // that memory is waited for at a time

thread_local bool asking_for_rates = false;

size_t default_threads() { return std::max(1u, std::thread::hardware_concurrency()); }

}  // namespace

// --------------------------------------------------------------------- use

Storage::Use::Use(const Storage& storage, const char* operation) : storage_(storage), outer_(innermost) {
  storage.check_process(operation);
  AskingForRates::check(operation);
  const Use* use = outer_;
  while (use != nullptr && &use->storage_ != &storage) use = use->outer_;
  if (use == nullptr && !storage.closing_) open_ = std::shared_lock(storage.life_);
  if (use == nullptr && storage.closing_)
    throw ClosedError(std::string("[") + operation + "] the storage " + storage.path_.string() +
                      " is closed: open it again with Storage(path)");
  innermost = this;
}

Storage::Use::~Use() { innermost = outer_; }

Storage::AskingForRates::AskingForRates() noexcept { asking_for_rates = true; }

Storage::AskingForRates::~AskingForRates() { asking_for_rates = false; }

void Storage::AskingForRates::check(const char* operation) {
  if (asking_for_rates)
    throw std::invalid_argument(std::string("[") + operation +
                                "] called by a learning-rate schedule, while an update waits for its rate: a schedule"
                                " makes the rate from the step alone");
}

bool Storage::is_forked() const noexcept { return getpid() != process_; }

void Storage::check_process(const char* operation) const {
  // Threads, locks and memory of the storage stay behind in a fork; nothing of it may be touched in the child.
  if (is_forked())
    throw ForkedHandleError(
        std::string("[") + operation + "] the storage " + path_.string() + " was opened by process " +
        std::to_string(process_) + ", this is its forked child " + std::to_string(getpid()) +
        ": open it after the fork, with read_only=True while the parent has it open, or keep it in the"
        " parent");
}

void Storage::check_may_change(const char* operation, const char* instead) const {
  if (options_.read_only)
    throw ReadOnlyError(std::string("[") + operation + "] the storage " + path_.string() +
                        " is open read-only, and nothing was changed: " + instead +
                        "open it without read_only to change it");
}

void Storage::check_writable() const {
  // What a compaction met is known to the store alone until somebody writes there.
  if (std::exception_ptr failure = store_->failure()) tiers_->fail(std::move(failure));
  tiers_->throw_if_failed();
}

void Storage::check_in_place() const {
  if (directory_->is_in_place()) return;
  store_->forsake();
  tiers_->fail(std::make_exception_ptr(
      StorageError("[storage] " + path_.string() +
                   " (or its file LOCK) was moved, removed or replaced by another program while it was open:"
                   " nothing more is written there; close this handle, and open what is there now or restore a"
                   " checkpoint")));
  tiers_->throw_if_failed();
}

std::unique_lock<std::mutex> Storage::begin_operation() {
  check_may_change("change rows");  // whoever comes here was asked before; there is no log
  check_in_place();
  tiers_->wait_for_cut_memory();
  {
    std::unique_lock lock(background_mutex_);
    // The log is cut in the background; twice its bound is where operations wait for that.
    const uint64_t begun_before = cuts_begun_;  // one of these may have found the disk full that has space by now
    for (;;) {
      const bool full = log_waits_for_cut(2 * log_limit_);
      if (stop_ || !(full || waits_for_disk())) break;
      check_writable();  // or nobody cuts it any more
      if (full && no_space_in_ > begun_before) std::rethrow_exception(no_space_);
      if (full && !std::exchange(space_wanted_, true)) background_wake_.notify_all();
      log_shrunk_.wait_for(lock, kLookAgain);
    }
  }
  std::unique_lock order(order_);
  check_writable();
  // Before a record can name a new group; once for all that a program opens, not with two syncs for each.
  if (manifest_changed_) save_manifest();
  // Between operations, when the counts agree with the log's last record: a segment starts with them.
  if (log_->should_rotate()) log_->rotate(encode_counters(counters()));
  return order;
}

uint64_t Storage::append(RecordType type, std::span<const Bytes> parts) {
  const uint64_t sequence = log_->append(type, parts);
  if (log_->bytes() > log_limit_) {
    const std::lock_guard lock(background_mutex_);
    background_wake_.notify_all();
  }
  return sequence;
}

bool Storage::log_waits_for_cut(uint64_t limit) const {
  return log_->bytes() > limit && log_->last_sequence() > cut_at_;
}

void Storage::after_operation(uint64_t sequence) {
  if (options_.durability != Durability::kDurable || sequence == 0 || planted("durable does not wait")) return;
  log_->sync_to(sequence);
  check_in_place();  // or what was synced has no name any more
}

StorageCounters Storage::counters() const {
  StorageCounters counters;
  counters.sequence = log_ ? log_->last_sequence() : redo_sequence_;
  counters.clock = clock_;
  counters.last_commit = last_commit_;
  for (const auto& table : tables_)
    if (table) counters.tables.push_back(table->counters());
  return counters;
}

// -------------------------------------------------------------------- open

Storage::Storage(Private, std::unique_ptr<StorageDirectory> directory, const StorageOptions& options)
    : path_(directory->path()),
      directory_(std::move(directory)),
      options_(options),
      process_(getpid()),
      pool_(std::make_unique<ThreadPool>(options.threads != 0 ? options.threads : default_threads())) {}

std::unique_ptr<Storage> Storage::open(const fs::path& path, const StorageOptions& options, OpenMode mode) {
  if (options.memory_bytes < kMinMemoryBytes)
    throw std::invalid_argument("[open] memory is " + std::to_string(options.memory_bytes) +
                                " bytes, expected at least " + std::to_string(kMinMemoryBytes) + " (16 MiB)");
  if (options.threads > 1024)
    throw std::invalid_argument("[open] threads is " + std::to_string(options.threads) + ", expected 1 to 1024");
  if (options.read_only) return open_read_only(path, options);
  auto directory = std::make_unique<StorageDirectory>(path, mode);
  if (directory->is_new()) {
    directory->replace_generation([](const fs::path& generation) {
      Manifest manifest;
      manifest.storage_id = make_storage_id();
      write_file_atomically(generation / "MANIFEST", encode_manifest(manifest));
      make_directory(generation / "rocksdb");
      make_directory(generation / "log");
      OperationLog::create({.directory = generation / "log", .storage_id = manifest.storage_id}, 1,
                           encode_counters({}));
    });
  }
  auto storage = std::make_unique<Storage>(Private{}, std::move(directory), options);
  storage->open_generation(storage->directory_->generation());
  return storage;
}

void Storage::open_generation(const fs::path& generation) {
  generation_ = generation;
  manifest_ = manifest_of(generation);
  check_parts(generation);

  // A newer version's log is refused before RocksDB, in opening, writes files of its own.
  OperationLog::check_heads(
      {.directory = generation / "log", .storage_id = manifest_.storage_id},
      [&](std::string_view state) { decode_counters(std::as_bytes(std::span(state)), (generation / "log").string()); });

  check_filter_memory("open", 0);
  for (const TableSpec& spec : manifest_.tables) {
    tables_[spec.group] = std::make_unique<Table>(*this, spec);
    tables_by_id_[spec.table_id] = tables_[spec.group].get();
  }
  load_filters();
  // The manifest and the filters may have names that a power loss would undo still: who gave them may have died before
  // the sync, or it failed. All that comes is built upon them.
  if (!planted("opened upon an unsynced manifest")) fsync_directory(generation);
  // Now, for the space that the opening may need: what a process in mode commit leaves may be large.
  directory_->remove_stale_generations();

  const Budget budget(options_.memory_bytes);
  StoreOptions store_options;
  store_options.directory = generation / "rocksdb";
  store_options.cache_bytes = budget.cache;
  store_options.write_bytes = budget.write;
  store_ = open_rocksdb_store(store_options);
  const size_t shards = std::bit_ceil(std::clamp<size_t>(pool_->size() * 4, 8, 256));
  tiers_ = std::make_unique<Tiers>(
      budget.rows, budget.presence, shards, *store_, *pool_,
      [this](uint64_t sequence) {
        if (!log_) return;  // while redoing, what is redone was synced before it was read
        check_in_place();   // the files of what is written are made by their names
        log_->sync_to(sequence);
      },
      [this](uint32_t table_id) -> const TableShape* {
        const Table* table = table_by_id(table_id);
        return table != nullptr ? &table->shape() : nullptr;
      });

  next_table_id_ = manifest_.next_table_id;
  tiers_->lend(check_filter_memory("open", 0));

  const fs::path log_directory = generation / "log";
  log_limit_ = options_.log_bytes;
  if (log_limit_ == 0) {
    const fs::space_info space = fs::space(generation);
    log_limit_ = std::max<uint64_t>({size_t{1} << 30, 4 * options_.memory_bytes});
    log_limit_ = std::max<uint64_t>(std::min<uint64_t>(log_limit_, space.available / 8), size_t{64} << 20);
  }
  // The log is cut at its limit and may reach twice that.
  if (options_.disk_bytes != 0)
    log_limit_ = std::min(log_limit_, std::max<uint64_t>(options_.disk_bytes / 16, 1 << 20));
  const LogOptions log_options{
      .directory = log_directory,
      .storage_id = manifest_.storage_id,
      .segment_bytes = std::clamp<uint64_t>(log_limit_ / 8, size_t{128} << 10, size_t{256} << 20)};
  auto log = OperationLog::recover(
      log_options,
      [&](uint64_t first_sequence, std::string_view state) {
        // What reached the cold tier after the filter was saved is in the log, and passes through memory again.
        if (store_->stats().files == 0 || tiers_->presence().load(presence_file(), first_sequence - 1))
          tiers_->presence().set_complete();
        const StorageCounters counters =
            decode_counters(std::as_bytes(std::span(state)), (log_directory / "(oldest segment)").string());
        clock_ = counters.clock;
        last_commit_ = counters.last_commit;
        for (const TableCounters& table : counters.tables) {
          Table* known = table_by_id(table.table_id);
          if (known == nullptr) continue;
          known->set_counters(table);
        }
        let_expire(counters);
      },
      [&](const LogRecord& record) { redo(record); }, manifest_.cut);
  {
    const std::lock_guard write(tiers_->write_mutex());  // an eviction of what was redone may be looking at it
    log_ = std::move(log);
  }
  remove_old_filters();
  settle_lifetimes();
  if (options_.durability == Durability::kCommit) begin_recovery_points();
  maintenance_ = start_quiet_thread([this] { maintenance_loop(); });
  prefetcher_ = start_quiet_thread([this] { prefetch_loop(); });
  if (options_.disk_bytes != 0) {
    keeps_disk_ = true;
    disk_keeper_ = start_quiet_thread([this] { disk_loop(); });
  }
}

Storage::~Storage() {
  if (is_forked()) {
    // A forked child: the threads do not exist here, and neither the files nor the memory are ours to touch. Detaching
    // a thread would look at it, and threads of the child may have its place by now.
    for (std::thread* thread : {&maintenance_, &prefetcher_, &disk_keeper_}) (void)new std::thread(std::move(*thread));
    (void)tiers_.release();
    (void)log_.release();
    (void)store_.release();
    (void)pool_.release();
    (void)signals_.release();
    return;
  }
  try {
    close_now();
  } catch (...) {
    // What could not be written is in the log.
  }
  stop_threads();
}

void Storage::stop_threads() noexcept {
  {
    const std::lock_guard lock(background_mutex_);
    stop_ = true;
    stopping_ = true;
  }
  background_wake_.notify_all();
  log_shrunk_.notify_all();
  if (maintenance_.joinable()) maintenance_.join();
  if (prefetcher_.joinable()) prefetcher_.join();
  if (disk_keeper_.joinable()) disk_keeper_.join();
}

void Storage::close() {
  AskingForRates::check("close");
  close_now();
}

// Also of a storage that goes away while a schedule of another one is asked.
void Storage::close_now() {
  if (closed_) return;
  check_process("close");
  {
    // Calls in flight end first. None begins meanwhile: the lock goes to those who share it as long as there is one.
    closing_ = true;
    const std::unique_lock alone(life_);
    if (closed_) return;
    closed_ = true;
  }
  stop_threads();
  if (planted("unlocked before it is closed")) directory_->unlock();
  std::exception_ptr failure;
  // Not lost if there is a log, and it is still in the directory: it has it, and the next open redoes it.
  const auto failed = [&](bool lost) {
    if (lost || !logs_ || !directory_->is_in_place()) failure = std::current_exception();
    try {
      log_->sync();
    } catch (...) {
      failure = std::current_exception();
    }
  };
  if (tiers_ && log_) {
    bool unsaved = manifest_changed_;  // the manifest alone has a group that nothing was done in yet
    try {
      check_in_place();
      tiers_->throw_if_failed();
      if (!logs_) {
        close_at_recovery_point();
      } else {
        if (manifest_changed_) save_manifest();
        unsaved = false;
        cut_log();
      }
    } catch (...) {
      failed(unsaved && !is_disk_full(std::current_exception()));  // on a full disk a clean close is worth more
    }
  }
  if (tiers_) tiers_->stop();
  try {
    if (store_) store_->close();
  } catch (...) {
    if (!failure) failure = std::current_exception();
  }
  tiers_.reset();
  log_.reset();
  store_.reset();
  if (!logs_ && directory_->is_in_place()) {
    try {
      directory_->remove_stale_generations();  // where this process worked
    } catch (const std::exception&) {          // the next open removes it
    }
  }
  directory_->unlock();
  if (failure) std::rethrow_exception(failure);
}

// ------------------------------------------------------------------ groups

Table* Storage::table_by_id(uint32_t table_id) const {
  const auto found = tables_by_id_.find(table_id);
  return found != tables_by_id_.end() ? found->second : nullptr;
}

size_t Storage::check_filter_memory(const char* operation, size_t more) const {
  size_t wanted = more;
  for (const TableSpec& spec : manifest_.tables) {
    if (!spec.admission) continue;
    const auto known = tables_[spec.group] ? tables_[spec.group]->admission() : nullptr;
    wanted += known ? known->filter->memory_bytes() : CountingBloomFilter::memory_bytes(spec.admission->filter);
  }
  check_filters_fit(operation, wanted, options_.memory_bytes, more != 0);
  return wanted;
}

Table& Storage::table(TableSpec wanted, std::optional<Lifetime> lifetime, WantedAdmission admission) {
  const Use use(*this, "embedding");
  const bool read_only = options_.read_only;
  const std::lock_guard opening(opening_);
  std::unique_lock order(order_);
  if (!wanted.name.empty()) {
    // A name takes the highest free number: clear of the low ones that people give themselves.
    uint32_t free = kNumGroups;
    wanted.group = kNumGroups;
    for (uint32_t group = kNumGroups; group-- > 0;) {
      if (tables_[group] && tables_[group]->spec().name == wanted.name) wanted.group = group;
      if (!tables_[group] && free == kNumGroups) free = group;
    }
    if (wanted.group == kNumGroups) wanted.group = free;
    if (wanted.group == kNumGroups)
      throw std::invalid_argument(
          "[embedding] the storage has 256 groups already: use one of them, or another storage");
  }
  check_spec(wanted);
  wanted.stream = stream_of(wanted.group, wanted.name);
  // Built before anything changes: bad settings show here. The initializer says which settings it stands for.
  const TableShape shape(wanted);
  wanted.state = shape.optimizer->state();
  wanted.initializer_settings = shape.initializer->settings();
  const size_t row_bytes = tiers_->hot().slot_bytes(shape.num_floats());
  if (row_bytes > tiers_->hot().max_slot_bytes())
    throw std::invalid_argument("[embedding] a row of " + std::to_string(row_bytes) +
                                " bytes is too large for memory=" + std::to_string(options_.memory_bytes) +
                                ": give the storage more memory");
  using Wanted = WantedAdmission::Kind;
  wanted.admission.reset();
  if (admission.kind == Wanted::kFilter) {
    CountingBloomFilter::check(admission.filter);
    wanted.admission = AdmissionSpec{admission.filter, 0};
  }
  if (tables_[wanted.group]) {
    Table& known = *tables_[wanted.group];
    check_same_layout(known.spec(), wanted);
    const std::optional<FilterSettings> filter = known.filter_settings();
    const bool add_filter = wanted.admission && !filter, remove_filter = admission.kind == Wanted::kAll && filter;
    if (wanted.admission && filter) check_same_filter(known.spec(), admission.filter);
    if (add_filter || remove_filter) check_may_change("embedding", "leave admission out, or ");
    if (lifetime && (*lifetime != known.spec().lifetime || !known.spec().own_lifetime))
      check_may_change("embedding", "leave ttl out, or ");
    if (known.in_use_ && (add_filter || remove_filter))
      throw SchemaMismatchError("[embedding] " + known.spec().label() + " is open " +
                                (add_filter ? "without an admission filter" : "with an admission filter") +
                                ": leave admission out, or close the storage and open it anew");
    if (add_filter) check_filter_memory("embedding", CountingBloomFilter::memory_bytes(admission.filter));
    if (known.in_use_ && known.spec().optimizer_settings != wanted.optimizer_settings)
      throw SchemaMismatchError("[embedding] " + known.spec().label() +
                                " is open with other optimizer settings: use equal settings, or set the rate with lr");
    if (!known.in_use_ && known.spec().optimizer_settings != wanted.optimizer_settings) {
      // A rate or a beta may change from one run to the next.
      const std::lock_guard structure(tiers_->structure());
      known.adopt(wanted);
    }
    if (lifetime && known.in_use_ && (!known.spec().own_lifetime || *lifetime != known.spec().lifetime))
      throw SchemaMismatchError("[embedding] " + known.spec().label() +
                                " is open with another ttl: use an equal one, or leave it out");
    if (add_filter || remove_filter) check_writable();
    if (add_filter) {
      set_admission(known, wanted.admission);
      manifest_changed_ = true;
    }
    if (remove_filter) {
      // Nobody counts keys meanwhile: whoever opens the group waits for opening_.
      order.unlock();
      drop_filter(known);
      order.lock();
    }
    for (TableSpec& spec : manifest_.tables) {
      if (spec.group != wanted.group || spec.optimizer_settings == known.spec().optimizer_settings) continue;
      spec.optimizer_settings = known.spec().optimizer_settings;
      manifest_changed_ = !read_only;
    }
    if (lifetime && (*lifetime != known.spec().lifetime || !known.spec().own_lifetime)) {
      order.unlock();
      change_lifetime(known, *lifetime, true);
      order.lock();
    }
    known.in_use_ = true;  // last: a change that failed may be tried again, as another one
    return known;
  }
  if (read_only) throw_no_such_group(wanted);
  check_writable();
  wanted.lifetime = lifetime.value_or(manifest_.lifetime);
  wanted.own_lifetime = lifetime.has_value();
  wanted.table_id = manifest_.next_table_id;
  size_t filter_bytes = 0;
  if (wanted.admission)
    filter_bytes = check_filter_memory("embedding", CountingBloomFilter::memory_bytes(admission.filter));
  auto table = std::make_unique<Table>(*this, wanted);
  Manifest manifest = manifest_;
  manifest.tables.push_back(wanted);
  std::sort(manifest.tables.begin(), manifest.tables.end(),
            [](const TableSpec& a, const TableSpec& b) { return a.group < b.group; });
  ++manifest.next_table_id;
  if (wanted.admission) tiers_->lend(filter_bytes);
  const std::lock_guard structure(tiers_->structure());
  tables_by_id_[wanted.table_id] = table.get();  // the last that may fail
  manifest_ = std::move(manifest);
  manifest_changed_ = true;
  next_table_id_ = manifest_.next_table_id;
  tables_[wanted.group] = std::move(table);
  tables_[wanted.group]->in_use_ = true;
  note_lifetimes();
  return *tables_[wanted.group];
}

void Storage::drop_group(uint32_t group) {
  const Use use(*this, "drop_group");
  check_may_change("drop_group");
  const std::lock_guard opening(opening_);
  const std::lock_guard cutting(cutting_);
  // No cut is open while the write lock is held, so no row of the group has to be kept for one.
  std::unique_lock write(tiers_->write_mutex(), std::defer_lock);
  std::unique_lock order(order_, std::defer_lock);
  std::lock(write, order);
  check_writable();
  if (group >= kNumGroups || !tables_[group])
    throw std::invalid_argument("[drop_group] there is no group " + std::to_string(group) + " in " + path_.string());
  const uint32_t table_id = tables_[group]->spec().table_id;
  Manifest wanted = manifest_;
  std::erase_if(wanted.tables, [&](const TableSpec& spec) { return spec.table_id == table_id; });
  dropped_.reserve(dropped_.size() + 1);  // nothing after the manifest may fail
  // What was done before the drop is not to be lost without it: rows may have been copied out of the group.
  if (logs_ && !planted("drop before the log is synced")) log_->sync();
  // Redo passes over records of a table that the manifest does not know any more.
  save_manifest(std::move(wanted));
  tables_[group]->dropped_ = true;
  tables_[group]->set_admission(std::nullopt);
  {
    const std::lock_guard structure(tiers_->structure());
    tables_by_id_.erase(table_id);
  }
  tiers_->discard(table_id);
  dropped_.push_back(std::move(tables_[group]));
  tiers_->lend(check_filter_memory("drop_group", 0));
  remove_old_filters();
  note_lifetimes();
}

void Storage::save_manifest() {
  check_in_place();
  // In mode commit the next recovery point saves it.
  if (!point_) write_file_atomically(generation_ / "MANIFEST", encode_manifest(manifest_));
  manifest_changed_ = false;
}

void Storage::save_manifest(Manifest wanted) {
  std::swap(manifest_, wanted);
  try {
    save_manifest();
  } catch (...) {
    // The file may be there all the same, where only a sync failed: the next operation writes this one over it.
    manifest_ = std::move(wanted);
    manifest_changed_ = !planted("failed drop left on the disk");
    throw;
  }
}

// ------------------------------------------------------------------ commit

void Storage::commit(int64_t step, std::string extra) {
  const Use use(*this, "commit");
  check_may_change("commit");
  check_in_place();
  if (extra.size() > kMaxExtraBytes)
    throw std::invalid_argument("[commit] extra has " + std::to_string(extra.size()) +
                                " bytes, expected at most 16 MiB");
  if (!logs_) return commit_recovery_point({step, std::move(extra)});
  uint64_t sequence = 0;
  {
    const std::unique_lock order = begin_operation();
    CommitRecord record{step, std::move(extra)};
    const std::string body = encode_commit(record);
    const std::array<Bytes, 1> parts{std::as_bytes(std::span(body))};
    const std::optional<CommitRecord> before = std::exchange(last_commit_, std::move(record));
    try {
      sequence = append(RecordType::kCommit, parts);
    } catch (...) {
      last_commit_ = before;
      throw;
    }
  }
  if (!planted("commit does not sync")) log_->sync_to(sequence);
  check_in_place();  // or what was synced has no name any more
}

std::optional<CommitRecord> Storage::last_commit() const {
  const Use use(*this, "last_commit");
  const std::lock_guard order(order_);
  return last_commit_;
}

std::array<std::byte, 16> Storage::id() const {
  const std::lock_guard order(order_);
  return manifest_.storage_id;
}

// ------------------------------------------------------------------- stats

StorageStats Storage::stats() const {
  const Use use(*this, "stats");
  StorageStats stats;
  stats.tiers = tiers_->stats();
  stats.store = store_->stats();
  stats.log_bytes = log_ ? log_->bytes() : view_log_bytes_;
  stats.sequence = log_ ? log_->last_sequence() : redo_sequence_;
  stats.synced_sequence = log_ ? log_->synced_sequence() : view_synced_;
  stats.redone_records = redone_records_;
  stats.clock_held_seconds = clock_held_seconds();
  stats.forgotten = forgotten_;
  const std::lock_guard order(order_);
  stats.recovery_bytes = recovery_bytes();
  for (const auto& table : tables_) {
    if (!table) continue;
    const TableSpec& spec = table->spec();
    const std::shared_ptr<Admission> admission = table->admission();
    stats.groups.push_back({spec.group, spec.name, spec.dimension, table->rows_at(read_clock()), table->step(),
                            StoredKey::kBytes + kRowHeaderBytes + table->shape().num_floats() * sizeof(float),
                            spec.lifetime, spec.initializer, spec.initializer_settings, spec.seed,
                            admission ? std::optional(table->info_of(*admission)) : std::nullopt});
  }
  return stats;
}

// -------------------------------------------------------------- background

void Storage::build_presence() {
  // Keys written from now on are added as they go; this adds those that are there already.
  const auto rows = store_->snapshot()->scan(StoredKey::make(0, 0), std::nullopt);
  for (size_t count = 1; rows->next(); ++count) {
    tiers_->presence().add(rows->key());
    if (count % 4096 == 0) {
      const std::lock_guard lock(background_mutex_);
      if (stop_) return;
    }
  }
  tiers_->presence().set_complete();
}

uint64_t Storage::cut_log() {
  const std::lock_guard cutting(cutting_);
  StorageCounters start;
  if (!logs_) {  // there is no log, and the filters stay with the recovery point
    cut([&](const CutInfo& info) { start = info.counters; });
    let_expire(start);
    return start.sequence;
  }
  SavedFilters filters(*this, generation_);
  if (planted("log cut without a cut")) {
    const std::lock_guard order(order_);
    start = counters();
  } else {
    cut([&](const CutInfo& info) { start = info.counters; }, &filters);
  }
  check_in_place();  // a cut takes its time, and what follows is written and removed by name
  filters.save();
  save_presence_if_it_can(generation_, start.sequence);
  adopt_files(filters, start.sequence);
  check_in_place();
  if (planted("log cut too far")) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // a disk's time, in which more comes
    log_->drop_through(UINT64_MAX);
  }
  log_->drop_through(start.sequence);
  if (!filters.empty()) {
    const std::lock_guard order(order_);
    remove_old_filters();
  }
  let_expire(start);
  return start.sequence;
}

void Storage::maintenance_loop() {
  if (!tiers_->presence().complete()) {
    try {
      build_presence();
    } catch (...) {
      // It only saves reads. A damaged row is reported by whoever needs it.
    }
  }
  std::unique_lock lock(background_mutex_);
  while (true) {
    background_wake_.wait(lock, [this] { return stop_ || log_waits_for_cut(log_limit_); });
    if (stop_) return;
    const uint64_t cut = ++cuts_begun_;
    uint64_t cut_at = cut_at_;
    lock.unlock();
    bool failed = false;
    std::exception_ptr no_space;
    try {
      cut_at = cut_log();
    } catch (...) {
      const std::exception_ptr error = std::current_exception();
      failed = store_->failure() || !is_disk_full(error);
      if (failed)
        tiers_->fail(with_way_out(error));
      else  // The log is as it was, and goes on to twice its bound. It is tried again: soon, or when somebody needs it.
        no_space = error;
    }
    lock.lock();
    no_space_ = no_space;
    if (no_space) no_space_in_ = cut;
    cut_at_ = cut_at;
    space_wanted_ = false;
    log_shrunk_.notify_all();
    if (no_space) background_wake_.wait_for(lock, kLookForSpace, [this] { return stop_ || space_wanted_; });
    if (failed) {
      background_wake_.wait(lock, [this] { return stop_; });
      return;
    }
  }
}

void Storage::prefetch(Table& table, std::vector<uint64_t> keys) {
  const std::lock_guard lock(background_mutex_);
  if (prefetches_.size() >= kMaxQueuedPrefetches) prefetches_.pop_front();  // the oldest is likely too late anyway
  prefetches_.emplace_back(&table, std::move(keys));
  background_wake_.notify_all();
}

void Storage::prefetch_loop() {
  std::unique_lock lock(background_mutex_);
  while (true) {
    background_wake_.wait(lock, [this] { return stop_ || !prefetches_.empty(); });
    if (stop_) return;
    const auto [table, keys] = std::move(prefetches_.front());
    prefetches_.pop_front();
    lock.unlock();
    try {
      Batch batch(keys, std::nullopt);
      const Expiry expiry = table->expiry_now();
      Tiers::HotRead read =
          tiers_->read_hot(table->shape(), expiry, batch, ShardOrder(batch, tiers_->hot()), nullptr, false);
      // Rows beyond half of memory would push each other out.
      const size_t quarter = tiers_->chunk_rows(table->shape());
      if (read.missing.size() > 2 * quarter) read.missing.resize(2 * quarter);
      while (!read.missing.empty()) {
        const size_t count = std::min({read.missing.size(), quarter, kPrefetchRows});
        std::vector<uint32_t> rows(read.missing.end() - static_cast<ptrdiff_t>(count), read.missing.end());
        read.missing.resize(read.missing.size() - count);
        tiers_->make_room(table->shape(), count);
        tiers_->bring_in(table->shape(), expiry, batch, std::move(rows), nullptr);
      }
    } catch (...) {
      // Only a hint: the lookup that follows meets the same error and reports it.
    }
    lock.lock();
  }
}

}  // namespace damo
