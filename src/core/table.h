// SPDX-License-Identifier: Apache-2.0
//
// One group's rows. Keys are 64 bits (an int64 and a uint64 of the same bits are the same key); a batch may hold
// a key many times. Arrays are row-major and contiguous; out and gradients are float32 [keys, dimension].
//
// Thread safety: all methods, from any thread. A lookup sees each row at one moment.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "admission.h"
#include "batch.h"
#include "format.h"
#include "lifetime.h"
#include "schedule.h"
#include "store.h"
#include "table_spec.h"

namespace damo {

class Storage;

struct RowInfo {
  uint64_t key = 0;
  uint32_t update_count = 0;
  uint32_t step = 0;  // the group's step at the last update
  int64_t time = 0;
  uint64_t sequence = 0;
  bool in_memory = false;
  std::vector<float> floats{};  // weights, then state
};

// Rows of one cut, in the order of their mixed keys.
class Scan {
 public:
  Scan() = default;
  ~Scan();
  Scan(const Scan&) = delete;
  Scan& operator=(const Scan&) = delete;
  // Fills up to `limit` rows; returns how many. Each span holds `limit` rows; `floats` is [limit, num_floats].
  size_t next(size_t limit, uint64_t* keys, float* floats, uint32_t* update_counts, int64_t* times);
  size_t num_floats() const noexcept { return shape_->num_floats(); }

 private:
  friend class Table;
  Storage* storage_ = nullptr;
  const TableShape* shape_ = nullptr;
  Expiry expiry_;  // as of the cut
  std::shared_ptr<const StoreSnapshot> snapshot_;
  std::unique_ptr<StoreIterator> rows_;
};

class Table {
 public:
  Table(Storage& storage, TableSpec spec);

  const TableSpec& spec() const noexcept { return shape_.spec; }
  const Optimizer& optimizer() const noexcept { return *shape_.optimizer; }
  uint64_t size() const;                                              // rows that have not expired by now
  uint64_t step() const noexcept { return step_.load(); }             // applied updates
  size_t num_floats() const noexcept { return shape_.num_floats(); }  // weights and state of a row
  // The rate that the next update will use. Throws what the schedule throws.
  double lr() const { return rate_at("lr", step_); }
  // From the next update on, for all who use the group. Not stored: a new open begins with the optimizer's rate.
  void set_lr(double lr);
  void set_lr(std::shared_ptr<const Schedule> schedule);

  // Fills `out` for every key. With `insert`, keys without a row get one (a training lookup) as soon as the group's
  // filter, if it has one, lets them in, and the batch comes back for the backward pass. Without, nothing is stored,
  // counted or evicted. Keys that have no row then read as their first weights, or as zeros. Positions whose key is
  // `padding` read as zeros and belong to no row. On an error `out` is unspecified.
  std::shared_ptr<Batch> lookup(std::span<const uint64_t> keys, float* out, bool insert, bool zeros,
                                std::optional<uint64_t> padding);

  struct Part {
    const Batch* batch;      // of this table's lookup
    const float* gradients;  // [positions, dimension]
  };
  // One optimizer step: the gradients of all parts summed per key in order of appearance. Keys without a row get one;
  // in a group with a filter their gradients are left out instead, which is a step all the same.
  // `lr` overrides the rate for this step. NaN or infinity: std::invalid_argument names the first key, nothing is
  // applied.
  // The schedule is asked once for each update, in the order of the steps, for the step the update gets: with the order
  // lock held, on the caller's thread. When it throws, or gives what is no rate, nothing is applied.
  void apply_gradients(std::span<const Part> parts, std::optional<double> lr);
  // The same for several tables of one storage, each once, as one operation: after a crash or an error all of them
  // have learnt, or none has.
  struct Update {
    Table* table;
    std::vector<Part> parts;
    std::optional<double> lr;
  };
  static void apply_gradients(std::span<const Update> updates);
  // The same gradients with each key once, for who looks at them before they are applied: a batch with one position
  // a row, and its gradients [rows, dimension]. NaN and infinity pass.
  std::pair<std::shared_ptr<Batch>, std::unique_ptr<float[]>> merge(std::span<const Part> parts) const;
  void apply_gradients(std::span<const uint64_t> keys, const float* gradients, std::optional<double> lr);

  uint64_t erase(std::span<const uint64_t> keys);  // returns how many rows went

  // Rows given by the caller, whole: what was there is replaced. `keys` distinct; `update_counts` [keys]; `floats`
  // [keys, weights and state]. std::invalid_argument names the first key that stands twice or has a float that is not
  // finite; nothing has changed.
  void import_rows(std::span<const uint64_t> keys, std::span<const uint32_t> update_counts, const float* floats);
  // The filter, looked at. std::invalid_argument when the group has none.
  struct FilterInfo {
    FilterSettings settings;
    uint64_t memory_bytes = 0;
    uint64_t adds = 0;
    double fill = 0.0, distinct_keys = 0.0;
    uint64_t refused = 0, ignored = 0;  // since the open: as Admission's
  };
  std::optional<FilterSettings> filter_settings() const;  // absent: every key gets a row
  FilterInfo filter_info() const;
  double filter_estimated_fpr() const;  // reads all counters
  void filter_estimate(std::span<const uint64_t> keys, uint8_t* out) const;
  void filter_check(std::span<const uint64_t> keys, bool* out) const;

  void contains(std::span<const uint64_t> keys, bool* out) const;
  std::optional<RowInfo> inspect(uint64_t key) const;
  void prefetch(std::span<const uint64_t> keys);  // a hint: returns at once
  std::unique_ptr<Scan> scan();                   // of a cut made now

