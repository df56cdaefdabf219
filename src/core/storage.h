// SPDX-License-Identifier: Apache-2.0
//
// A storage: one directory, its groups, its operation log, its rows in memory and on disk. Start here.
//
//   storage.cc      open, groups, commit, close, the clock, the background threads
//   read_only.cc    open to be read only, beside a writer or without one
//   redo.cc         what the log says happened, done again after a crash
//   expiry.cc       the clock, lifetimes, what expired, dropped groups, the limit on disk
//   cut.cc          cut, checkpoint, restore, dump
//   recovery_point.cc  mode commit: what a crash goes back to
//   table.h, .cc    one group's rows: lookup, scan, and their changes in table_updates.cc
//
// Thread safety: all methods of Storage and Table, from any thread. Operations that change rows are numbered,
// logged and applied in one order; lookups run beside them.
//
// Errors: see error.h. ClosedError after close(), ForkedHandleError in a forked child, ReadOnlyError for a change of a
// storage that is open to be read only. When a sync of the log or a write of the cold
// tier fails, the storage latches: reads go on, every later change throws the first error; reopening redoes what was
// logged, or in mode commit goes back to the last commit.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <thread>
#include <vector>

#include "directory.h"
#include "manifest.h"
#include "operation_log.h"
#include "saved_filter.h"
#include "store.h"
#include "table.h"
#include "thread_pool.h"
#include "tiers.h"

namespace damo {

enum class Durability {
  kCommit,   // an operation is applied when it returns, and not logged: a crash goes back to the last commit
  kLogged,   // an operation is in the log when it returns: survives the death of the process
  kDurable,  // and synced: survives power loss
};

inline constexpr size_t kMinMemoryBytes = size_t{16} << 20;
inline constexpr size_t kMinDiskPerMemory = 4;
inline constexpr size_t kMaxExtraBytes = size_t{16} << 20;  // of a commit or checkpoint
// A clock further ahead of the last operation is not believed until expire() confirms it.
inline constexpr int64_t kMaxClockStep = int64_t{366} * 86'400;

struct VerifyReport;   // rescue.h
struct SalvageReport;  // rescue.h

struct StorageOptions {
  size_t memory_bytes = size_t{1} << 30;
  Durability durability = Durability::kLogged;
  size_t threads = 0;                  // 0: one per core
  uint64_t log_bytes = 0;              // 0: max(1 GiB, 4 x memory), at most an eighth of the free disk
  std::optional<Lifetime> lifetime{};  // of groups that were given none; absent: as stored
  uint64_t disk_bytes = 0;             // what the directory may take, at least 4 x memory; 0: no limit
  // Nothing of the directory is touched. What is seen is what an opening after a crash would have seen at that moment;
  // it stays so, whatever a writer does. Of the options above, memory and threads.
  bool read_only = false;
};

struct StorageStats {
  TiersStats tiers;
  StoreStats store;
  uint64_t log_bytes = 0;
  uint64_t recovery_bytes = 0;  // table files that only the recovery point has, in mode commit
  uint64_t sequence = 0;
  uint64_t synced_sequence = 0;    // in mode commit: that of the recovery point
  uint64_t redone_records = 0;     // at the last open
  int64_t clock_held_seconds = 0;  // how far the clock is ahead of what is believed
  uint64_t forgotten = 0;          // rows erased to keep within disk_bytes
  struct Group {
    uint32_t group;
    std::string name;
    uint32_t dimension;
    uint64_t rows;
    uint64_t step;
    uint64_t row_bytes;  // of a stored row with floats
    Lifetime lifetime;
    std::string initializer;
    Settings initializer_settings;
    uint64_t seed;
    std::optional<Table::FilterInfo> filter;  // of a group that has one
  };
  std::vector<Group> groups;
};

// What who opens a group says of its filter.
struct WantedAdmission {
  enum class Kind { kAsStored, kFilter, kAll } kind = Kind::kAsStored;  // kAll: no filter, every key gets a row
  FilterSettings filter{};
};

class Storage {
 public:
  static std::unique_ptr<Storage> open(const std::filesystem::path& path, const StorageOptions& options, OpenMode mode);
  // Replaces what is at `path` (a storage that is not open, an empty directory, or nothing) by the checkpoint.
  // Verifies every file first; on any error nothing has changed. std::invalid_argument: its filters need more than
  // `memory_bytes`, with which it is going to be opened.
  static void restore(const std::filesystem::path& checkpoint, const std::filesystem::path& path,
                      size_t memory_bytes = ~size_t{0});
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  bool read_only() const noexcept { return options_.read_only; }

