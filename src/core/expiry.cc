// SPDX-License-Identifier: Apache-2.0
//
// What goes away by itself or as a whole: the clock, lifetimes and what expired by them, dropped groups, and the oldest
// and rarest rows when the directory may not grow any more.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <ctime>
#include <memory>
#include <stdexcept>
#include <unordered_map>

#include "error.h"
#include "planted.h"
#include "storage.h"

namespace damo {
namespace {

constexpr size_t kEraseBatch = 8192;  // keys of one erase record

// Of the limit on disk less the memory, whose changed rows go to disk as well when room is made: above kFull rows are
// forgotten until those left need no more than kKeep. Compaction writes what stays before it deletes the files it is
// in.
constexpr double kFull = 0.5, kKeep = 0.3;
// In mode commit the files of the last commit stay beside all that, until the next one. So the limit, less the memory
// twice, holds three times kFullInCommit: the recovery point, the rows of now, and what a compaction makes of them.
// Each of the three may be larger by the rows that a cut has just written and by what is written unseen.
constexpr double kFullInCommit = 0.27, kKeepInCommit = 0.16, kReserveInCommit = 0.1;
// Of the limit: what operations may write between two looks at the directory.
constexpr double kUnseen = 0.04;
constexpr std::chrono::milliseconds kLookAtDisk{20};

}  // namespace

// ------------------------------------------------------------------- clock

int64_t Storage::wanted_now() const {
  const int64_t given = given_now_.load();
  return given != kBeforeAllTime ? given : static_cast<int64_t>(std::time(nullptr));
}

int64_t Storage::read_clock() const {
  const int64_t clock = clock_.load(), wanted = wanted_now();
  return is_too_far(clock, wanted) ? clock : std::max(clock, wanted);
}

int64_t Storage::settled_clock() const { return given_now_.load() == kBeforeAllTime ? clock_.load() : read_clock(); }

bool Storage::is_too_far(int64_t from, int64_t to) const noexcept {
  // Before the first operation nothing can expire, and every time is as good.
  return from != 0 && ages_by_time_.load() && to - from > kMaxClockStep;
}

int64_t Storage::clock_held_seconds() const { return std::max<int64_t>(0, wanted_now() - read_clock()); }

int64_t Storage::now() const {
  const Use use(*this, "now");
  return read_clock();
}

void Storage::set_now(int64_t now) {
  const Use use(*this, "now");
  const std::lock_guard order(order_);
  const int64_t clock = clock_.load();
  if (options_.read_only) {
    // The reader's own clock, for its own view: no row is lost by it, so it needs no confirmation.
    given_now_ = std::max({now, clock, given_now_.load()});
    clock_ = given_now_.load();
    return;
  }
  if (is_too_far(clock, now))
    throw std::invalid_argument(
        "[now] " + std::to_string(now) + " is " + std::to_string((now - clock) / 86'400) +
        " days after the last operation (" + std::to_string(clock) +
        "): rows would expire at once. Confirm such a step with expire(now=" + std::to_string(now) + ")");
  given_now_ = std::max({now, clock, given_now_.load()});
}

uint64_t Storage::expire(std::optional<int64_t> now) {
  const Use use(*this, "expire");
  check_may_change("expire", "set now, which is the reader's own clock, or ");
  uint64_t sequence = 0, expired = 0;
  {
    const std::unique_lock order = begin_operation();
    const auto living = [this] {
      uint64_t rows = 0;
      for (const auto& table : tables_)
        if (table) rows += table->rows_at(clock_);
      return rows;
    };
    const uint64_t before = living();
    // A time that is given counts as for set_now(): the wall clock is not asked.
    const ExpireRecord record{now ? std::max({*now, clock_.load(), given_now_.load()})
                                  : std::max(read_clock(), wanted_now())};
    const std::string body = encode_expire(record);
    const std::array<Bytes, 1> parts{std::as_bytes(std::span(body))};
    sequence = append(RecordType::kExpire, parts);
    if (now) given_now_ = record.time;
    clock_ = record.time;
    expired = before - living();
  }
  after_operation(sequence);
  return expired;
}

// --------------------------------------------------------------- lifetimes

Expiry Storage::CutInfo::expiry(const TableSpec& spec) const {
  for (const TableCounters& table : counters.tables)
    if (table.table_id == spec.table_id) return spec.lifetime.at(now, table.group_step);
  return {};
}

void Storage::note_lifetimes() {
  ages_by_time_ = std::any_of(tables_.begin(), tables_.end(), [](const auto& table) {
    return table && table->spec().lifetime.unit == AgeUnit::kSeconds;
  });
}

void Storage::settle_lifetimes() {
  note_lifetimes();
  const Lifetime usual = options_.lifetime.value_or(manifest_.lifetime);
  for (const auto& table : tables_) {
    if (!table) continue;
    const TableSpec& spec = table->spec();
    const Lifetime wanted = spec.own_lifetime ? spec.lifetime : usual;
    // Unknown counts: the log's end is of another lifetime than the manifest's, after a kill amid such a change.
    if (wanted != spec.lifetime || table->counters().lifetime != spec.lifetime)
      change_lifetime(*table, wanted, spec.own_lifetime);
  }
  if (usual == manifest_.lifetime) return;
  manifest_.lifetime = usual;
  save_manifest();
}

// Nobody changes rows of the table meanwhile: it is not open yet, or its only owner waits for this, and the disk keeper
// is told. Reads the whole table once, to count its rows by the new ages. What had expired is erased, or it would be
// back under a longer life.
void Storage::change_lifetime(Table& table, const Lifetime& lifetime, bool own) {
  const TableSpec& spec = table.spec();
  AgeCounts counts;
  const Table::CountedAnew here(table, order_);
  if (lifetime != spec.lifetime || table.counters().lifetime != spec.lifetime) {
    CutInfo info;
    const std::shared_ptr<const StoreSnapshot> rows = snapshot(info);
    info.now = settled_clock();
    const Expiry before = info.expiry(spec);
    const Expiry after = lifetime.at(info.now, table.step());
    const auto row = rows->scan(StoredKey::make(spec.table_id, 0), StoredKey::make(spec.table_id + 1, 0));
    std::vector<uint64_t> expired;
    while (row->next()) {
      const StoredKey key = row->key();
      const RowHeader header = decode_row(key, row->value(), table.shape().num_floats()).header;
      if (before.alive(header.time, header.step)) {
        counts.add(lifetime.bucket(after.mark(header.time, header.step)), 1);
        continue;
      }
      expired.push_back(unmix_key(key.mixed()));
      if (expired.size() < kEraseBatch) continue;
      table.purge(expired);
      expired.clear();
    }
    if (!expired.empty() && !planted("last expired rows not purged")) table.purge(expired);
  } else {
    counts = table.counters().rows;
  }
  if (logs_) log_->sync();  // or a longer life could be there without what had expired before being gone
  {
    const std::lock_guard order(order_);
    Manifest wanted = manifest_;
    for (TableSpec& stored : wanted.tables) {
      if (stored.table_id != spec.table_id) continue;
      stored.lifetime = lifetime;
      stored.own_lifetime = own;
    }
    save_manifest(std::move(wanted));
    table.adopt(lifetime, own, std::move(counts));
    note_lifetimes();
  }
  // The log's older records count by the old ages: from here on it starts with the new ones.
  cut_log();
}

// -------------------------------------------------------------- what is gone

void Storage::let_expire(const StorageCounters& log_start) {
  struct Gone {
    std::unordered_map<uint32_t, Expiry> tables;
    uint32_t next_table_id = 0;
  };
  auto gone = std::make_shared<Gone>();
  {
    const std::lock_guard structure(tiers_->structure());
    gone->next_table_id = next_table_id_.load();
    for (const auto& [table_id, table] : tables_by_id_) gone->tables[table_id] = {};
  }
  // Redo of an operation at that time or later finds these rows expired, whether they are still there or not.
  for (const TableCounters& table : log_start.tables) {
    const auto known = gone->tables.find(table.table_id);
    if (known != gone->tables.end() && table.lifetime != kUnknownLifetime)
      known->second = table.lifetime.at(log_start.clock, table.group_step);
  }
  store_->set_disposable([gone = std::move(gone)](const StoredKey& key, Bytes value) {
    const auto known = gone->tables.find(key.table_id());
    if (known == gone->tables.end()) return key.table_id() < gone->next_table_id;  // dropped
    if (known->second.unit == AgeUnit::kNone) return false;
    const std::optional<RowHeader> header = peek_row(key, value);
    return header && !known->second.alive(header->time, header->step);
  });
}

void Storage::compact() {
  const Use use(*this, "compact");
  check_may_change("compact");
  {
    // What has expired by now may be left out, and not only what had by the last operation: so this is one.
    const std::unique_lock order = begin_operation();
    const ExpireRecord record{read_clock()};
    const std::string body = encode_expire(record);
    const std::array<Bytes, 1> parts{std::as_bytes(std::span(body))};
    append(RecordType::kExpire, parts);
    clock_ = record.time;
  }
  cut_log();
  store_->compact(nullptr);
}

// ------------------------------------------------------------ limit on disk

uint64_t Storage::bytes_on_disk() const { return store_->stats().disk_bytes + log_->bytes(); }

namespace {

// How dispensable a row is: the longer ago and the less often it was updated, the more. By operations rather than by
// the clock, which may stand still.
uint64_t score_of(const RowHeader& header, uint64_t sequence) {
  return (sequence - std::min(sequence, header.sequence)) / (uint64_t{1} + header.update_count);
}

// Scores by magnitude, each power of two in 16 parts.
constexpr size_t kScoreClasses = 64 * 16;
size_t class_of(uint64_t score) {
  if (score < 16) return static_cast<size_t>(score);
  const auto power = static_cast<size_t>(std::bit_width(score)) - 1;
  return power * 16 + static_cast<size_t>(score >> (power - 4) & 15);
}

}  // namespace

void Storage::keep_within_disk() {
  CutInfo info;
  std::shared_ptr<const StoreSnapshot> rows = snapshot(info);
  info.now = settled_clock();
  const auto each = [&](const auto& visit) {
    for (const TableSpec& spec : info.manifest.tables) {
      const Expiry expiry = info.expiry(spec);
      const size_t num_floats = TableShape(spec).num_floats();
      const auto row = rows->scan(StoredKey::make(spec.table_id, 0), StoredKey::make(spec.table_id + 1, 0));
      while (row->next()) {
        if (stopping_) throw ClosedError("[disk] the storage is being closed");
        const RowHeader header = decode_row(row->key(), row->value(), num_floats).header;
        if (!expiry.alive(header.time, header.step)) continue;
        visit(spec, row->key(), score_of(header, info.counters.sequence), StoredKey::kBytes + row->value().size());
      }
    }
  };
  std::vector<uint64_t> bytes(kScoreClasses, 0);
  uint64_t total = 0;
  each([&](const TableSpec&, const StoredKey&, uint64_t score, uint64_t size) {
    bytes[class_of(score)] += size;
    total += size;
  });
  const uint64_t keep = share_of_disk(kept_share());
  uint64_t forget = total > keep ? total - keep : 0;
  if (forget > 0) {
    // The classes above `last` go whole, of `last` as much as is needed.
    size_t last = kScoreClasses - 1;
    while (last > 0 && bytes[last] <= forget) forget -= bytes[last--];
    std::unordered_map<uint32_t, std::vector<uint64_t>> keys;
    const auto erase = [&](uint32_t table_id, std::vector<uint64_t>& batch) {
      Table* table = nullptr;
      {
        const std::lock_guard structure(tiers_->structure());
        table = table_by_id(table_id);
      }
      if (table != nullptr) forgotten_ += table->erase_unless_newer(batch, info.counters.sequence);
      batch.clear();
    };
    each([&](const TableSpec& spec, const StoredKey& key, uint64_t score, uint64_t size) {
      const size_t at = class_of(score);
      if (at < last || (at == last && forget == 0)) return;
      if (at == last) forget -= std::min(forget, size);
      std::vector<uint64_t>& batch = keys[spec.table_id];
      batch.push_back(unmix_key(key.mixed()));
      if (batch.size() == kEraseBatch) erase(spec.table_id, batch);
    });
    for (auto& [table_id, batch] : keys)
      if (!batch.empty()) erase(table_id, batch);
    cut_log();
  }
  rows.reset();  // or the compaction would keep what it shows
  store_->compact(&stopping_);
}

uint64_t Storage::share_of_disk(double share) const {
  const uint64_t memory = options_.memory_bytes * (logs_ ? 1 : 2);
  return static_cast<uint64_t>(share * static_cast<double>(options_.disk_bytes - memory));
}

double Storage::kept_share() const { return logs_ ? kKeep : kKeepInCommit; }

double Storage::full_share() const {
  if (logs_) return kFull;
  // A recovery point may be larger that was made by another mode, or under another limit. The next commit lets it go.
  const double held = static_cast<double>(point_bytes_.load()) / static_cast<double>(share_of_disk(1));
  return std::clamp((1 - held - kReserveInCommit) / 2, kKeepInCommit + 0.04, kFullInCommit);
}

bool Storage::waits_for_disk() const {
  return keeps_disk_ && std::this_thread::get_id() != disk_keeper_.get_id() &&
         static_cast<double>(tiers_->bytes_written() - written_before_) >
             kUnseen * static_cast<double>(options_.disk_bytes);
}

void Storage::disk_loop() {
  std::unique_lock lock(background_mutex_);
  while (!background_wake_.wait_for(lock, kLookAtDisk, [this] { return stop_; })) {
    lock.unlock();
    try {
      const uint64_t written = tiers_->bytes_written();
      const bool full = bytes_on_disk() > share_of_disk(full_share());
      if (written_before_.exchange(written) != written) log_shrunk_.notify_all();
      if (full) keep_within_disk();
    } catch (const ClosedError&) {
    } catch (const DiskFullError&) {  // at the next look there may be space
    } catch (...) {
      tiers_->fail(with_way_out(std::current_exception()));
      break;
    }
    lock.lock();
  }
  keeps_disk_ = false;
  log_shrunk_.notify_all();
}

}  // namespace damo
