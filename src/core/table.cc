// SPDX-License-Identifier: Apache-2.0
#include "table.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <map>
#include <stdexcept>

#include "error.h"
#include "planted.h"
#include "storage.h"
#include "table_operations.h"

namespace damo {
namespace {

// Fills `out` with those of the rows that are there, and notes where they are.
void take(Tiers& tiers, Batch& batch, std::span<const uint32_t> rows, const Tiers::Prepared& prepared, size_t dimension,
          float* out) {
  for (const uint32_t r : rows) {
    if (prepared.slots[r] == kNoSlot) continue;
    batch.hints[r] = prepared.slots[r];
    std::memcpy(out + batch.first[r] * dimension, tiers.hot().row(prepared.slots[r])->floats(),
                dimension * sizeof(float));
  }
}

}  // namespace

TableCounters Table::counters() const {
  const std::lock_guard lock(counts_mutex_);
  TableCounters counters{.table_id = spec().table_id, .group_step = step_, .lifetime = spec().lifetime, .rows = {}};
  if (counts_fit_)
    counters.rows = counts_;
  else
    counters.lifetime = kUnknownLifetime;
  return counters;
}

void Table::set_counters(const TableCounters& counters) {
  const std::lock_guard lock(counts_mutex_);
  step_ = counters.group_step;
  counts_ = counters.rows;
  counts_fit_ = counters.lifetime == spec().lifetime;
}

Table::Table(Storage& storage, TableSpec spec)
    : storage_(storage), shape_(std::move(spec)), serial_([] {
        static std::atomic<uint64_t> made{0};
        return ++made;
      }()) {
  set_lr(shape_.optimizer->lr());
  set_admission(shape_.spec.admission);
}

void Table::adopt(const TableSpec& wanted) {
  shape_.spec.optimizer_settings = wanted.optimizer_settings;
  shape_.optimizer = make_optimizer(shape_.spec.optimizer, shape_.spec.optimizer_settings);
  set_lr(shape_.optimizer->lr());
}

void Table::adopt(const Lifetime& lifetime, bool own, AgeCounts counts) {
  const std::lock_guard lock(counts_mutex_);
  shape_.spec.lifetime = lifetime;
  shape_.spec.own_lifetime = own;
  counts_ = std::move(counts);
  counts_fit_ = true;
}

void Table::set_lr(double lr) { set_lr(make_schedule("constant", {{"lr", check_lr("lr", lr)}})); }

void Table::set_lr(std::shared_ptr<const Schedule> schedule) {
  // The old one goes at the end of the call, not under the lock: what goes with it is the caller's.
  const std::lock_guard lock(schedule_mutex_);
  schedule_.swap(schedule);
}

double Table::rate_at(const char* operation, uint64_t step) const {
  std::shared_ptr<const Schedule> schedule;
  {
    const std::lock_guard lock(schedule_mutex_);
    schedule = schedule_;
  }
  const double lr = schedule->rate(step);
  if (lr >= 0.0 && lr <= kMaxFloat) return lr;
  throw std::invalid_argument(std::string("[") + operation + "] the schedule of " + spec().label() + " gives " +
                              format_number(lr) + " for step " + std::to_string(step) + ", expected a number in [0, " +
                              format_number(kMaxFloat) + "]: give another one, or set lr to a number");
}

// ------------------------------------------------------------------ lookup

std::shared_ptr<Batch> Table::lookup(std::span<const uint64_t> keys, float* out, bool insert, bool zeros,
                                     std::optional<uint64_t> padding) {
  check_positions("lookup", keys.size());
  const Storage::Use use(storage_, "lookup");
  check_exists("lookup");
  if (insert)
    storage_.check_may_change("lookup", "pass insert=False, which gives no key a row (a torch module: eval()), or ");
  Tiers& tiers = *storage_.tiers_;
  auto batch = std::make_shared<Batch>(keys, padding);
  batch->table = serial_;
  const size_t dimension = spec().dimension;
  const Expiry expiry = expiry_now();
  const auto first_weights = [&](uint32_t r) {
    float* to = out + batch->first[r] * dimension;
    if (zeros)
      std::fill_n(to, dimension, 0.0f);
    else
      shape_.first_weights(batch->mixed[r], to);
  };
  batch->by_shard = std::make_shared<const ShardOrder>(*batch, tiers.hot());
  // Memory that no training fills is for the rows that are read.
  const bool keep = storage_.options_.read_only;
  Tiers::HotRead read = tiers.read_hot(shape_, expiry, *batch, *batch->by_shard, out, insert || keep);
  if (insert) {
    // All in one record, so that after a crash the lookup made all of its rows or none.
    std::vector<uint32_t> fresh = std::move(read.gone);
    std::optional<uint64_t> absent_at;
    if (!read.missing.empty()) {
      Tiers::Absent absent = tiers.bring_in(shape_, expiry, *batch, std::move(read.missing), out);
      // The epoch says nothing of the rows that are gone: those were seen before it.
      if (fresh.empty()) absent_at = absent.epoch;
      fresh.insert(fresh.end(), absent.rows.begin(), absent.rows.end());
    }
    if (!fresh.empty()) {
      if (const std::shared_ptr<Admission> filter = admission())
        for (const uint32_t r : admit(*filter, *batch, std::move(fresh), absent_at, out)) first_weights(r);
      else
        create(*batch, fresh, absent_at, out);
    }
  } else if (keep) {
    if (!read.missing.empty())
      for (const uint32_t r : tiers.bring_in(shape_, expiry, *batch, std::move(read.missing), out).rows)
        first_weights(r);
    for (const uint32_t r : read.gone) first_weights(r);
  } else {
    tiers.read_through(shape_, expiry, *batch, std::move(read.missing), [&](uint32_t r, const Tiers::Seen& seen) {
      float* to = out + batch->first[r] * dimension;
      if (!seen.found)
        first_weights(r);
      else if (seen.floats.empty())
        shape_.first_weights(batch->mixed[r], to);
      else
        std::memcpy(to, seen.floats.data(), dimension * sizeof(float));
    });
    for (const uint32_t r : read.gone) first_weights(r);
  }
  repeat_rows(*batch, dimension, *storage_.pool_, out);
  // Small beside the budget: a hundredth of it for a usual batch.
  if (insert && !padding && keys.size() <= storage_.options_.memory_bytes / 1024) {
    const std::lock_guard lock(last_mutex_);
    last_.batch.reset();
    try {
      last_.keys.assign(keys.begin(), keys.end());
      last_.batch = batch;
    } catch (const std::bad_alloc&) {
      // The rows are made, and are found without it.
    }
  }
  return batch;
}

void Table::create(Batch& batch, std::span<const uint32_t> rows, std::optional<uint64_t> absent_at, float* out) {
  Tiers& tiers = *storage_.tiers_;
  const size_t dimension = spec().dimension, chunk_rows = tiers.chunk_rows(shape_);
  uint64_t sequence = 0;
  {
    const std::unique_lock order = storage_.begin_operation();
    check_exists("lookup");
    const int64_t time = storage_.read_clock();
    const Expiry expiry = expiry_at(time);
    const auto log = [&](std::span<const uint32_t> fresh) {
      std::vector<uint64_t> created;
      for (const uint32_t r : fresh) created.push_back(unmix_key(batch.mixed[r]));
      const std::vector<int64_t> marks(batch.num_rows(), kAbsent);
      AgeEffect ages = effect_on(fresh, marks, expiry, mark(time, step_));
      const std::string prefix = encode_keys_prefix({spec().table_id, time, ages, created});
      const std::array<Bytes, 2> parts{std::as_bytes(std::span(prefix)), std::as_bytes(std::span(created))};
      sequence = storage_.append(RecordType::kInsert, parts);
      storage_.clock_ = time;
      return ages;
    };
    // Absent at that epoch or expired by then: time does not run back, and no step is taken back.
    if (rows.size() <= chunk_rows) {
      Tiers::Prepared prepared = tiers.prepare(shape_, expiry, batch, rows, true, absent_at);
      if (!prepared.fresh.empty()) {
        AgeEffect ages;
        try {
          ages = log(prepared.fresh);
        } catch (...) {
          tiers.abandon(prepared);
          throw;
        }
        after_log(tiers, [&] { tiers.create_rows(shape_, batch, prepared, sequence, step_, time); });
        count(ages);
      }
      take(tiers, batch, rows, prepared, dimension, out);
    } else {
      // More than memory holds at once: those that somebody made meanwhile are taken, all others logged, then made.
      std::vector<uint32_t> absent;
      for_each_chunk(rows, chunk_rows, [&](std::span<const uint32_t> chunk) {
        const Tiers::Prepared prepared = tiers.prepare(shape_, expiry, batch, chunk, false, absent_at);
        take(tiers, batch, chunk, prepared, dimension, out);
        std::copy_if(chunk.begin(), chunk.end(), std::back_inserter(absent),
                     [&](uint32_t r) { return prepared.slots[r] == kNoSlot; });
      });
      if (absent.empty()) return;
      const AgeEffect ages = log(absent);
      count(ages);
      after_log(tiers, [&] {
        for_each_chunk(absent, chunk_rows, [&](std::span<const uint32_t> chunk) {
          const Tiers::Prepared prepared = tiers.prepare(shape_, expiry, batch, chunk, true, Tiers::kStillAbsent);
          after_log(tiers, [&] { tiers.create_rows(shape_, batch, prepared, sequence, step_, time); });
          take(tiers, batch, chunk, prepared, dimension, out);
        });
      });
    }
  }
  storage_.after_operation(sequence);
}

// --------------------------------------------------------------- admission

std::shared_ptr<Admission> Table::admission() const {
  const std::lock_guard lock(admission_mutex_);
  return admission_;
}

std::shared_ptr<Admission> Table::admission(const char* operation) const {
  check_exists(operation);
  if (auto filter = admission()) return filter;
  throw std::invalid_argument(std::string("[") + operation + "] " + spec().label() + " has no admission filter");
}

void Table::set_admission(const std::optional<AdmissionSpec>& spec) {
  auto made = spec ? std::make_shared<Admission>(*spec) : nullptr;
  shape_.spec.admission = spec;
  const std::lock_guard lock(admission_mutex_);
  admission_.swap(made);
}

std::vector<uint32_t> Table::admit(Admission& admission, Batch& batch, std::vector<uint32_t> rows,
                                   std::optional<uint64_t> absent_at, float* out) {
  Tiers& tiers = *storage_.tiers_;
  const size_t dimension = spec().dimension, chunk_rows = tiers.chunk_rows(shape_);
  // In order of first appearance, in whatever order they were found missing.
  std::sort(rows.begin(), rows.end());
  std::vector<uint32_t> stands(batch.num_rows(), 0);
  for (const uint32_t row : batch.index)
    if (row != Batch::kNoRow) ++stands[row];
  std::vector<uint32_t> without, admitted;
  uint64_t sequence = 0;
  {
    const std::unique_lock order = storage_.begin_operation();
    check_exists("lookup");
    const int64_t time = storage_.read_clock();
    const Expiry expiry = expiry_at(time);
    // From here on nobody else makes a row: these are all that get counted.
    for_each_chunk(rows, chunk_rows, [&](std::span<const uint32_t> chunk) {
      const Tiers::Prepared prepared = tiers.prepare(shape_, expiry, batch, chunk, false, absent_at);
      take(tiers, batch, chunk, prepared, dimension, out);
      for (const uint32_t r : chunk)
        if (prepared.slots[r] == kNoSlot) without.push_back(r);
    });
    if (without.empty()) return without;
    std::vector<uint64_t> keys;
    std::vector<uint32_t> times;
    for (const uint32_t r : without) {
      keys.push_back(unmix_key(batch.mixed[r]));
      times.push_back(stands[r]);
    }
    const Bytes times_bytes = std::as_bytes(std::span(times));
    const CountRecord record{.table_id = spec().table_id,
                             .time = time,
                             .unit = expiry.unit,
                             .alive_since = expiry.alive_since,
                             .bucket = spec().lifetime.bucket(mark(time, step_)),
                             .keys = keys,
                             .times = times_bytes};
    const std::string prefix = encode_count_prefix(record);
    const std::array<Bytes, 3> parts{std::as_bytes(std::span(prefix)), std::as_bytes(std::span(keys)), times_bytes};
    sequence = storage_.append(RecordType::kCount, parts);
    storage_.clock_ = time;
    // Which keys come in is known only now. Should their rows not be made, redo counts the keys again and makes them.
    after_log(tiers, [&] {
      const std::unique_ptr<bool[]> seen = admission.count(keys, times, sequence);
      std::vector<uint32_t> refused;
      for (size_t i = 0; i < without.size(); ++i) (seen[i] ? admitted : refused).push_back(without[i]);
      without = std::move(refused);
      for_each_chunk(admitted, chunk_rows, [&](std::span<const uint32_t> chunk) {
        const Tiers::Prepared prepared = tiers.prepare(shape_, expiry, batch, chunk, true, Tiers::kStillAbsent);
        after_log(tiers, [&] { tiers.create_rows(shape_, batch, prepared, sequence, step_, time); });
        take(tiers, batch, chunk, prepared, dimension, out);
      });
      count({record.unit, record.alive_since, {{record.bucket, static_cast<int64_t>(admitted.size())}}});
    });
    admission.refused += without.size();
  }
  storage_.after_operation(sequence);
  return without;
}

std::optional<FilterSettings> Table::filter_settings() const {
  const std::shared_ptr<Admission> filter = admission();
  return filter ? std::optional(filter->filter->settings()) : std::nullopt;
}

Table::FilterInfo Table::info_of(const Admission& admission) const {
  const CountingBloomFilter& filter = *admission.filter;
  return {.settings = filter.settings(),
          .memory_bytes = filter.memory_bytes(),
          .adds = filter.adds(),
          .fill = filter.fill(),
          .distinct_keys = filter.distinct_keys(),
          .refused = admission.refused,
          .ignored = admission.ignored};
}

Table::FilterInfo Table::filter_info() const {
  const Storage::Use use(storage_, "admission");
  const std::lock_guard order(storage_.order_);
  return info_of(*admission("admission"));
}

double Table::filter_estimated_fpr() const {
  const Storage::Use use(storage_, "admission");
  return admission("admission")->filter->estimated_fpr();
}

void Table::filter_estimate(std::span<const uint64_t> keys, uint8_t* out) const {
  const Storage::Use use(storage_, "estimate");
  admission("estimate")->filter->estimate(keys, out);
}

void Table::filter_check(std::span<const uint64_t> keys, bool* out) const {
  const Storage::Use use(storage_, "check");
  admission("check")->filter->check(keys, out);
}

// --------------------------------------------------------- rows that change

Expiry Table::expiry_at(int64_t now) const noexcept { return spec().lifetime.at(now, step_.load()); }
Expiry Table::expiry_now() const { return expiry_at(storage_.read_clock()); }

int64_t Table::mark(int64_t time, uint64_t step) const noexcept {
  return spec().lifetime.unit == AgeUnit::kSteps ? static_cast<int64_t>(step) : time;
}

uint64_t Table::rows_at(int64_t now) const {
  const std::lock_guard lock(counts_mutex_);
  const Expiry expiry = expiry_at(now);
  return counts_.since(spec().lifetime.first_bucket(expiry));
}

uint64_t Table::size() const {
  // Counts alone: nothing of it needs the storage's files, so that a schedule may ask, too.
  storage_.check_process("len");
  if (storage_.closed())
    throw ClosedError("[len] the storage " + storage_.path().string() + " is closed: open it again with Storage(path)");
  check_exists("len");
  return rows_at(storage_.read_clock());
}

void Table::check_exists(const char* operation) const {
  if (dropped_.load())
    throw std::invalid_argument(std::string("[") + operation + "] " + spec().label() +
                                " was dropped: open it again for a new, empty one");
}

std::vector<Table::Found> Table::survey(const Batch& batch, const Expiry& expiry) const {
  Tiers& tiers = *storage_.tiers_;
  Batch probe = batch;
  std::vector<Found> found(batch.num_rows(), Found{kAbsent, 0});
  const auto note = [&](uint32_t r, int64_t time, uint32_t step, uint64_t sequence) {
    found[r] = {expiry.mark(time, step), sequence};
  };
  Tiers::HotRead read =
      tiers.read_hot(shape_, expiry, probe, ShardOrder(probe, tiers.hot()), nullptr, false,
                     [&](uint32_t r, const HotRow& row) { note(r, row.time, row.step, row.sequence); });
  tiers.read_through(shape_, expiry, batch, std::move(read.missing), [&](uint32_t r, const Tiers::Seen& seen) {
    if (seen.found) note(r, seen.header.time, seen.header.step, seen.header.sequence);
  });
  return found;
}

AgeEffect Table::effect_on(std::span<const uint32_t> rows, std::span<const int64_t> marks, const Expiry& expiry,
                           std::optional<int64_t> renewed) const {
  const Lifetime& lifetime = spec().lifetime;
  std::map<int64_t, int64_t> changes;
  int64_t* last = nullptr;  // most rows of a batch are of few ages
  int64_t last_bucket = 0;
  for (const uint32_t r : rows) {
    if (marks[r] == kAbsent) continue;
    const int64_t bucket = lifetime.bucket(marks[r]);
    if (last == nullptr || bucket != last_bucket) {
      last = &changes[bucket];
      last_bucket = bucket;
    }
    --*last;
  }
  if (renewed) changes[lifetime.bucket(*renewed)] += static_cast<int64_t>(rows.size());
  AgeEffect effect{expiry.unit, expiry.alive_since, {}};
  for (const auto& change : changes)
    if (change.second != 0) effect.changes.push_back(change);
  return effect;
}

void Table::count(const AgeEffect& effect) noexcept {
  const std::lock_guard lock(counts_mutex_);
  if (effect.unit != AgeUnit::kNone) counts_.forget_before(spec().lifetime.bucket(effect.alive_since));
  // The operation is logged: nothing may fail any more. Counts that do not fit are made anew at the next open.
  try {
    if (!counts_.add(effect.changes)) counts_fit_ = false;
  } catch (const std::bad_alloc&) {
    counts_fit_ = false;
  }
}

// ------------------------------------------------------------ other verbs

void Table::contains(std::span<const uint64_t> keys, bool* out) const {
  check_positions("contains", keys.size());
  const Storage::Use use(storage_, "contains");
  check_exists("contains");
  const Batch batch(keys, std::nullopt);
  const std::vector<Found> found = survey(batch, expiry_now());
  for (size_t p = 0; p < keys.size(); ++p) out[p] = found[batch.index[p]].mark != kAbsent;
}

std::optional<RowInfo> Table::inspect(uint64_t key) const {
  const Storage::Use use(storage_, "inspect");
  check_exists("inspect");
  Tiers& tiers = *storage_.tiers_;
  const uint64_t mixed = mix_key(key);
  const Expiry expiry = expiry_now();
  RowInfo info{.key = key};
  info.floats.resize(shape_.num_floats());
  {
    const std::lock_guard lock(tiers.structure());
    HotTier& hot = tiers.hot();
    const Slot slot = hot.find(hot.shard(hot.shard_of(mixed)), spec().table_id, mixed);
    if (slot != kNoSlot) {
      const HotRow* row = hot.row(slot);
      if (!row->is_row() || !expiry.alive(row->time, row->step)) return std::nullopt;
      info.update_count = row->update_count;
      info.step = row->step;
      info.time = row->time;
      info.sequence = row->sequence;
      info.in_memory = true;
      std::copy_n(row->floats(), info.floats.size(), info.floats.begin());
      return info;
    }
  }
  const Batch batch({&key, 1}, std::nullopt);
  bool found = false;
  tiers.read_through(shape_, expiry, batch, {0}, [&](uint32_t, const Tiers::Seen& seen) {
    found = seen.found;
    info.update_count = seen.header.update_count;
    info.step = seen.header.step;
    info.time = seen.header.time;
    info.sequence = seen.header.sequence;
    if (seen.floats.empty())
      shape_.first_floats(mixed, info.floats.data());
    else
      std::memcpy(info.floats.data(), seen.floats.data(), seen.floats.size());
  });
  return found ? std::optional(info) : std::nullopt;
}

void Table::prefetch(std::span<const uint64_t> keys) {
  check_positions("prefetch", keys.size());
  const Storage::Use use(storage_, "prefetch");
  check_exists("prefetch");
  storage_.prefetch(*this, {keys.begin(), keys.end()});
}

std::unique_ptr<Scan> Table::scan() {
  const Storage::Use use(storage_, "scan");
  check_exists("scan");
  auto scan = std::make_unique<Scan>();
  scan->storage_ = &storage_;
  scan->shape_ = &shape_;
  Storage::CutInfo info;
  scan->snapshot_ = storage_.snapshot(info);
  scan->expiry_ = info.expiry(spec());
  scan->rows_ = scan->snapshot_->scan(StoredKey::make(spec().table_id, 0), StoredKey::make(spec().table_id + 1, 0));
  return scan;
}

Scan::~Scan() {
  if (storage_ == nullptr || !storage_->is_forked()) return;
  // In a forked child the cold tier's locks are in whatever state the fork found them in: leave everything alone.
  (void)rows_.release();
  new std::shared_ptr<const StoreSnapshot>(std::move(snapshot_));
}

size_t Scan::next(size_t limit, uint64_t* keys, float* floats, uint32_t* update_counts, int64_t* times) {
  const Storage::Use use(*storage_, "scan");
  size_t count = 0;
  while (count < limit && rows_->next()) {
    const StoredKey key = rows_->key();
    const DecodedRow row = decode_row(key, rows_->value(), shape_->num_floats());
    if (!expiry_.alive(row.header.time, row.header.step)) continue;
    float* to = floats + count * shape_->num_floats();
    keys[count] = unmix_key(key.mixed());
    if (row.header.has_floats)
      std::memcpy(to, row.floats.data(), row.floats.size());
    else
      shape_->first_floats(key.mixed(), to);
    update_counts[count] = row.header.update_count;
    times[count] = row.header.time;
    ++count;
  }
  return count;
}

// -------------------------------------------------------------------- redo

void Table::redo_apply(uint64_t sequence, const ApplyRecord& record, const std::string& source, uint64_t offset) {
  if (record.optimizer_id == optimizer().id() && record.kernel_version > optimizer().kernel_version())
    throw NewerVersionError("[open] " + source + " at offset " + std::to_string(offset) + " has an update of " +
                            spec().label() + " by version " + std::to_string(record.kernel_version) + " of " +
                            spec().optimizer + ", this one has " + std::to_string(optimizer().kernel_version()) +
                            ": upgrade damo-embedding");
  if (record.dimension != spec().dimension || record.optimizer_id != optimizer().id() ||
      record.kernel_version != optimizer().kernel_version())
    throw CorruptionError("[open] " + source + " at offset " + std::to_string(offset) + " has an update of " +
                          spec().label() + " that does not fit the group (dimension, optimizer or its version)");
  Tiers& tiers = *storage_.tiers_;
  const Batch batch(record.keys, std::nullopt);
  std::vector<uint32_t> rows = all_rows(batch);
  if (planted("redo of one key left out") && rows.size() > 1) rows.pop_back();
  std::vector<float> sums(record.gradients.size() / sizeof(float));
  // No keys: an update whose gradients a filter has left out, all of them.
  if (!sums.empty()) std::memcpy(sums.data(), record.gradients.data(), record.gradients.size());
  if (batch.num_rows() != record.keys.size())
    throw CorruptionError("[open] " + source + " at offset " + std::to_string(offset) + " repeats a key");
  const Expiry expiry{record.ages.unit, record.ages.alive_since, step_};
  for_each_chunk(rows, tiers.chunk_rows(shape_), [&](std::span<const uint32_t> chunk) {
    const Tiers::Prepared prepared = tiers.prepare(shape_, expiry, batch, chunk, true);
    tiers.create_rows(shape_, batch, prepared, sequence, record.group_step, record.time);
    tiers.apply(shape_, batch, chunk, prepared, optimizer(), record.numbers, sums.data(), sequence, record.group_step,
                record.time);
  });
  if (!planted("len not redone")) count(record.ages);
  if (!planted("step not redone")) step_ = record.group_step;
}

void Table::redo_insert(uint64_t sequence, const KeysRecord& record) {
  Tiers& tiers = *storage_.tiers_;
  const Batch batch(record.keys, std::nullopt);
  const Expiry expiry{record.ages.unit, record.ages.alive_since, step_};
  for_each_chunk(all_rows(batch), tiers.chunk_rows(shape_), [&](std::span<const uint32_t> chunk) {
    const Tiers::Prepared prepared = tiers.prepare(shape_, expiry, batch, chunk, true);
    tiers.create_rows(shape_, batch, prepared, sequence, step_, record.time);
  });
  count(record.ages);
}

void Table::redo_erase(uint64_t sequence, const KeysRecord& record) {
  Tiers& tiers = *storage_.tiers_;
  const Batch batch(record.keys, std::nullopt);
  const Expiry expiry{record.ages.unit, record.ages.alive_since, step_};
  for_each_chunk(all_rows(batch), tiers.chunk_rows(shape_), [&](std::span<const uint32_t> chunk) {
    const Tiers::Prepared prepared = tiers.prepare(shape_, expiry, batch, chunk, false);
    tiers.erase(chunk, prepared, sequence);
  });
  count(record.ages);
}

void Table::redo_count(uint64_t sequence, const CountRecord& record, const std::string& source, uint64_t offset) {
  const auto refuse = [&](const char* what) {
    throw CorruptionError("[open] " + source + " at offset " + std::to_string(offset) + " counts keys of " +
                          spec().label() + what);
  };
  const std::shared_ptr<Admission> filter = admission();
  if (!filter) refuse(", which has no admission filter");
  Tiers& tiers = *storage_.tiers_;
  const Batch batch(record.keys, std::nullopt);
  if (batch.num_rows() != record.keys.size()) refuse(", one of them twice");
  std::vector<uint32_t> times(record.keys.size());
  if (!times.empty()) std::memcpy(times.data(), record.times.data(), record.times.size());
  if (planted("repeated key counted once in redo")) std::fill(times.begin(), times.end(), 1u);
  const std::unique_ptr<bool[]> seen = filter->count(record.keys, times, sequence);
  std::vector<uint32_t> admitted;
  for (uint32_t r = 0; r < batch.num_rows(); ++r)
    if (seen[r]) admitted.push_back(r);
  const Expiry expiry{record.unit, record.alive_since, step_};
  for_each_chunk(admitted, tiers.chunk_rows(shape_), [&](std::span<const uint32_t> chunk) {
    const Tiers::Prepared prepared = tiers.prepare(shape_, expiry, batch, chunk, true);
    tiers.create_rows(shape_, batch, prepared, sequence, step_, record.time);
  });
  count({record.unit, record.alive_since, {{record.bucket, static_cast<int64_t>(admitted.size())}}});
}

void Table::redo_import(uint64_t sequence, const ImportRecord& record, const std::string& source, uint64_t offset) {
  Tiers& tiers = *storage_.tiers_;
  const Batch batch(record.keys, std::nullopt);
  if (record.num_floats != shape_.num_floats() || batch.num_rows() != record.keys.size())
    throw CorruptionError("[open] " + source + " at offset " + std::to_string(offset) + " has imported rows of " +
                          spec().label() + " that do not fit the group, or repeat a key");
  const Expiry expiry{record.ages.unit, record.ages.alive_since, step_};
  for_each_chunk(all_rows(batch), tiers.chunk_rows(shape_), [&](std::span<const uint32_t> chunk) {
    const Tiers::Prepared prepared = tiers.prepare(shape_, expiry, batch, chunk, true);
    tiers.create_rows(shape_, batch, prepared, sequence, step_, record.time);
    if (planted("imported weights not redone")) return;
    tiers.replace(shape_, batch, chunk, prepared, record.update_counts.data(), record.floats.data(), sequence, step_,
                  record.time);
  });
  count(record.ages);
}

}  // namespace damo