  // Opens a group, or makes it. `wanted.group` is kNumGroups when only a name is given. The Table lives as long as the
  // storage. std::invalid_argument, SchemaMismatchError.
  // `lifetime`: of this group alone; absent: as stored, else the storage's.
  // `admission`: a filter that the group gets when it has none; it begins empty, and rows that there are stay. One of
  // other settings than the group's is SchemaMismatchError. kAll drops the group's filter with its counts.
  // std::invalid_argument when the filters would take more than half of the memory for rows.
  Table& table(TableSpec wanted, std::optional<Lifetime> lifetime = std::nullopt, WantedAdmission admission = {});
  // Removes a group with all its rows at once; the disk space comes back by and by. Its Table throws from now on.
  // std::invalid_argument when there is no such group.
  void drop_group(uint32_t group);

  // All that returned before survives power loss: syncs the log, or in mode commit makes a new recovery point. `step`
  // and `extra` come back as last_commit(). In mode commit, when it throws: the storage goes on, the recovery point is
  // the one of before, and another commit may succeed. (Where only the last sync failed a crash may find the new one.)
  void commit(int64_t step, std::string extra);
  std::optional<CommitRecord> last_commit() const;

  // Keeps the storage as it is now in a new directory that must not exist; whole or not at all. With `keep`, the oldest
  // complete siblings (checkpoints.h) beyond the newest `keep`, of which this is one, are removed when it is there;
  // returns what could not be removed, in words. `fill` may put files into the directory before the rows come in: they
  // are synced, summed and restored by name as the others are verified; it must not close the storage.
  using FillCheckpoint = std::function<void(const std::filesystem::path& directory)>;
  std::vector<std::string> checkpoint(const std::filesystem::path& directory, int64_t step, std::string extra,
                                      uint64_t keep = 0, const FillCheckpoint& fill = {});
  struct DumpConditions {
    std::optional<uint32_t> group{};
    uint32_t min_count = 0;
    std::optional<int64_t> updated_since{};  // last update at or after this time
  };
  // Told how far a dump is: rows gone through, those that the conditions leave out included, of the rows that its
  // groups have. What it throws ends the dump. It must not close the storage, which would wait for the dump.
  using DumpProgress = std::function<void(uint64_t done, uint64_t total)>;
  // Writes the serving file; returns how many rows it holds. On any error `file` is what it was. `progress` is called
  // by this thread, with no lock but the one that keeps the storage open: at the start, now and then, and at the end,
  // before the file gets its name.
  uint64_t dump(const std::filesystem::path& file, const DumpConditions& conditions, const DumpProgress& progress = {});

  // Seconds since 1970: what was set, or else the wall clock; it never runs back. While groups age by seconds, a step
  // forward of more than kMaxClockStep is not taken before expire() confirms it. Of a storage that is open read-only
  // it is the reader's own clock, which is taken as it is set.
  int64_t now() const;
  void set_now(int64_t now);           // std::invalid_argument for such a step
  int64_t clock_held_seconds() const;  // how far the clock is ahead of what is believed
  // Takes the clock as it is, or `now`, however far ahead. Returns how many rows have expired by that.
  uint64_t expire(std::optional<int64_t> now);
  // Rewrites the table files without what expired, was erased, dropped or overwritten. Takes time and disk.
  void compact();

