// SPDX-License-Identifier: Apache-2.0
#include "table.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>

#include "error.h"
#include "storage.h"

namespace damo {
namespace {

std::vector<uint32_t> all_rows(const Batch& batch) {
  std::vector<uint32_t> rows(batch.num_rows());
  std::iota(rows.begin(), rows.end(), 0u);
  return rows;
}

template <class Visit>
void for_each_chunk(std::span<const uint32_t> rows, size_t size, Visit&& visit) {
  for (size_t begin = 0; begin < rows.size(); begin += size)
    visit(rows.subspan(begin, std::min(size, rows.size() - begin)));
}

void check_positions(const char* operation, size_t positions) {
  if (positions >= Batch::kMaxPositions)
    throw std::invalid_argument(std::string("[") + operation + "] " + std::to_string(positions) +
                                " keys in one call, expected fewer than 2147483648: split the batch");
}

}  // namespace

Table::Table(Storage& storage, TableSpec spec) : storage_(storage), shape_(std::move(spec)) {
  set_lr(shape_.optimizer->lr());
}

void Table::adopt(const TableSpec& wanted) {
  shape_.spec.optimizer_settings = wanted.optimizer_settings;
  shape_.optimizer = make_optimizer(shape_.spec.optimizer, shape_.spec.optimizer_settings);
  set_lr(shape_.optimizer->lr());
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

void Table::expand(const Batch& batch, float* out) const {
  const size_t dimension = spec().dimension, bytes = dimension * sizeof(float);
  const size_t positions = batch.num_positions();
  const size_t ranges = positions < 8192 ? 1 : storage_.pool_->size();
  storage_.pool_->run(ranges, [&](size_t range) {
    const size_t end = positions * (range + 1) / ranges;
    for (size_t p = positions * range / ranges; p < end; ++p) {
      const uint32_t row = batch.index[p];
      float* to = out + p * dimension;
      if (row == Batch::kNoRow)
        std::memset(to, 0, bytes);
      else if (batch.first[row] != p)
        std::memcpy(to, out + batch.first[row] * dimension, bytes);
    }
  });
}

std::shared_ptr<Batch> Table::lookup(std::span<const uint64_t> keys, float* out, bool insert, bool zeros,
                                     std::optional<uint64_t> padding) {
  check_positions("lookup", keys.size());
  const Storage::Use use(storage_, "lookup");
  Tiers& tiers = *storage_.tiers_;
  auto batch = std::make_shared<Batch>(keys, padding);
  batch->table = this;
  const size_t dimension = spec().dimension;
  Tiers::HotRead read = tiers.read_hot(shape_, *batch, ShardOrder(*batch, tiers.hot()), out, insert);
  if (insert) {
    if (!read.missing.empty()) {
      Tiers::Absent absent = tiers.bring_in(shape_, *batch, std::move(read.missing), out);
      if (!absent.rows.empty()) create(*batch, absent.rows, absent.epoch, out);
    }
    if (!read.erased.empty()) create(*batch, read.erased, std::nullopt, out);
  } else {
    const auto first_weights = [&](uint32_t r) {
      float* to = out + batch->first[r] * dimension;
      if (zeros)
        std::fill_n(to, dimension, 0.0f);
      else
        shape_.first_weights(batch->mixed[r], to);
    };
    tiers.read_through(shape_, *batch, std::move(read.missing), [&](uint32_t r, const Tiers::Seen& seen) {
      float* to = out + batch->first[r] * dimension;
      if (!seen.found)
        first_weights(r);
      else if (seen.floats.empty())
        shape_.first_weights(batch->mixed[r], to);
      else
        std::memcpy(to, seen.floats.data(), dimension * sizeof(float));
    });
    for (const uint32_t r : read.erased) first_weights(r);
  }
  expand(*batch, out);
  // Small beside the budget: a hundredth of it for a usual batch.
  if (insert && !padding && keys.size() <= storage_.options_.memory_bytes / 1024) {
    const std::lock_guard lock(last_mutex_);
    last_.keys.assign(keys.begin(), keys.end());
    last_.batch = batch;
  }
  return batch;
}

void Table::create(Batch& batch, std::span<const uint32_t> rows, std::optional<uint32_t> absent_at, float* out) {
  Tiers& tiers = *storage_.tiers_;
  const size_t dimension = spec().dimension;
  uint64_t sequence = 0;
  for_each_chunk(rows, tiers.chunk_rows(shape_), [&](std::span<const uint32_t> chunk) {
    const std::unique_lock order = storage_.begin_operation();
    Tiers::Prepared prepared = tiers.prepare(shape_, batch, chunk, true, absent_at);
    if (!prepared.fresh.empty()) {
      std::vector<uint64_t> created;
      for (const uint32_t r : prepared.fresh) created.push_back(unmix_key(batch.mixed[r]));
      const int64_t time = storage_.tick();
      const std::string prefix = encode_keys_prefix({spec().table_id, time, created});
      try {
        const std::array<Bytes, 2> parts{std::as_bytes(std::span(prefix)), std::as_bytes(std::span(created))};
        sequence = storage_.append(RecordType::kInsert, parts);
      } catch (...) {
        tiers.abandon(prepared);
        throw;
      }
      tiers.create_rows(shape_, batch, prepared, sequence, time);
      rows_ += created.size();
    }
    for (const uint32_t r : chunk) {
      batch.hints[r] = prepared.slots[r];
      std::memcpy(out + batch.first[r] * dimension, tiers.hot().row(prepared.slots[r])->floats(),
                  dimension * sizeof(float));
    }
  });
  storage_.after_operation(sequence);
}

// --------------------------------------------------------- apply_gradients

void Table::apply_gradients(std::span<const uint64_t> keys, const float* gradients, std::optional<double> lr) {
  check_positions("apply_gradients", keys.size());
  std::shared_ptr<Batch> batch;
  {
    const std::lock_guard lock(last_mutex_);
    if (last_.batch && last_.keys.size() == keys.size() &&
        std::memcmp(last_.keys.data(), keys.data(), keys.size_bytes()) == 0)
      batch = last_.batch;
  }
  if (!batch) batch = std::make_shared<Batch>(keys, std::nullopt);
  const Part part{batch.get(), gradients};
  apply_gradients({&part, 1}, lr);
}

void Table::apply_gradients(std::span<const Part> parts, std::optional<double> lr) {
  const Update update{this, {parts.begin(), parts.end()}, lr};
  apply_gradients({&update, 1});
}

void Table::apply_gradients(std::span<const Update> updates) {
  if (updates.empty()) return;
  Storage& storage = updates[0].table->storage_;
  const Storage::Use use(storage, "apply_gradients");
  std::vector<Sums> sums;
  for (const Update& update : updates) {
    const Table& table = *update.table;
    if (&table.storage_ != &storage)
      throw std::invalid_argument("[apply_gradients] " + table.spec().label() + " is of another storage than " +
                                  updates[0].table->spec().label() + ": make one call for each storage");
    if (update.lr) check_lr("apply_gradients", *update.lr);
    sums.push_back(table.sum(update.parts));
    const Batch& batch = *sums.back().batch;
    const float* gradients = sums.back().gradients.get();
    if (const auto bad = first_not_finite(gradients, batch.num_rows(), table.spec().dimension, *table.storage_.pool_))
      throw std::invalid_argument("[apply_gradients] the gradient of key " +
                                  std::to_string(unmix_key(batch.mixed[*bad])) + " of " + table.spec().label() +
                                  " is NaN or infinite: nothing was applied. Look at the loss, or clip the gradients");
  }
  // An empty batch is no step, and its schedule is not asked.
  struct Step {
    Table* table;
    const Sums* sums;
    std::vector<uint64_t> keys;
    std::optional<double> lr;
  };
  std::vector<Step> steps;
  for (size_t u = 0; u < updates.size(); ++u) {
    const Batch& batch = *sums[u].batch;
    if (batch.num_rows() == 0) continue;
    std::vector<uint64_t> keys(batch.num_rows());
    std::transform(batch.mixed.begin(), batch.mixed.end(), keys.begin(), unmix_key);
    steps.push_back({updates[u].table, &sums[u], std::move(keys), updates[u].lr});
  }
  if (steps.empty()) return;
  uint64_t sequence = 0;
  {
    const std::unique_lock order = storage.begin_operation();
    {
      // All of them before any table changes.
      const Storage::AskingForRates asking;
      std::map<const Table*, uint64_t> earlier;  // updates of a table in this call, before this one
      for (Step& step : steps) {
        const uint64_t number = step.table->step_ + earlier[step.table]++;
        if (!step.lr) step.lr = step.table->rate_at("apply_gradients", number);
      }
    }
    for (Step& step : steps) {
      if (&step != steps.data()) storage.next_operation();
      sequence = step.table->apply_sums(*step.sums->batch, step.keys, step.sums->gradients.get(), *step.lr);
    }
  }
  storage.after_operation(sequence);
}

Table::Sums Table::sum(std::span<const Part> parts) const {
  std::vector<const float*> gradients;
  std::vector<size_t> positions;
  std::vector<const Batch*> batches;
  size_t total = 0;
  for (const Part& part : parts) {
    if (part.batch->table != nullptr && part.batch->table != this)
      throw std::invalid_argument("[apply_gradients] the batch comes from a lookup of another group than " +
                                  spec().label());
    gradients.push_back(part.gradients);
    positions.push_back(part.batch->num_positions());
    batches.push_back(part.batch);
    total += part.batch->num_positions();
  }
  check_positions("apply_gradients", total);
  Sums sums;
  if (batches.size() != 1) sums.merged = std::make_unique<Batch>(std::span<const Batch* const>(batches));
  sums.batch = sums.merged ? sums.merged.get() : batches[0];
  // Not value-initialized: every float is written by sum_gradients.
  sums.gradients = std::make_unique_for_overwrite<float[]>(sums.batch->num_rows() * spec().dimension);
  sum_gradients(*sums.batch, gradients, positions, spec().dimension, *storage_.pool_, sums.gradients.get());
  return sums;
}

std::pair<std::shared_ptr<Batch>, std::unique_ptr<float[]>> Table::merge(std::span<const Part> parts) const {
  const Storage::Use use(storage_, "merge");
  Sums sums = sum(parts);
  auto batch = std::make_shared<Batch>(*sums.batch);
  batch->table = this;
  batch->index.resize(batch->num_rows());
  std::iota(batch->index.begin(), batch->index.end(), 0u);
  batch->first = batch->index;
  return {std::move(batch), std::move(sums.gradients)};
}

std::vector<uint32_t> Table::missing_rows(const Batch& batch) const {
  Tiers& tiers = *storage_.tiers_;
  Batch probe = batch;
  Tiers::HotRead read = tiers.read_hot(shape_, probe, ShardOrder(probe, tiers.hot()), nullptr, false);
  std::vector<uint8_t> found(batch.num_rows(), 0);
  const std::vector<uint32_t> missing = read.missing;
  tiers.read_through(shape_, batch, std::move(read.missing),
                     [&](uint32_t r, const Tiers::Seen& seen) { found[r] = seen.found; });
  std::vector<uint32_t> absent = std::move(read.erased);
  for (const uint32_t r : missing)
    if (found[r] == 0) absent.push_back(r);
  return absent;
}

uint64_t Table::apply_sums(const Batch& batch, std::span<const uint64_t> keys, const float* sums, double lr) {
  Tiers& tiers = *storage_.tiers_;
  const std::vector<uint32_t> rows = all_rows(batch);
  const size_t chunk = tiers.chunk_rows(shape_);
  uint64_t sequence = 0;
  ApplyRecord record;
  record.table_id = spec().table_id;
  record.optimizer_id = optimizer().id();
  record.kernel_version = optimizer().kernel_version();
  record.dimension = spec().dimension;
  record.group_step = step_ + 1;
  record.numbers = optimizer().numbers(lr, record.group_step);
  record.keys = keys;
  const auto log = [&] {
    const std::string prefix = encode_apply_prefix(record);
    const std::array<Bytes, 3> parts{std::as_bytes(std::span(prefix)), std::as_bytes(keys),
                                     std::as_bytes(std::span(sums, rows.size() * spec().dimension))};
    sequence = storage_.append(RecordType::kApply, parts);
    rows_ += record.num_new;
    step_ = record.group_step;
  };
  if (rows.size() <= chunk) {
    Tiers::Prepared prepared = tiers.prepare(shape_, batch, rows, true);
    try {
      record.time = storage_.tick();
      record.num_new = prepared.fresh.size();
      log();
    } catch (...) {
      tiers.abandon(prepared);
      throw;
    }
    tiers.create_rows(shape_, batch, prepared, sequence, record.time);
    tiers.apply(shape_, batch, rows, prepared, optimizer(), record.numbers, sums, sequence, record.group_step,
                record.time);
    return sequence;
  }
  // More rows than memory holds at once: logged whole first, then applied part by part. Should a part fail,
  // the storage latches, and redo completes the operation at the next open.
  record.num_new = missing_rows(batch).size();
  record.time = storage_.tick();
  log();
  try {
    for_each_chunk(rows, chunk, [&](std::span<const uint32_t> part) {
      Tiers::Prepared prepared = tiers.prepare(shape_, batch, part, true);
      tiers.create_rows(shape_, batch, prepared, sequence, record.time);
      tiers.apply(shape_, batch, part, prepared, optimizer(), record.numbers, sums, sequence, record.group_step,
                  record.time);
    });
  } catch (...) {
    tiers.fail(std::current_exception());
    throw;
  }
  return sequence;
}

// ------------------------------------------------------------ other verbs

uint64_t Table::erase(std::span<const uint64_t> keys) {
  check_positions("erase", keys.size());
  const Storage::Use use(storage_, "erase");
  Tiers& tiers = *storage_.tiers_;
  const Batch batch(keys, std::nullopt);
  uint64_t sequence = 0, gone = 0;
  {
    const std::unique_lock order = storage_.begin_operation();
    std::vector<uint8_t> absent(batch.num_rows(), 0);
    for (const uint32_t r : missing_rows(batch)) absent[r] = 1;
    std::vector<uint32_t> rows;
    std::vector<uint64_t> erased;
    for (uint32_t r = 0; r < batch.num_rows(); ++r) {
      if (absent[r] != 0) continue;
      rows.push_back(r);
      erased.push_back(unmix_key(batch.mixed[r]));
    }
    if (rows.empty()) return 0;
    gone = rows.size();
    // As an apply: what can fail for want of memory comes before the log write when it fits, else redo completes it.
    const auto log = [&] {
      const std::string prefix = encode_keys_prefix({spec().table_id, storage_.tick(), erased});
      const std::array<Bytes, 2> parts{std::as_bytes(std::span(prefix)), std::as_bytes(std::span(erased))};
      sequence = storage_.append(RecordType::kErase, parts);
      rows_ -= gone;
    };
    const size_t chunk = tiers.chunk_rows(shape_);
    if (rows.size() <= chunk) {
      Tiers::Prepared prepared = tiers.prepare(shape_, batch, rows, false);
      log();
      tiers.erase(rows, prepared, sequence);
    } else {
      log();
      try {
        for_each_chunk(rows, chunk, [&](std::span<const uint32_t> part) {
          const Tiers::Prepared prepared = tiers.prepare(shape_, batch, part, false);
          tiers.erase(part, prepared, sequence);
        });
      } catch (...) {
        tiers.fail(std::current_exception());
        throw;
      }
    }
  }
  storage_.after_operation(sequence);
  return gone;
}

void Table::contains(std::span<const uint64_t> keys, bool* out) const {
  check_positions("contains", keys.size());
  const Storage::Use use(storage_, "contains");
  const Batch batch(keys, std::nullopt);
  std::vector<uint8_t> absent(batch.num_rows(), 0);
  for (const uint32_t r : missing_rows(batch)) absent[r] = 1;
  for (size_t p = 0; p < keys.size(); ++p) out[p] = absent[batch.index[p]] == 0;
}

std::optional<RowInfo> Table::inspect(uint64_t key) const {
  const Storage::Use use(storage_, "inspect");
  Tiers& tiers = *storage_.tiers_;
  const uint64_t mixed = mix_key(key);
  RowInfo info{.key = key};
  info.floats.resize(shape_.num_floats());
  {
    const std::lock_guard lock(tiers.structure());
    HotTier& hot = tiers.hot();
    const Slot slot = hot.find(hot.shard(hot.shard_of(mixed)), spec().table_id, mixed);
    if (slot != kNoSlot) {
      const HotRow* row = hot.row(slot);
      if (!row->is_row()) return std::nullopt;
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
  tiers.read_through(shape_, batch, {0}, [&](uint32_t, const Tiers::Seen& seen) {
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
  storage_.prefetch(*this, {keys.begin(), keys.end()});
}

std::unique_ptr<Scan> Table::scan() {
  const Storage::Use use(storage_, "scan");
  auto scan = std::make_unique<Scan>();
  scan->storage_ = &storage_;
  scan->shape_ = &shape_;
  Storage::CutInfo info;
  scan->snapshot_ = storage_.snapshot(info);
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
  if (record.dimension != spec().dimension || record.optimizer_id != optimizer().id() ||
      record.kernel_version != optimizer().kernel_version())
    throw CorruptionError("[open] " + source + " at offset " + std::to_string(offset) + " has an update of " +
                          spec().label() + " that does not fit the group (dimension, optimizer or its version)");
  Tiers& tiers = *storage_.tiers_;
  const Batch batch(record.keys, std::nullopt);
  const std::vector<uint32_t> rows = all_rows(batch);
  std::vector<float> sums(record.gradients.size() / sizeof(float));
  std::memcpy(sums.data(), record.gradients.data(), record.gradients.size());
  if (batch.num_rows() != record.keys.size())
    throw CorruptionError("[open] " + source + " at offset " + std::to_string(offset) + " repeats a key");
  for_each_chunk(rows, tiers.chunk_rows(shape_), [&](std::span<const uint32_t> chunk) {
    Tiers::Prepared prepared = tiers.prepare(shape_, batch, chunk, true);
    tiers.create_rows(shape_, batch, prepared, sequence, record.time);
    tiers.apply(shape_, batch, chunk, prepared, optimizer(), record.numbers, sums.data(), sequence, record.group_step,
                record.time);
  });
  rows_ += record.num_new;
  step_ = record.group_step;
}

void Table::redo_insert(uint64_t sequence, const KeysRecord& record) {
  Tiers& tiers = *storage_.tiers_;
  const Batch batch(record.keys, std::nullopt);
  for_each_chunk(all_rows(batch), tiers.chunk_rows(shape_), [&](std::span<const uint32_t> chunk) {
    const Tiers::Prepared prepared = tiers.prepare(shape_, batch, chunk, true);
    tiers.create_rows(shape_, batch, prepared, sequence, record.time);
  });
  rows_ += record.keys.size();
}

void Table::redo_erase(uint64_t sequence, const KeysRecord& record) {
  Tiers& tiers = *storage_.tiers_;
  const Batch batch(record.keys, std::nullopt);
  for_each_chunk(all_rows(batch), tiers.chunk_rows(shape_), [&](std::span<const uint32_t> chunk) {
    const Tiers::Prepared prepared = tiers.prepare(shape_, batch, chunk, false);
    tiers.erase(chunk, prepared, sequence);
  });
  rows_ -= record.keys.size();
}

}  // namespace damo
