// SPDX-License-Identifier: Apache-2.0
//
// Rows in memory above rows on disk: where a row is, how it comes in, how it leaves, and the cut.
//
// Locks, in the order they are taken:
//   order          (the storage's) operations that change rows, one at a time
//   write_mutex_   one writer of the cold tier: an eviction's write-back, or a whole cut
//   structure_     the set of rows in memory and their contents
//   shard locks    (HotTier) lookups beside the structure lock's holder
// No lock but write_mutex_ is held across a read or write of the cold tier, except where `prepare` says so.
//
// Staleness: a row read from the cold tier without a lock may have been brought in, changed, written back and
// evicted since. Each removal notes its epoch in its key's bucket. A reader takes the epoch before it reads; under the
// structure lock, a key that is not in memory and whose bucket has not moved since has not been in memory since then
// either, so what was read is the row.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "batch.h"
#include "hot_tier.h"
#include "lifetime.h"
#include "presence_filter.h"
#include "store.h"
#include "table_spec.h"
#include "thread_pool.h"

namespace damo {

struct TiersStats {
  uint64_t hits = 0;          // distinct keys of training lookups found in memory
  uint64_t cold_hits = 0;     // distinct keys brought or read from the cold tier
  uint64_t created = 0;       // rows created
  uint64_t evicted = 0;       // rows that left memory
  uint64_t written_back = 0;  // changed rows written to the cold tier by evictions
  uint64_t write_waits = 0;   // times a writer waited for memory
  uint64_t cuts = 0;
  uint64_t cut_rows = 0;         // rows written by cuts
  uint64_t cut_displaced = 0;    // old rows kept aside for an open cut
  double cut_pause_seconds = 0;  // writers stopped while the last cut was begun
  uint64_t hot_rows = 0;
  uint64_t hot_bytes_in_use = 0;
  uint64_t hot_bytes = 0;
};

class Tiers {
 public:
  // Returns when the operation log is on disk up to this sequence number.
  using WriteAhead = std::function<void(uint64_t sequence)>;
  // The shape of a stored row, by table id; null for a table that was dropped.
  using ShapeOf = std::function<const TableShape*(uint32_t table_id)>;

  // `filter_bytes` of memory go to the filter of keys in the cold tier.
  Tiers(size_t hot_bytes, size_t filter_bytes, size_t num_shards, Store& store, ThreadPool& pool,
        WriteAhead write_ahead, ShapeOf shape_of);
  ~Tiers();

  HotTier& hot() noexcept { return hot_; }
  PresenceFilter& presence() noexcept { return presence_; }
  std::mutex& structure() noexcept { return structure_; }

  // So many bytes of the rows' memory are something else's from now on.
  void lend(size_t bytes);

  // Rows of this shape that one operation may hold in memory at once.
  size_t chunk_rows(const TableShape& shape) const noexcept;

  // Rounds of removals so far. Take it before reading the cold tier.
  uint64_t epoch() const noexcept { return epoch_.load(std::memory_order_acquire); }

  // ---- lookups (any thread, no lock held)

  // How often a row has left memory or was erased. A place noted after this was read is where the row is for as long
  // as the number stays, unless the row has expired.
  uint64_t moves() const noexcept { return moves_.load(std::memory_order_acquire); }

  // Copies the weights of rows in memory to out[first[r] * dimension] (unless `out` is null), notes their places in
  // batch.hints, and returns the rest. `touch`: a training lookup, which counts for eviction.
  struct HotRead {
    std::vector<uint32_t> missing;  // not in memory
    std::vector<uint32_t> gone;     // in memory, but erased or expired: they exist nowhere
  };
  // `visit` sees each row found alive, perhaps from several threads.
  HotRead read_hot(const TableShape& shape, const Expiry& expiry, Batch& batch, const ShardOrder& order, float* out,
                   bool touch, const std::function<void(uint32_t row, const HotRow&)>& visit = nullptr);
  // Serves `rows` that read_hot missed from the cold tier, changing nothing. visit(row, seen) is called once a row,
  // perhaps from several threads; seen.floats is empty for a row without floats (it has its first weights). An expired
  // row is not found.
  struct Seen {
    bool found = false;
    RowHeader header{};
    Bytes floats{};
  };
  void read_through(const TableShape& shape, const Expiry& expiry, const Batch& batch, std::vector<uint32_t> rows,
                    const std::function<void(uint32_t row, const Seen&)>& visit);