 private:
  friend class Storage;
  const TableShape& shape() const noexcept { return shape_; }
  TableCounters counters() const;  // order lock held
  void set_counters(const TableCounters& counters);
  uint64_t rows_at(int64_t now) const;
  void check_exists(const char* operation) const;  // std::invalid_argument once the group was dropped
  // Erases rows that have expired already and are not counted any more.
  void purge(std::span<const uint64_t> keys);
  // Erases rows that no operation after `sequence` has changed; returns how many went.
  uint64_t erase_unless_newer(std::span<const uint64_t> keys, uint64_t sequence);
  enum class Erased { kLiving, kAll, kForgotten };  // kForgotten: living ones, to make room
  uint64_t erase(std::span<const uint64_t> keys, Erased what, uint64_t newest);
  void adopt(const Lifetime& lifetime, bool own, AgeCounts counts);  // order lock held
  void adopt(const TableSpec& wanted);  // other optimizer settings of the same layout; order and structure lock held
  void create(Batch& batch, std::span<const uint32_t> rows, std::optional<uint64_t> absent_at, float* out);
  // The same in a group with a filter: counts the keys that still have no row, and makes the rows of those that come to
  // its count. Returns the others.
  std::vector<uint32_t> admit(Admission& admission, Batch& batch, std::vector<uint32_t> rows,
                              std::optional<uint64_t> absent_at, float* out);
  // Null in a group without a filter.
  std::shared_ptr<Admission> admission() const;
  std::shared_ptr<Admission> admission(const char* operation) const;  // std::invalid_argument instead
  void set_admission(const std::optional<AdmissionSpec>& spec);       // order lock held
  FilterInfo info_of(const Admission& admission) const;               // order lock held
  struct Sums {
    std::unique_ptr<const Batch> merged;  // unless there is exactly one part
    const Batch* batch = nullptr;         // the part's, or `merged`
    std::unique_ptr<float[]> gradients;   // [rows, dimension]
  };
  Sums sum(std::span<const Part> parts) const;
  double rate_at(const char* operation, uint64_t step) const;
  // The order lock is held. Returns the operation's sequence number. `Step` is defined beside it.
  struct Step;
  static uint64_t apply(Storage& storage, std::span<Step> steps);
  Expiry expiry_at(int64_t now) const noexcept;  // what has expired for an operation at that time
  Expiry expiry_now() const;                     // and for a lookup
  // The age mark of a row changed at this time and step.
  int64_t mark(int64_t time, uint64_t step) const noexcept;

  // Each row of the batch as it is: its age mark, kAbsent if it exists nowhere, and its last operation.
  static constexpr int64_t kAbsent = kBeforeAllTime;
  struct Found {
    int64_t mark;
    uint64_t sequence;
  };
  std::vector<Found> survey(const Batch& batch, const Expiry& expiry) const;
  // The one way in which rows change, of one table or of several; `Change` is defined beside it.
  struct Change;
  static void operate(std::span<Change> changes, const std::function<void()>& log);
  // What an operation does to the counts that gives rows of these marks the mark `renewed`, or takes them away.
  AgeEffect effect_on(std::span<const uint32_t> rows, std::span<const int64_t> marks, const Expiry& expiry,
                      std::optional<int64_t> renewed) const;
  void count(const AgeEffect& effect) noexcept;  // the order lock is held; after the log write

  void redo_apply(uint64_t sequence, const ApplyRecord& record, const std::string& source, uint64_t offset);
  void redo_insert(uint64_t sequence, const KeysRecord& record);
  void redo_erase(uint64_t sequence, const KeysRecord& record);
  void redo_count(uint64_t sequence, const CountRecord& record, const std::string& source, uint64_t offset);
  void redo_import(uint64_t sequence, const ImportRecord& record, const std::string& source, uint64_t offset);

  // While its rows are counted from a snapshot: the disk keeper leaves them alone.
  class CountedAnew {
   public:
    CountedAnew(Table& table, std::mutex& order) : table_(table), order_(order) { set(true); }
    ~CountedAnew() { set(false); }
    CountedAnew(const CountedAnew&) = delete;
    CountedAnew& operator=(const CountedAnew&) = delete;

   private:
    void set(bool value) {
      const std::lock_guard order(order_);
      table_.counted_anew_ = value;
    }
    Table& table_;
    std::mutex& order_;
  };

  Storage& storage_;
  TableShape shape_;
  mutable std::mutex counts_mutex_;  // protects counts_, which is written under the order lock too
  AgeCounts counts_;
  bool counts_fit_ = true;  // false: the log disagrees with them, they are made anew from the rows
  std::atomic<uint64_t> step_{0};
  const uint64_t serial_;  // in this process, which an address is not: another table may have that later
  std::atomic<bool> dropped_{false};
  bool counted_anew_ = false;          // order lock
  mutable std::mutex schedule_mutex_;  // protects the pointer, for a moment: a schedule is asked without it
  std::shared_ptr<const Schedule> schedule_;
  bool in_use_ = false;                 // some Embedding of this process has it; order lock
  mutable std::mutex admission_mutex_;  // protects the pointer, for a moment
  std::shared_ptr<Admission> admission_;

  // The last training lookup, for an apply_gradients of the same keys: saves finding repeats and rows again.
  struct LastLookup {
    std::vector<uint64_t> keys;
    std::shared_ptr<Batch> batch;
  };
  std::mutex last_mutex_;
  LastLookup last_;
};

}  // namespace damo