  // Reads everything: our files, the table files, every row, and compares the counts. What is damaged is in the report
  // and changes nothing else. Beside everything but cuts.
  VerifyReport verify();
  // A new storage at `out` (absent, or an empty directory) with every row that can be read from the damaged one at
  // `path`, which is not open and stays as it is. Its groups come from `manifest_of`, a checkpoint of it, where its own
  // MANIFEST is damaged. CorruptionError: nothing can be read, and nothing is made.
  static SalvageReport salvage(const std::filesystem::path& path, const std::filesystem::path& out,
                               const std::filesystem::path& manifest_of);

  std::array<std::byte, 16> id() const;  // manifest.h
  // Of groups, ever; those that were dropped are among them.
  uint32_t tables_made() const noexcept { return next_table_id_.load() - 1; }
  // Whether the path still leads to the directory that is open; false after close().
  bool is_in_place() const noexcept { return directory_ && directory_->is_in_place(); }
  StorageStats stats() const;
  const std::filesystem::path& path() const noexcept { return path_; }
  bool closed() const noexcept { return closed_.load(); }
  // Writes changed rows to the cold tier, then lets go of the directory. When that write fails (a full disk), the log
  // keeps them and the next open redoes it; in mode commit it throws, and the storage is at its last recovery point.
  // Waits for calls in flight. Idempotent.
  void close();

 private:
  friend class Table;
  friend class Scan;
  struct Private {};

 public:
  explicit Storage(Private, std::unique_ptr<StorageDirectory> directory, const StorageOptions& options);

 private:
  // A call in flight: keeps the storage open until it is over. One within another (`progress` and `fill` may look at
  // the storage) needs no lock of its own. On the stack of its thread alone.
  class Use {
   public:
    Use(const Storage& storage, const char* operation);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    const Storage& storage_;
    const Use* const outer_;  // of this thread, of any storage
    std::shared_lock<std::shared_mutex> open_;
    inline static thread_local const Use* innermost = nullptr;
  };
  // While schedules are asked for rates, which may run a caller's code under the order lock: a call from there to this
  // or any other storage would wait for a lock that its own thread holds, so it is refused instead.
  class AskingForRates {
   public:
    AskingForRates() noexcept;
    ~AskingForRates();
    AskingForRates(const AskingForRates&) = delete;
    AskingForRates& operator=(const AskingForRates&) = delete;
    static void check(const char* operation);  // std::invalid_argument in a call from there
  };
  bool is_forked() const noexcept;
  void check_process(const char* operation) const;
  // ReadOnlyError. `instead`: what else would do.
  void check_may_change(const char* operation, const char* instead = "") const;
  void check_writable() const;
  void save_presence_if_it_can(const std::filesystem::path& directory, uint64_t sequence);  // recovery_point.cc
  // StorageError, latched, when the directory is not ours any more: another storage may be there.
  void check_in_place() const;
  // The order lock, once the log has room and an open cut has memory.
  std::unique_lock<std::mutex> begin_operation();
  // Appends a record; the order lock is held.
  uint64_t append(RecordType type, std::span<const Bytes> parts);
  void after_operation(uint64_t sequence);  // no lock held: in mode durable, waits for the sync
  int64_t wanted_now() const;               // what the user gave, or the wall clock
  // The time for who reads: looking does not move the clock, or a look before the user gives the time of old events
  // would leave them in the past.
  int64_t read_clock() const;  // what the clock would be at an operation now; it moves only with a record
  // For what nobody asked for (an opening, the disk keeper): the wall clock counts only where operations follow it, for
  // the user may be about to give the time of old events.
  int64_t settled_clock() const;
  StorageCounters counters() const;  // the order lock is held

