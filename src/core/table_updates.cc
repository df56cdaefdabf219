// SPDX-License-Identifier: Apache-2.0
//
// What callers change in the rows of a table: apply_gradients, erase, import_rows. Rows are brought into memory, the
// change is logged, then it is made.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "error.h"
#include "gradient_sums.h"
#include "planted.h"
#include "storage.h"
#include "table.h"
#include "table_operations.h"

namespace damo {

// --------------------------------------------------------- apply_gradients

// What one table of a call learns.
struct Table::Step {
  Step(Table* of, const Sums* with, std::optional<double> rate) : table(of), sums(with), lr(rate) {}
  Table* table;
  const Sums* sums;
  std::optional<double> lr;
  std::vector<uint64_t> keys{};  // of the batch's rows
  ApplyRecord record{};
  std::shared_ptr<Admission> filter{};  // a key that it has not let in has nothing to learn with
  // What is logged where some keys are left out.
  std::vector<uint64_t> some_keys{};
  std::vector<float> some_sums{};

  // The body of its record, for these rows.
  void encode(const AgeEffect& effect, std::span<const uint32_t> rows, std::string& prefix, std::vector<Bytes>& parts) {
    const size_t dimension = record.dimension;
    record.ages = effect;
    record.keys = keys;
    std::span logged(sums->gradients.get(), keys.size() * dimension);
    if (rows.size() != keys.size()) {
      some_sums.resize(rows.size() * dimension);
      float* to = some_sums.data();
      for (const uint32_t r : rows) {
        some_keys.push_back(keys[r]);
        to = std::copy_n(logged.data() + r * dimension, dimension, to);
      }
      record.keys = some_keys;
      logged = some_sums;
    }
    prefix = encode_apply_prefix(record);
    parts.insert(parts.end(), {std::as_bytes(std::span(prefix)), std::as_bytes(record.keys), std::as_bytes(logged)});
  }
};

void Table::apply_gradients(std::span<const uint64_t> keys, const float* gradients, std::optional<double> lr) {
  check_positions("apply_gradients", keys.size());
  std::shared_ptr<Batch> batch;
  {
    const std::lock_guard lock(last_mutex_);
    if (last_.batch && std::ranges::equal(last_.keys, keys)) batch = last_.batch;
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
  storage.check_may_change("apply_gradients");
  std::vector<Sums> sums;
  for (const Update& update : updates) {
    const Table& table = *update.table;
    table.check_exists("apply_gradients");
    if (&table.storage_ != &storage)
      throw std::invalid_argument("[apply_gradients] " + table.spec().label() + " is of another storage than " +
                                  updates[0].table->spec().label() + ": make one call for each storage");
    if (update.lr) check_lr("apply_gradients", *update.lr);
    sums.push_back(table.sum(update.parts));
    const Batch& batch = *sums.back().batch;
    const float* gradients = sums.back().gradients.get();
    if (planted("NaN is taken")) continue;
    if (const auto bad = first_not_finite(gradients, batch.num_rows(), table.spec().dimension, *table.storage_.pool_))
      throw std::invalid_argument("[apply_gradients] the gradient of key " +
                                  std::to_string(unmix_key(batch.mixed[*bad])) + " of " + table.spec().label() +
                                  " is NaN or infinite: nothing was applied. Look at the loss, or clip the gradients");
  }
  // An empty batch is no step, and its schedule is not asked.
  std::vector<Step> steps;
  for (size_t u = 0; u < updates.size(); ++u) {
    const Batch& batch = *sums[u].batch;
    if (batch.num_rows() == 0) continue;
    for (const Step& other : steps)
      if (other.table == updates[u].table)
        throw std::invalid_argument("[apply_gradients] " + other.table->spec().label() +
                                    " stands twice in one call, expected each group once: give its parts together");
    Step& step = steps.emplace_back(updates[u].table, &sums[u], updates[u].lr);
    step.keys.resize(batch.num_rows());
    std::transform(batch.mixed.begin(), batch.mixed.end(), step.keys.begin(), unmix_key);
  }
  if (steps.empty()) return;
  uint64_t sequence = 0;
  {
    const std::unique_lock order = storage.begin_operation();
    {
      // All of them before any table changes.
      const Storage::AskingForRates asking;
      for (Step& step : steps) {
        step.table->check_exists("apply_gradients");
        if (!step.lr) step.lr = step.table->rate_at("apply_gradients", step.table->step_);
      }
    }
    if (planted("groups of one call one after the other"))
      for (Step& step : steps) sequence = apply(storage, {&step, 1});
    else
      sequence = apply(storage, steps);
  }
  storage.after_operation(sequence);
}

Table::Sums Table::sum(std::span<const Part> parts) const {
  std::vector<const float*> gradients;
  std::vector<size_t> positions;
  std::vector<const Batch*> batches;
  size_t total = 0;
  for (const Part& part : parts) {
    if (part.batch->table != 0 && part.batch->table != serial_)
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
  batch->table = serial_;
  batch->index.resize(batch->num_rows());
  std::iota(batch->index.begin(), batch->index.end(), 0u);
  batch->first = batch->index;
  return {std::move(batch), std::move(sums.gradients)};
}
// ---------------------------------------------- logged, then made

struct Table::Change {
  Table& table;
  const Batch& batch;
  std::vector<uint32_t> rows;
  Expiry expiry;
  std::optional<int64_t> renewed;  // the age mark the rows get; none when they go
  bool create = true;              // rows that exist nowhere are made; else they are left out of `rows`
  std::function<void(std::span<const uint32_t> rows, const Tiers::Prepared&)> change;
  AgeEffect effect{};  // for the record

  // Brings all the rows into memory; nothing where it does not hold them at once.
  static std::optional<std::vector<Tiers::Prepared>> prepare(Tiers& tiers, std::span<const Change> changes) {
    std::vector<Tiers::Request> requests;
    for (const Change& c : changes) {
      if (c.rows.size() > tiers.chunk_rows(c.table.shape_)) return std::nullopt;
      requests.push_back({c.table.shape_, c.expiry, c.batch, c.rows, c.create});
    }
    if (requests.size() > 1) return tiers.prepare_together(requests);
    const Change& only = changes.front();
    std::vector<Tiers::Prepared> prepared(1);
    prepared[0] = tiers.prepare(only.table.shape_, only.expiry, only.batch, only.rows, only.create);
    return prepared;
  }
};

// Brings the rows into memory, logs, then changes them. More rows than memory holds at once are logged first and
// changed part by part: should a part fail, the storage latches, and redo completes the operation at the next open. The
// order lock is held. `log` writes the one record of all the changes.
void Table::operate(std::span<Change> changes, const std::function<void()>& log) {
  for (const Change& c : changes) c.table.check_exists("change rows");  // the order lock is held: it stays
  Tiers& tiers = *changes.front().table.storage_.tiers_;
  if (std::optional<std::vector<Tiers::Prepared>> prepared = Change::prepare(tiers, changes)) {
    try {
      for (size_t i = 0; i < changes.size(); ++i) {
        Change& c = changes[i];
        const Tiers::Prepared& at = (*prepared)[i];
        if (!c.create) std::erase_if(c.rows, [&](uint32_t r) { return at.slots[r] == kNoSlot; });
        std::vector<int64_t> marks(c.batch.num_rows(), 0);
        if (c.expiry.unit != AgeUnit::kNone)
          for (const uint32_t r : c.rows) {
            const HotRow* row = tiers.hot().row(at.slots[r]);
            marks[r] = c.expiry.mark(row->time, row->step);
          }
        for (const uint32_t r : at.fresh) marks[r] = kAbsent;
        c.effect = c.table.effect_on(c.rows, marks, c.expiry, c.renewed);
      }
      log();
    } catch (...) {
      tiers.abandon(*prepared);
      throw;
    }
    after_log(tiers, [&] {
      for (size_t i = 0; i < changes.size(); ++i) {
        changes[i].table.count(changes[i].effect);
        changes[i].change(changes[i].rows, (*prepared)[i]);
      }
    });
    return;
  }
  for (Change& c : changes) {
    std::vector<int64_t> marks;
    for (const Found& row : c.table.survey(c.batch, c.expiry)) marks.push_back(row.mark);
    if (!c.create) std::erase_if(c.rows, [&](uint32_t r) { return marks[r] == kAbsent; });
    c.effect = c.table.effect_on(c.rows, marks, c.expiry, c.renewed);
  }
  log();
  after_log(tiers, [&] {
    for (Change& c : changes) {
      c.table.count(c.effect);
      for_each_chunk(c.rows, tiers.chunk_rows(c.table.shape_), [&](std::span<const uint32_t> part) {
        const Tiers::Prepared prepared = tiers.prepare(c.table.shape_, c.expiry, c.batch, part, c.create);
        after_log(tiers, [&] { c.change(part, prepared); });
      });
    }
  });
}

uint64_t Table::apply(Storage& storage, std::span<Step> steps) {
  Tiers& tiers = *storage.tiers_;
  const int64_t time = storage.read_clock();
  uint64_t sequence = 0;
  std::vector<Change> changes;
  for (Step& step : steps) {
    Table& table = *step.table;
    const Optimizer& optimizer = table.optimizer();
    const Batch& batch = *step.sums->batch;
    step.record.table_id = table.spec().table_id;
    step.record.optimizer_id = optimizer.id();
    step.record.kernel_version = optimizer.kernel_version();
    step.record.dimension = table.spec().dimension;
    step.record.group_step = table.step_ + 1;
    step.record.time = time;
    step.record.numbers = optimizer.numbers(*step.lr, step.record.group_step);
    step.filter = table.admission();
    changes.push_back({.table = table,
                       .batch = batch,
                       .rows = all_rows(batch),
                       .expiry = table.expiry_at(time),
                       .renewed = table.mark(time, step.record.group_step),
                       .create = step.filter == nullptr,
                       .change = [&](std::span<const uint32_t> part, const Tiers::Prepared& prepared) {
                         const ApplyRecord& record = step.record;
                         tiers.create_rows(table.shape_, batch, prepared, sequence, record.group_step, time);
                         tiers.apply(table.shape_, batch, part, prepared, optimizer, record.numbers,
                                     step.sums->gradients.get(), sequence, record.group_step, time);
                       }});
  }
  operate(changes, [&] {
    std::vector<std::string> prefixes(steps.size());
    std::vector<Bytes> parts;
    if (steps.size() == 1) {
      steps[0].encode(changes[0].effect, changes[0].rows, prefixes[0], parts);
      sequence = storage.append(RecordType::kApply, parts);
    } else {
      const std::string head = encode_together(steps.size());
      std::vector<uint64_t> lengths(steps.size());
      parts.push_back(std::as_bytes(std::span(head)));
      for (size_t i = 0; i < steps.size(); ++i) {
        parts.push_back(std::as_bytes(std::span(&lengths[i], 1)));
        const size_t begin = parts.size();
        steps[i].encode(changes[i].effect, changes[i].rows, prefixes[i], parts);
        for (const Bytes part : std::span(parts).subspan(begin)) lengths[i] += part.size();
      }
      sequence = storage.append(RecordType::kApplyTogether, parts);
    }
    storage.clock_ = time;
    for (size_t i = 0; i < steps.size(); ++i) {
      steps[i].table->step_ = steps[i].record.group_step;
      if (steps[i].filter) steps[i].filter->ignored += steps[i].keys.size() - changes[i].rows.size();
    }
  });
  return sequence;
}
// ----------------------------------------------- erase, import_rows

uint64_t Table::erase(std::span<const uint64_t> keys) {
  check_positions("erase", keys.size());
  const Storage::Use use(storage_, "erase");
  storage_.check_may_change("erase");
  check_exists("erase");
  return erase(keys, Erased::kLiving, ~uint64_t{0});
}

void Table::purge(std::span<const uint64_t> keys) { erase(keys, Erased::kAll, ~uint64_t{0}); }

uint64_t Table::erase_unless_newer(std::span<const uint64_t> keys, uint64_t sequence) {
  return erase(keys, Erased::kForgotten, sequence);
}

uint64_t Table::erase(std::span<const uint64_t> keys, Erased what, uint64_t newest) {
  Tiers& tiers = *storage_.tiers_;
  const Batch batch(keys, std::nullopt);
  uint64_t sequence = 0, gone = 0;
  {
    const std::unique_lock order = storage_.begin_operation();
    // Whoever forgets rows did not ask before, and comes again.
    if (what == Erased::kForgotten && (dropped_ || counted_anew_)) return 0;
    const int64_t time = what == Erased::kLiving ? storage_.read_clock() : storage_.settled_clock();
    // With no expiry, rows that have expired are there, too. They are counted no more.
    const Expiry expiry = what == Erased::kAll ? Expiry{} : expiry_at(time);
    const std::vector<Found> found = survey(batch, expiry);
    std::vector<uint32_t> rows;
    std::vector<uint64_t> erased;
    for (uint32_t r = 0; r < batch.num_rows(); ++r) {
      if (found[r].mark == kAbsent || found[r].sequence > newest) continue;
      rows.push_back(r);
      erased.push_back(unmix_key(batch.mixed[r]));
    }
    if (rows.empty()) return 0;
    gone = rows.size();
    Change change{.table = *this,
                  .batch = batch,
                  .rows = std::move(rows),
                  .expiry = expiry,
                  .renewed = std::nullopt,
                  .create = false,
                  .change = [&](std::span<const uint32_t> part, const Tiers::Prepared& prepared) {
                    tiers.erase(part, prepared, sequence);
                  }};
    operate({&change, 1}, [&] {
      if (what == Erased::kAll) change.effect.changes.clear();
      const std::string prefix = encode_keys_prefix({spec().table_id, time, change.effect, erased});
      const std::array<Bytes, 2> parts{std::as_bytes(std::span(prefix)), std::as_bytes(std::span(erased))};
      sequence =
          planted("erase not logged") ? storage_.log_->last_sequence() + 1 : storage_.append(RecordType::kErase, parts);
      storage_.clock_ = time;
    });
  }
  storage_.after_operation(sequence);
  return gone;
}

void Table::import_rows(std::span<const uint64_t> keys, std::span<const uint32_t> update_counts, const float* floats) {
  check_positions("import_rows", keys.size());
  const Storage::Use use(storage_, "import_rows");
  storage_.check_may_change("import_rows");
  check_exists("import_rows");
  Tiers& tiers = *storage_.tiers_;
  const Batch batch(keys, std::nullopt);
  const size_t num_floats = shape_.num_floats();
  if (batch.num_rows() != keys.size())
    for (size_t p = 0; p < keys.size(); ++p)
      if (batch.first[batch.index[p]] != p)
        throw std::invalid_argument("[import_rows] key " + std::to_string(keys[p]) +
                                    " stands twice, expected each key once: nothing was imported");
  if (const auto bad = first_not_finite(floats, keys.size(), num_floats, *storage_.pool_))
    throw std::invalid_argument("[import_rows] the row of key " + std::to_string(keys[*bad]) +
                                " has a NaN or an infinity: nothing was imported");
  if (keys.empty()) return;
  uint64_t sequence = 0;
  {
    const std::unique_lock order = storage_.begin_operation();
    const int64_t time = storage_.read_clock();
    const Bytes counts = std::as_bytes(update_counts);
    const Bytes values = std::as_bytes(std::span(floats, keys.size() * num_floats));
    // Distinct keys: the batch's rows are the positions, in their order.
    Change change{.table = *this,
                  .batch = batch,
                  .rows = all_rows(batch),
                  .expiry = expiry_at(time),
                  .renewed = mark(time, step_),
                  .create = true,
                  .change = [&](std::span<const uint32_t> part, const Tiers::Prepared& prepared) {
                    tiers.create_rows(shape_, batch, prepared, sequence, step_, time);
                    tiers.replace(shape_, batch, part, prepared, counts.data(), values.data(), sequence, step_, time);
                  }};
    operate({&change, 1}, [&] {
      const ImportRecord record{.table_id = spec().table_id,
                                .num_floats = static_cast<uint32_t>(num_floats),
                                .time = time,
                                .ages = change.effect,
                                .keys = keys,
                                .update_counts = counts,
                                .floats = values};
      const std::string prefix = encode_import_prefix(record);
      const std::array<Bytes, 4> parts{std::as_bytes(std::span(prefix)), std::as_bytes(keys), counts, values};
      sequence = storage_.append(RecordType::kImport, parts);
      storage_.clock_ = time;
    });
  }
  storage_.after_operation(sequence);
}

}  // namespace damo