  // Training lookup of rows that read_hot did not find: brings cold rows in as far as there is memory without waiting,
  // and serves the others from the cold tier. Their weights are in `out` (unless it is null). Returns the rows
  // that exist nowhere, and an epoch at which that was so.
  struct Absent {
    std::vector<uint32_t> rows;
    uint64_t epoch;
  };
  // Waits until memory for that many rows, at most chunk_rows, is free. No lock held.
  void make_room(const TableShape& shape, size_t rows);
  Absent bring_in(const TableShape& shape, const Expiry& expiry, Batch& batch, std::vector<uint32_t> rows, float* out);

  // ---- operations. The caller holds the order lock from prepare to the last call that takes what it returned.
  // It stays held across prepare's cold reads: operations are one at a time anyway, and lookups take it only to create
  // rows.

  struct Prepared {
    std::vector<Slot> slots;      // [batch rows] kNoSlot outside the request
    std::vector<uint32_t> fresh;  // rows that are to be created: their slot is pending, a tombstone, or expired
    std::unique_lock<std::mutex> structure;  // of several at once the first has it
  };
  // Brings `rows` of the batch into memory. On return the structure lock is held, every row has a slot, and nothing
  // that follows can fail. Without `create`, rows that exist nowhere have kNoSlot. `absent_at`: an epoch at which all
  // `rows` were found absent (saves looking again). Throws with nothing changed.
  Prepared prepare(const TableShape& shape, const Expiry& expiry, const Batch& batch, std::span<const uint32_t> rows,
                   bool create, std::optional<uint64_t> absent_at = std::nullopt);
  // For `absent_at`: rows that an earlier prepare under the same hold of the order lock found nowhere. They stay so.
  static constexpr uint64_t kStillAbsent = ~uint64_t{0} - 1;
  // The same for rows of several tables at once, each table in one request. Where memory does not hold them all beside
  // each other, nothing: what was brought in stays as long as it does.
  struct Request {
    const TableShape& shape;
    const Expiry& expiry;
    const Batch& batch;
    std::span<const uint32_t> rows;
    bool create;
  };
  std::optional<std::vector<Prepared>> prepare_together(std::span<const Request> requests);
  // Gives back the slots of fresh rows when the operation does not happen after all.
  void abandon(std::span<Prepared> prepared) noexcept;
  void abandon(Prepared& prepared) noexcept { abandon({&prepared, 1}); }
  // Turns the fresh rows into rows: update count 0, first floats.
  void create_rows(const TableShape& shape, const Batch& batch, const Prepared& prepared, uint64_t sequence,
                   uint64_t group_step, int64_t time);
  // One update of each of `rows` that has a sequence number older than `sequence`. `sums` is [batch rows, dimension].
  void apply(const TableShape& shape, const Batch& batch, std::span<const uint32_t> rows, const Prepared& prepared,
             const Optimizer& optimizer, const StepNumbers& numbers, const float* sums, uint64_t sequence,
             uint64_t group_step, int64_t time);
  // Gives each of `rows` that is older than `sequence` (or was created by it) these floats, [batch rows, num_floats].
  void replace(const TableShape& shape, const Batch& batch, std::span<const uint32_t> rows, const Prepared& prepared,
               const std::byte* update_counts, const std::byte* floats, uint64_t sequence, uint64_t group_step,
               int64_t time);
  // Turns rows that are older than `sequence` into tombstones.
  void erase(std::span<const uint32_t> rows, const Prepared& prepared, uint64_t sequence);