  void open_generation(const std::filesystem::path& generation);
  // The directory as it was at one moment, in open files: what becomes of their names does not matter.
  struct View;
  static std::unique_ptr<Storage> open_read_only(const std::filesystem::path& path, const StorageOptions& options);
  static View hold_view(const StorageDirectory& directory, size_t cache_bytes);
  void open_view(View view);
  void count_rows_anew(Table& table);
  void verify_files(VerifyReport& report) const;  // of a read-only storage: as they are now
  void redo(const LogRecord& record);
  void save_manifest();  // the order lock is held, or nobody else is there
  // The same with another one, which is taken back when that fails.
  void save_manifest(Manifest wanted);
  Table* table_by_id(uint32_t table_id) const;
  [[noreturn]] void throw_no_such_group(const TableSpec& wanted) const;  // read-only; order lock held
  void settle_lifetimes();                                               // at open, after redo
  void change_lifetime(Table& table, const Lifetime& lifetime, bool own);
  bool is_too_far(int64_t from, int64_t to) const noexcept;  // a step of the clock that needs to be confirmed
  void note_lifetimes();                                     // order lock held
  void load_filters();                                       // at open, before anything is changed
  // What all filters take with one more of `more` bytes. std::invalid_argument when it is more than they may.
  size_t check_filter_memory(const char* operation, size_t more) const;
  void set_admission(Table& table, const std::optional<AdmissionSpec>& spec);  // order lock held
  void drop_filter(Table& table);                                              // opening_ held, the order lock not
  void remove_old_filters() noexcept;  // files that the manifest does not name; cutting_ and order lock held
  void let_expire(const StorageCounters& log_start);  // nothing in the log is older than this
  void keep_within_disk();
  void disk_loop();
  uint64_t bytes_on_disk() const;
  uint64_t share_of_disk(double share) const;
  double full_share() const;    // of the limit, above which rows are forgotten
  double kept_share() const;    // until those left need no more than this
  bool waits_for_disk() const;  // whether this thread's operations wait for the disk keeper

  struct CutInfo {
    StorageCounters counters;
    Manifest manifest;
    int64_t now;  // perhaps later than the clock in the counters, which is that of the last operation
    Expiry expiry(const TableSpec& spec) const;  // what had expired at the cut
  };
  // The filters of one cut on their way into files of a directory. end() takes the order lock.
  class SavedFilters;
  // One cut; `closed` runs while the cold tier is exactly the cut. `filters`: which began to be saved at it, all that
  // have counted keys since they were saved last; cutting_ is held, for they are saved for one cut at a time.
  // `first`: what is done before it, the order lock held, with no operation in between; when it throws there is no cut.
  void cut(const std::function<void(const CutInfo&)>& closed, SavedFilters* filters = nullptr,
           const std::function<void()>& first = {});
  void adopt_files(const SavedFilters& filters, uint64_t cut);  // the manifest names them from now on; cutting_ held
  std::shared_ptr<const StoreSnapshot> snapshot(CutInfo& info);

  // A cut, after which the log below it is not needed any more. Returns its sequence number.
  uint64_t cut_log();
  // Whether the log is longer than `limit` bytes, and a cut would gain something. Background lock. Asked anew each
  // time, not kept: others cut the log, too.
  bool log_waits_for_cut(uint64_t limit) const;

  // Mode commit: what a crash goes back to; recovery_point.cc.
  struct RecoveryPoint {
    std::filesystem::path directory;  // the generation that CURRENT names
    std::vector<LinkedFile> files;    // below rocksdb/
    uint64_t sequence = 0;
    std::string manifest;  // as encoded; empty: it is not sure that CURRENT names it
  };
  void begin_recovery_points();  // at open, once all that the log has is redone
  // `first` as cut()'s; cutting_ held.
  void make_recovery_point(const std::function<void()>& first, bool with_presence);
  bool is_recovery_point() const;  // whether a new one would be equal; the order lock and cutting_ held
  bool advance_recovery_point(const std::function<void()>& first);
  void commit_recovery_point(CommitRecord record);
  void close_at_recovery_point();
  uint64_t recovery_bytes() const;  // the order lock is held
  // Where MANIFEST, log and filters are.
  const std::filesystem::path& record_directory() const { return point_ ? point_->directory : generation_; }

  std::filesystem::path presence_file() const { return generation_ / "presence"; }
  void build_presence();
  void maintenance_loop();
  void prefetch_loop();
  void prefetch(Table& table, std::vector<uint64_t> keys);
  void stop_threads() noexcept;
  void close_now();

  std::filesystem::path path_;
  std::unique_ptr<StorageDirectory> directory_;
  std::filesystem::path generation_;
  StorageOptions options_;
  int64_t process_;

  mutable std::shared_mutex life_;    // calls hold it shared, close() alone
  std::atomic<bool> closing_{false};  // no call begins any more
  std::atomic<bool> closed_{false};   // nor is one in flight

  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<OperationLog> log_;
  std::unique_ptr<Tiers> tiers_;
  bool logs_ = true;  // false in mode commit, from the end of the opening on
  // Then; written under cutting_ and the order lock.
  std::unique_ptr<RecoveryPoint> point_;
  std::atomic<uint64_t> point_bytes_{0};  // of its table files

  mutable std::mutex order_;  // protects what follows, and the order of operations
  Manifest manifest_;
  bool manifest_changed_ = false;  // since it was saved: by a group that is new or has other settings
  std::array<std::unique_ptr<Table>, kNumGroups> tables_;
  std::map<uint32_t, Table*> tables_by_id_;  // changed under the structure lock too
  std::atomic<uint32_t> next_table_id_{1};   // the manifest's; changed under the structure lock too
  std::optional<CommitRecord> last_commit_;
  std::mutex cutting_;  // one cut that saves files at a time; after opening_, before the others
  std::mutex opening_;  // one table() or drop_group() at a time; before the order lock
  std::vector<std::unique_ptr<Table>> dropped_;     // their owners may still call them, and get an error
  std::atomic<int64_t> clock_{0};                   // of the last operation; 0: there was none
  std::atomic<int64_t> given_now_{kBeforeAllTime};  // what the user set
  std::atomic<bool> ages_by_time_{false};
  std::atomic<uint64_t> forgotten_{0};
  uint64_t log_limit_ = 0;
  uint64_t redone_records_ = 0;
  uint64_t redo_sequence_ = 0;   // of the record being redone, while there is no log yet
  uint64_t view_log_bytes_ = 0;  // of the log that a read-only storage has seen
  uint64_t view_synced_ = 0;

  // background
  // In an object of its own, which a forked child leaves alone: a condition that a thread of the parent waits on would
  // have the child's destructor wait for ever.
  struct Signals {
    std::mutex mutex;
    std::condition_variable wake, log_shrunk;
  };
  std::unique_ptr<Signals> signals_ = std::make_unique<Signals>();
  std::mutex& background_mutex_ = signals_->mutex;
  std::condition_variable& background_wake_ = signals_->wake;
  std::condition_variable& log_shrunk_ = signals_->log_shrunk;
  bool stop_ = false;
  std::atomic<bool> stopping_{false};          // the same, for who holds no lock
  uint64_t cut_at_ = 0;                        // the last record that the maintenance thread's last cut has seen
  std::exception_ptr no_space_;                // why the log could not be cut, while the disk is full
  uint64_t cuts_begun_ = 0, no_space_in_ = 0;  // the last of them that met a full disk
  bool space_wanted_ = false;                  // an operation waits for the next attempt
  std::atomic<bool> keeps_disk_{false};        // the disk keeper is there
  std::atomic<uint64_t> written_before_{0};    // to the cold tier, when it last looked
  std::deque<std::pair<Table*, std::vector<uint64_t>>> prefetches_;
  std::thread maintenance_, prefetcher_, disk_keeper_;
};

}  // namespace damo