  // Takes all rows of a table out of memory, written or not. No cut is open: the write lock is held, and so is the
  // order lock.
  void discard(uint32_t table_id) noexcept;

  // Blocks the caller while an open cut has more old rows aside than its memory. Before an operation, no lock held.
  void wait_for_cut_memory();

  // ---- the cut

  // Makes the cold tier exactly what the storage is at `sequence`, the last operation's number, then calls
  // `closed` while nothing newer can reach the cold tier. Takes over both locks: `write` (of write_mutex)
  // until the end, `order` only until the cut has begun.
  void cut(std::unique_lock<std::mutex> write, std::unique_lock<std::mutex> order, uint64_t sequence,
           const std::function<void()>& closed);
  std::mutex& write_mutex() noexcept { return write_mutex_; }

  uint64_t bytes_written() const noexcept { return bytes_written_.load(); }  // to the cold tier, since open
  void note_cut_pause(std::chrono::duration<double> pause) noexcept { counters_.cut_pause_seconds = pause.count(); }

  void stop() noexcept;  // ends the eviction thread
  void throw_if_failed() const;
  void fail(std::exception_ptr error) noexcept;  // the first one is kept
  TiersStats stats() const;

 private:
  // A row on its way to the cold tier. Small: a cut lists every changed row.
  struct Leaving {
    uint64_t mixed;
    uint32_t table_id;
    Slot slot;
    StoredKey key() const noexcept { return StoredKey::make(table_id, mixed); }
    // The order of the cold tier. Of two entries of one row the one with a slot comes first.
    bool operator<(const Leaving& other) const noexcept {
      if (table_id != other.table_id) return table_id < other.table_id;
      return mixed != other.mixed ? mixed < other.mixed : slot > other.slot;
    }
    bool same_row(const Leaving& other) const noexcept { return table_id == other.table_id && mixed == other.mixed; }
  };
  static Leaving leaving(Slot slot, const HotRow& row) noexcept { return {row.mixed, row.table_id, slot}; }
  static void sort_distinct(std::vector<Leaving>& rows);
  // The row in memory, if it is still there.
  HotRow* row_of(const Leaving& entry) const noexcept {
    return hot_.holds(entry.slot, entry.table_id, entry.mixed) ? hot_.row(entry.slot) : nullptr;
  }
  struct Displaced {
    std::string value;
    bool erased = false;
  };
  static size_t displaced_cost(const Displaced& old) noexcept { return old.value.size() + sizeof(Displaced) + 64; }

  // A request on its way.
  struct Search {
    static constexpr uint64_t kUnknown = ~uint64_t{0};
    std::vector<uint64_t> absent;     // [batch rows] the epoch at which it was found absent from both tiers, if it was
    std::vector<uint32_t> misses;     // perhaps in the cold tier
    std::vector<uint32_t> need_slot;  // to be created where nothing is
  };
  // Where the rows are. Structure lock held.
  void find_rows(const Request& request, Search& search, Prepared& prepared);
  // Reads the misses into slots of our own, without the structure lock.
  void read_misses(const Request& request, Search& search);
  // Slots of nobody else, given back at the end but for those that became a row's. No structure lock.
  struct HeldSlots {
    Tiers& tiers;
    std::vector<Slot> slots;
    ~HeldSlots();
  };
  void note_work(const Request& request);  // no structure lock
  // Slots, and room in the index, for what is to be created; false, with nothing changed, where there are too few
  // slots. Structure lock held.
  bool reserve(std::span<const Request> requests, std::span<const Search> searches, std::span<Prepared> prepared);

  struct EncodedRow {
    StoredKey key;
    size_t begin, end;  // in a buffer of encoded rows
    bool erased;
  };

  bool removed_since(uint64_t mixed, uint64_t epoch) const noexcept {
    return removed_[mixed >> 24 & (removed_.size() - 1)] > epoch;
  }
  void remove_row(Slot slot);                                                    // structure lock held
  void note_move() noexcept { moves_.fetch_add(1, std::memory_order_release); }  // after it; structure lock held
  // As store_.multi_get, without the keys that cannot be there.
  void read_cold(std::span<const StoredKey> keys, const Store::Found& found) const;
  // Of a row that is not in memory: the filter had its key before the row left. Structure lock held.
  bool may_be_cold(const StoredKey& key) const noexcept { return !presence_.complete() || presence_.may_contain(key); }
  bool needs_displacing(const HotRow& row) const noexcept {
    return cut_active_ && row.has(HotRow::kDirty) && row.sequence <= cut_sequence_ && !row.has(HotRow::kSaved);
  }
  using DisplacedRows = std::vector<std::pair<StoredKey, Displaced>>;
  void displace(const HotRow& row, DisplacedRows& out) const;
  void keep_displaced(DisplacedRows&& rows);
  void encode(const HotRow& row, std::string& out) const;
  static StoredKey stored_key(const HotRow& row) noexcept { return StoredKey::make(row.table_id, row.mixed); }
  void add_row(Slot slot, bool has_floats);                                  // structure lock held
  size_t allocate(size_t slot_bytes, size_t count, std::vector<Slot>& out);  // structure lock held
  void wait_for_slots(size_t slot_bytes, size_t count);                      // no structure lock
  // What the cold tier had of a row.
  enum class Found : uint8_t { kNowhere, kFirstFloats, kFloats };
  // All but the flags: whoever goes over the slots reads those of a pending row, too.
  static void fill_from(const TableShape& shape, const StoredKey& key, const DecodedRow& decoded, HotRow& row);

  void evict_loop();
  void evict_some(size_t slot_bytes, size_t target);
  void empty_slab(size_t slab);
  void write_back(std::vector<Leaving>& victims, bool take_slab);
  void put_rows(StoreWriter& writer, const std::string& bytes, std::span<const EncodedRow> rows);
  size_t low_water(size_t slot_bytes) const noexcept;
  size_t high_water(size_t slot_bytes) const noexcept;

  HotTier hot_;
  const size_t all_bytes_;  // of the rows, before others take some
  PresenceFilter presence_;
  Store& store_;
  ThreadPool& pool_;
  WriteAhead write_ahead_;
  ShapeOf shape_of_;

  std::mutex write_mutex_;
  mutable std::mutex structure_;
  std::atomic<uint64_t> epoch_{0};
  std::atomic<uint64_t> moves_{0};
  std::vector<uint64_t> removed_;  // epoch of the last removal, per bucket of keys; structure lock
  size_t pending_bytes_ = 0;       // slots that lookups hold while they read; structure lock

  // the open cut; structure lock
  bool cut_active_ = false;
  uint64_t cut_sequence_ = 0;
  std::map<StoredKey, Displaced> displaced_;
  size_t displaced_bytes_ = 0;
  std::condition_variable cut_progress_;

  // eviction; structure lock
  std::map<size_t, size_t> demand_;                   // slot size -> slots somebody waits for or low water asks for
  size_t working_slot_bytes_ = 0, working_rows_ = 0;  // of the operation at hand, or the last one
  std::map<size_t, size_t> hand_;                     // slot size -> slab where the hand stands
  std::condition_variable evict_wake_, slots_freed_;
  std::exception_ptr no_space_;                     // why the last eviction could not write, when the disk was full
  uint64_t evictions_begun_ = 0, no_space_in_ = 0;  // the last of them that met a full disk
  bool stop_ = false;
  mutable std::mutex error_mutex_;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  std::thread evictor_;

  struct Counters {
    std::atomic<uint64_t> hits{0}, cold_hits{0}, created{0}, evicted{0}, written_back{0}, write_waits{0}, cuts{0},
        cut_rows{0}, cut_displaced{0};
    std::atomic<double> cut_pause_seconds{0};
  };
  mutable Counters counters_;
  std::atomic<uint64_t> bytes_written_{0};
};

}  // namespace damo
