// SPDX-License-Identifier: Apache-2.0
#include "tiers.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <numeric>

#include "error.h"
#include "planted.h"

namespace damo {
namespace {

constexpr size_t kColdChunk = 16384;  // rows of one read of the cold tier: bounds what is in flight
constexpr auto kLookAgain =
    std::chrono::milliseconds(100);  // a failure is told without the lock: a wake-up may be missed
constexpr int kTogetherRounds = 4;
constexpr size_t kUpdateChunk = 64;  // rows handed to the optimizer at a time: their headers stay in cache
constexpr size_t kCopyChunk = 1024;  // rows encoded at a time under the structure lock: bounds the pause

}  // namespace

Tiers::Tiers(size_t hot_bytes, size_t filter_bytes, size_t num_shards, Store& store, ThreadPool& pool,
             WriteAhead write_ahead, ShapeOf shape_of)
    : hot_(hot_bytes, num_shards),
      all_bytes_(hot_bytes),
      presence_(filter_bytes),
      store_(store),
      pool_(pool),
      write_ahead_(std::move(write_ahead)),
      shape_of_(std::move(shape_of)),
      removed_(std::clamp(std::bit_floor(hot_bytes / 1024), size_t{1} << 12, size_t{1} << 20), 0) {
  evictor_ = start_quiet_thread([this] { evict_loop(); });
}

Tiers::~Tiers() { stop(); }

void Tiers::stop() noexcept {
  {
    const std::lock_guard lock(structure_);
    stop_ = true;
  }
  evict_wake_.notify_all();
  slots_freed_.notify_all();
  cut_progress_.notify_all();
  if (evictor_.joinable()) evictor_.join();
}

void Tiers::fail(std::exception_ptr error) noexcept {
  {
    const std::lock_guard lock(error_mutex_);
    if (!error_) error_ = error;
    failed_.store(true);
  }
  // Perhaps the caller holds the structure lock, so it is not taken here; who waits looks again by itself too.
  slots_freed_.notify_all();
  cut_progress_.notify_all();
}

void Tiers::throw_if_failed() const {
  if (!failed_.load() || planted("failed write forgotten")) return;
  const std::lock_guard lock(error_mutex_);
  std::rethrow_exception(error_);
}

TiersStats Tiers::stats() const {
  TiersStats stats;
  stats.hits = counters_.hits;
  stats.cold_hits = counters_.cold_hits;
  stats.created = counters_.created;
  stats.evicted = counters_.evicted;
  stats.written_back = counters_.written_back;
  stats.write_waits = counters_.write_waits;
  stats.cuts = counters_.cuts;
  stats.cut_rows = counters_.cut_rows;
  stats.cut_displaced = counters_.cut_displaced;
  stats.cut_pause_seconds = counters_.cut_pause_seconds;
  const std::lock_guard lock(structure_);
  stats.hot_rows = hot_.rows();
  stats.hot_bytes_in_use = hot_.bytes_in_use();
  stats.hot_bytes = hot_.bytes();
  return stats;
}

void Tiers::lend(size_t bytes) {
  const std::lock_guard lock(structure_);
  hot_.set_bytes(all_bytes_ - bytes);
}

size_t Tiers::chunk_rows(const TableShape& shape) const noexcept {
  return std::max<size_t>(hot_.capacity(hot_.slot_bytes(shape.num_floats())) / 4, 1);
}

// ------------------------------------------------------------------ lookups

Tiers::HotRead Tiers::read_hot(const TableShape& shape, const Expiry& expiry, Batch& batch, const ShardOrder& order,
                               float* out, bool touch, const std::function<void(uint32_t, const HotRow&)>& visit) {
  const uint32_t table_id = shape.spec.table_id;
  const size_t dimension = shape.spec.dimension, weight_bytes = dimension * sizeof(float);
  const size_t shards = hot_.num_shards();
  const size_t ranges = batch.num_rows() < 2048 ? 1 : std::min(shards, pool_.size() * 2);
  std::vector<HotRead> parts(ranges);
  batch.hints_at = moves();
  pool_.run(ranges, [&](size_t range) {
    constexpr size_t kEntryAhead = 16, kRowAhead = 8;
    for (size_t s = shards * range / ranges; s < shards * (range + 1) / ranges; ++s) {
      const uint32_t* rows = order.order.data() + order.begin[s];
      const size_t count = order.begin[s + 1] - order.begin[s];
      if (count == 0) continue;
      HotTier::Shard& shard = hot_.shard(s);
      const std::lock_guard lock(shard.mutex);
      for (size_t i = 0; i < count + kEntryAhead; ++i) {
        if (i < count) hot_.prefetch_entry(shard, HotTier::fingerprint(table_id, batch.mixed[rows[i]]));
        if (i >= kRowAhead && i - kRowAhead < count) {
          const Slot slot = hot_.guess(shard, HotTier::fingerprint(table_id, batch.mixed[rows[i - kRowAhead]]));
          if (slot != kNoSlot) hot_.prefetch_row(slot, sizeof(HotRow) + weight_bytes);
        }
        if (i < kEntryAhead) continue;
        const uint32_t r = rows[i - kEntryAhead];
        const Slot slot = hot_.find(shard, table_id, batch.mixed[r]);
        batch.hints[r] = kNoSlot;
        if (slot == kNoSlot) {
          parts[range].missing.push_back(r);
          continue;
        }
        HotRow* row = hot_.row(slot);
        if (!row->is_row() || !expiry.alive(row->time, row->step)) {
          parts[range].gone.push_back(r);
          continue;
        }
        if (visit) visit(r, *row);
        batch.hints[r] = slot;
        if (touch) row->touch();
        if (out != nullptr) std::memcpy(out + batch.first[r] * dimension, row->floats(), weight_bytes);
      }
    }
  });
  HotRead read = std::move(parts[0]);
  for (size_t i = 1; i < ranges; ++i) {
    read.missing.insert(read.missing.end(), parts[i].missing.begin(), parts[i].missing.end());
    read.gone.insert(read.gone.end(), parts[i].gone.begin(), parts[i].gone.end());
  }
  if (touch) counters_.hits += batch.num_rows() - read.missing.size() - read.gone.size();
  return read;
}

namespace {

std::vector<StoredKey> sorted_keys(const TableShape& shape, const Batch& batch, std::vector<uint32_t>& rows) {
  std::sort(rows.begin(), rows.end(), [&](uint32_t a, uint32_t b) { return batch.mixed[a] < batch.mixed[b]; });
  std::vector<StoredKey> keys;
  keys.reserve(rows.size());
  for (const uint32_t r : rows) keys.push_back(StoredKey::make(shape.spec.table_id, batch.mixed[r]));
  return keys;
}

}  // namespace

void Tiers::read_cold(std::span<const StoredKey> keys, const Store::Found& found) const {
  if (!presence_.complete()) return store_.multi_get(keys, found);
  std::vector<StoredKey> likely;
  std::vector<size_t> index;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!presence_.may_contain(keys[i])) continue;
    likely.push_back(keys[i]);
    index.push_back(i);
  }
  if (!likely.empty()) store_.multi_get(likely, [&](size_t i, Bytes value) { found(index[i], value); });
}

void Tiers::read_through(const TableShape& shape, const Expiry& expiry, const Batch& batch, std::vector<uint32_t> rows,
                         const std::function<void(uint32_t, const Seen&)>& visit) {
  // A row that comes into memory between the probe and this read is served from the cold tier as it was: it
  // was so at some moment of the call. Only a row changed *and* missing in the cold tier could be wrong, and one that
  // memory does not hold at the probe is in the cold tier, or nowhere.
  std::vector<uint32_t> chunk;
  for (size_t begin = 0; begin < rows.size(); begin += kColdChunk) {
    chunk.assign(rows.begin() + static_cast<ptrdiff_t>(begin),
                 rows.begin() + static_cast<ptrdiff_t>(std::min(rows.size(), begin + kColdChunk)));
    const std::vector<StoredKey> keys = sorted_keys(shape, batch, chunk);
    std::vector<uint8_t> found(chunk.size(), 0);
    read_cold(keys, [&](size_t i, Bytes value) {
      const DecodedRow decoded = decode_row(keys[i], value, shape.num_floats());
      if (!expiry.alive(decoded.header.time, decoded.header.step)) return;
      found[i] = 1;
      visit(chunk[i], {.found = true, .header = decoded.header, .floats = decoded.floats});
    });
    for (size_t i = 0; i < chunk.size(); ++i)
      if (found[i] == 0) visit(chunk[i], {});
  }
}

void Tiers::fill_from(const TableShape& shape, const StoredKey& key, const DecodedRow& decoded, HotRow& row) {
  row.mixed = key.mixed();
  row.table_id = key.table_id();
  row.sequence = planted("sequence number lost on disk") ? 0 : decoded.header.sequence;
  row.time = decoded.header.time;
  row.update_count = decoded.header.update_count;
  row.step = decoded.header.step;
  if (decoded.header.has_floats) {
    std::memcpy(row.floats(), decoded.floats.data(),
                planted("state not read back") ? shape.spec.dimension * sizeof(float) : decoded.floats.size());
  } else {
    shape.first_floats(row.mixed, row.floats());
  }
}

size_t Tiers::low_water(size_t slot_bytes) const noexcept { return hot_.capacity(slot_bytes) / 32; }
size_t Tiers::high_water(size_t slot_bytes) const noexcept { return hot_.capacity(slot_bytes) * 3 / 32 + 1; }

size_t Tiers::allocate(size_t slot_bytes, size_t count, std::vector<Slot>& out) {
  const size_t made = hot_.allocate(slot_bytes, count, out);
  if (hot_.available(slot_bytes) < low_water(slot_bytes) || hot_.over_budget()) {
    size_t& wanted = demand_[slot_bytes];
    wanted = std::max(wanted, high_water(slot_bytes));
    evict_wake_.notify_one();
  }
  return made;
}

void Tiers::wait_for_slots(size_t slot_bytes, size_t count) {
  std::unique_lock lock(structure_);
  // One that began before may have found the disk full that has space by now.
  const uint64_t begun_before = evictions_begun_;
  while (hot_.available(slot_bytes) < count) {
    throw_if_failed();
    if (no_space_in_ > begun_before) std::rethrow_exception(no_space_);
    if (stop_) throw ClosedError("[storage] it was closed while an operation waited for memory");
    size_t& wanted = demand_[slot_bytes];
    wanted = std::max({wanted, count, high_water(slot_bytes)});
    evict_wake_.notify_one();
    slots_freed_.wait_for(lock, kLookAgain);
  }
}

void Tiers::make_room(const TableShape& shape, size_t rows) {
  wait_for_slots(hot_.slot_bytes(shape.num_floats()), rows);
}

void Tiers::add_row(Slot slot, bool has_floats) {
  HotRow* row = hot_.row(slot);
  HotTier::Shard& shard = hot_.shard(hot_.shard_of(row->mixed));
  const std::lock_guard lock(shard.mutex);
  hot_.reserve_entries(shard, 1);
  row->flags = has_floats ? HotRow::kFloats : uint8_t{0};
  hot_.insert(shard, slot);
}

void Tiers::remove_row(Slot slot) {
  const HotRow* row = hot_.row(slot);
  const uint64_t mixed = row->mixed;
  removed_[mixed >> 24 & (removed_.size() - 1)] = epoch_.load(std::memory_order_relaxed);
  {
    HotTier::Shard& shard = hot_.shard(hot_.shard_of(mixed));
    const std::lock_guard lock(shard.mutex);
    hot_.remove(shard, slot);
  }
  note_move();
  hot_.free(slot);
  ++counters_.evicted;
}

Tiers::Absent Tiers::bring_in(const TableShape& shape, const Expiry& expiry, Batch& batch, std::vector<uint32_t> rows,
                              float* out) {
  const size_t dimension = shape.spec.dimension, weight_bytes = dimension * sizeof(float);
  const size_t slot_bytes = hot_.slot_bytes(shape.num_floats());
  const size_t chunk_size = std::clamp<size_t>(chunk_rows(shape) / 2, 1, kColdChunk);
  Absent absent{.rows = {}, .epoch = epoch()};
  std::vector<uint32_t> chunk;
  while (!rows.empty()) {
    const uint64_t read_at = epoch();
    const size_t size = std::min(rows.size(), chunk_size);
    chunk.assign(rows.end() - static_cast<ptrdiff_t>(size), rows.end());
    rows.resize(rows.size() - size);
    const std::vector<StoredKey> keys = sorted_keys(shape, batch, chunk);

    // Slots that are ours alone while we read into them; no more than a quarter of memory over all
    // lookups, so that whoever waits for slots gets them.
    std::vector<Slot> slots;
    {
      const std::lock_guard lock(structure_);
      const size_t quarter = hot_.bytes() / 4;
      const size_t room = quarter > pending_bytes_ ? (quarter - pending_bytes_) / slot_bytes : 0;
      allocate(slot_bytes, std::min(size, room), slots);
      pending_bytes_ += slots.size() * slot_bytes;
    }
    const size_t num_slots = slots.size();
    const auto give_back = [&] {  // structure lock held
      for (const Slot slot : slots)
        if (slot != kNoSlot) hot_.free(slot);
      pending_bytes_ -= num_slots * slot_bytes;
      slots_freed_.notify_all();
    };
    std::vector<Found> found(size, Found::kNowhere);
    try {
      read_cold(keys, [&](size_t i, Bytes value) {
        const DecodedRow decoded = decode_row(keys[i], value, shape.num_floats());
        if (!expiry.alive(decoded.header.time, decoded.header.step)) return;
        found[i] = decoded.header.has_floats ? Found::kFloats : Found::kFirstFloats;
        if (i < num_slots) {
          fill_from(shape, keys[i], decoded, *hot_.row(slots[i]));
        } else if (out != nullptr) {
          float* to = out + batch.first[chunk[i]] * dimension;
          if (decoded.header.has_floats)
            std::memcpy(to, decoded.floats.data(), weight_bytes);
          else
            shape.first_weights(keys[i].mixed(), to);
        }
      });
      const std::lock_guard lock(structure_);
      for (size_t i = 0; i < size; ++i) {
        const uint32_t r = chunk[i];
        const uint64_t mixed = batch.mixed[r];
        HotTier::Shard& shard = hot_.shard(hot_.shard_of(mixed));
        Slot slot = hot_.find(shard, shape.spec.table_id, mixed);
        if (slot == kNoSlot) {
          if (removed_since(mixed, read_at)) {
            rows.push_back(r);  // perhaps changed and evicted after it was read: read again
            continue;
          }
          if (found[i] == Found::kNowhere) {
            absent.rows.push_back(r);
            continue;
          }
          ++counters_.cold_hits;
          if (i >= num_slots) continue;  // served without a slot
          add_row(slots[i], found[i] == Found::kFloats);
          slot = slots[i];
          slots[i] = kNoSlot;
        } else if (const HotRow* row = hot_.row(slot); !row->is_row() || !expiry.alive(row->time, row->step)) {
          absent.rows.push_back(r);
          continue;
        }
        batch.hints[r] = slot;
        if (out != nullptr) std::memcpy(out + batch.first[r] * dimension, hot_.row(slot)->floats(), weight_bytes);
      }
      give_back();
    } catch (...) {
      const std::lock_guard lock(structure_);
      give_back();
      throw;
    }
  }
  return absent;
}

// --------------------------------------------------------------- operations

Tiers::Prepared Tiers::prepare(const TableShape& shape, const Expiry& expiry, const Batch& batch,
                               std::span<const uint32_t> rows, bool create, std::optional<uint64_t> absent_at) {
  const Request request{shape, expiry, batch, rows, create};
  const size_t slot_bytes = hot_.slot_bytes(shape.num_floats());
  Search search{.absent = std::vector<uint64_t>(batch.num_rows(), absent_at ? *absent_at : Search::kUnknown),
                .misses = {},
                .need_slot = {}};
  Prepared prepared;
  prepared.slots.assign(batch.num_rows(), kNoSlot);
  prepared.structure = std::unique_lock(structure_);
  working_slot_bytes_ = slot_bytes;
  working_rows_ = rows.size();
  for (;;) {
    throw_if_failed();
    find_rows(request, search, prepared);
    if (search.misses.empty() && reserve({&request, 1}, {&search, 1}, {&prepared, 1})) return prepared;
    prepared.structure.unlock();
    if (search.misses.empty()) {
      ++counters_.write_waits;
      wait_for_slots(slot_bytes, search.need_slot.size());
    } else {
      read_misses(request, search);
    }
    prepared.structure.lock();
  }
}

std::optional<std::vector<Tiers::Prepared>> Tiers::prepare_together(std::span<const Request> requests) {
  std::vector<Search> searches(requests.size());
  std::vector<Prepared> prepared(requests.size());
  double share = 0;  // of all memory
  for (size_t i = 0; i < requests.size(); ++i) {
    const auto& [shape, expiry, batch, rows, create] = requests[i];
    searches[i].absent.assign(batch.num_rows(), Search::kUnknown);
    prepared[i].slots.assign(batch.num_rows(), kNoSlot);
    share += static_cast<double>(rows.size()) / static_cast<double>(chunk_rows(shape)) / 4;
  }
  std::unique_lock structure(structure_);
  // What a lookup has just left in memory is there at once. Else each table brings its rows in as if it were alone, and
  // room is made for the new rows of all. After some rounds of that they push each other out.
  for (int round = 0;; ++round) {
    throw_if_failed();
    size_t missing = 0;
    std::map<size_t, size_t> new_rows;  // by the size of their slots
    for (size_t i = 0; i < requests.size(); ++i) {
      find_rows(requests[i], searches[i], prepared[i]);
      missing += searches[i].misses.size();
      new_rows[hot_.slot_bytes(requests[i].shape.num_floats())] += searches[i].need_slot.size();
    }
    if (missing == 0 && reserve(requests, searches, prepared)) {
      prepared.front().structure = std::move(structure);
      return prepared;
    }
    if (round == kTogetherRounds || share > (missing == 0 ? 0.25 : 0.75)) return std::nullopt;
    structure.unlock();
    for (size_t i = 0; i < requests.size(); ++i) {
      if (searches[i].misses.empty()) continue;
      note_work(requests[i]);
      read_misses(requests[i], searches[i]);
    }
    if (missing == 0)
      for (const auto& [slot_bytes, count] : new_rows) {
        if (count == 0) continue;
        ++counters_.write_waits;
        wait_for_slots(slot_bytes, count);
      }
    structure.lock();
  }
}

void Tiers::note_work(const Request& request) {
  const std::lock_guard lock(structure_);
  working_slot_bytes_ = hot_.slot_bytes(request.shape.num_floats());
  working_rows_ = request.rows.size();
}

void Tiers::find_rows(const Request& request, Search& search, Prepared& prepared) {
  const Batch& batch = request.batch;
  const Expiry& expiry = request.expiry;
  const std::span<const uint32_t> rows = request.rows;
  const bool create = request.create;
  const uint32_t table_id = request.shape.spec.table_id;
  prepared.fresh.clear();
  search.misses.clear();
  search.need_slot.clear();
  // Where nothing has moved since the lookup and nothing expires, the hints need no look at the rows.
  const bool settled = batch.hints_at == moves() && expiry.unit == AgeUnit::kNone;
  for (size_t i = 0; i < rows.size(); ++i) {
    const uint32_t r = rows[i];
    Slot slot = batch.hints[r];
    if (settled && slot != kNoSlot) {
      prepared.slots[r] = slot;
      continue;
    }
    if (i + 16 < rows.size()) {
      const Slot hint = batch.hints[rows[i + 16]];
      if (hint != kNoSlot) __builtin_prefetch(hot_.row(hint), 1);
    }
    const uint64_t mixed = batch.mixed[r];
    if (!hot_.holds(slot, table_id, mixed)) slot = hot_.find(hot_.shard(hot_.shard_of(mixed)), table_id, mixed);
    prepared.slots[r] = slot;
    if (slot != kNoSlot) {
      if (const HotRow* row = hot_.row(slot); row->is_row() && expiry.alive(row->time, row->step)) continue;
      if (create)
        prepared.fresh.push_back(r);
      else
        prepared.slots[r] = kNoSlot;
    } else if ((search.absent[r] == Search::kUnknown || removed_since(mixed, search.absent[r])) &&
               (create || may_be_cold(StoredKey::make(table_id, mixed)))) {
      search.misses.push_back(r);
    } else if (create) {
      search.need_slot.push_back(r);
    }
  }
}

bool Tiers::reserve(std::span<const Request> requests, std::span<const Search> searches, std::span<Prepared> prepared) {
  struct Slots {
    size_t needed = 0, used = 0;
    std::vector<Slot> all{};
  };
  std::map<size_t, Slots> by_size;  // several tables may have rows of the same
  size_t needed = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    needed += searches[i].need_slot.size();
    by_size[hot_.slot_bytes(requests[i].shape.num_floats())].needed += searches[i].need_slot.size();
    prepared[i].fresh.reserve(prepared[i].fresh.size() + searches[i].need_slot.size());
  }
  const auto give_back = [&] {
    for (const auto& [slot_bytes, slots] : by_size)
      for (const Slot slot : slots.all) hot_.free(slot);
  };
  try {
    // Of none, too: so the evictor hears when memory is short.
    for (auto& [slot_bytes, slots] : by_size)
      if (allocate(slot_bytes, slots.needed, slots.all) < slots.needed) {
        give_back();
        return false;
      }
    if (needed == 0) return true;
    std::vector<uint32_t> per_shard(hot_.num_shards(), 0);
    for (size_t i = 0; i < requests.size(); ++i)
      for (const uint32_t r : searches[i].need_slot) ++per_shard[hot_.shard_of(requests[i].batch.mixed[r])];
    for (size_t s = 0; s < per_shard.size(); ++s) {
      if (per_shard[s] == 0) continue;
      const std::lock_guard lock(hot_.shard(s).mutex);
      hot_.reserve_entries(hot_.shard(s), per_shard[s]);
    }
  } catch (...) {
    give_back();
    throw;
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    if (searches[i].need_slot.empty()) continue;
    Slots& slots = by_size[hot_.slot_bytes(requests[i].shape.num_floats())];
    for (const uint32_t r : searches[i].need_slot) {
      const Slot slot = slots.all[slots.used++];
      prepared[i].slots[r] = slot;
      HotRow* row = hot_.row(slot);
      row->mixed = requests[i].batch.mixed[r];
      row->table_id = requests[i].shape.spec.table_id;
      prepared[i].fresh.push_back(r);
    }
  }
  return true;
}

void Tiers::read_misses(const Request& request, Search& search) {
  const TableShape& shape = request.shape;
  const Expiry& expiry = request.expiry;
  const Batch& batch = request.batch;
  const uint32_t table_id = shape.spec.table_id;
  const size_t slot_bytes = hot_.slot_bytes(shape.num_floats());
  const uint64_t epoch = this->epoch();
  std::vector<uint32_t>& misses = search.misses;
  std::sort(misses.begin(), misses.end(), [&](uint32_t a, uint32_t b) { return batch.mixed[a] < batch.mixed[b]; });
  for (size_t begin = 0; begin < misses.size(); begin += kColdChunk) {
    const size_t size = std::min(kColdChunk, misses.size() - begin);
    std::vector<StoredKey> keys;
    for (size_t i = 0; i < size; ++i) keys.push_back(StoredKey::make(table_id, batch.mixed[misses[begin + i]]));
    HeldSlots held{*this, {}};
    std::vector<Slot>& slots = held.slots;
    while (slots.size() < size) {
      {
        const std::lock_guard lock(structure_);
        allocate(slot_bytes, size - slots.size(), slots);
      }
      if (slots.size() < size) {
        ++counters_.write_waits;
        wait_for_slots(slot_bytes, size - slots.size());
      }
    }
    std::vector<Found> found(size, Found::kNowhere);
    read_cold(keys, [&](size_t i, Bytes value) {
      const DecodedRow decoded = decode_row(keys[i], value, shape.num_floats());
      if (!expiry.alive(decoded.header.time, decoded.header.step)) return;
      fill_from(shape, keys[i], decoded, *hot_.row(slots[i]));
      found[i] = decoded.header.has_floats ? Found::kFloats : Found::kFirstFloats;
    });
    {
      const std::lock_guard lock(structure_);
      for (size_t i = 0; i < size; ++i) {
        const uint32_t r = misses[begin + i];
        const uint64_t mixed = batch.mixed[r];
        const bool came_in = hot_.find(hot_.shard(hot_.shard_of(mixed)), table_id, mixed) != kNoSlot;
        if (came_in || removed_since(mixed, epoch)) continue;  // looked for again
        if (found[i] == Found::kNowhere) {
          search.absent[r] = epoch;
          continue;
        }
        // Not to leave again before it is used: the hand has to pass three times.
        hot_.row(slots[i])->referenced.store(HotRow::kMaxReferenced, std::memory_order_relaxed);
        add_row(slots[i], found[i] == Found::kFloats);
        slots[i] = kNoSlot;  // the row's now
        ++counters_.cold_hits;
      }
    }
  }
}

Tiers::HeldSlots::~HeldSlots() {
  {
    const std::lock_guard lock(tiers.structure_);
    for (const Slot slot : slots)
      if (slot != kNoSlot) tiers.hot_.free(slot);
  }
  tiers.slots_freed_.notify_all();
}

void Tiers::abandon(std::span<Prepared> prepared) noexcept {
  for (Prepared& some : prepared) {
    for (const uint32_t r : some.fresh)
      if (hot_.row(some.slots[r])->has(HotRow::kPending)) hot_.free(some.slots[r]);
    some.fresh.clear();
  }
  prepared.front().structure.unlock();
}

void Tiers::create_rows(const TableShape& shape, const Batch& batch, const Prepared& prepared, uint64_t sequence,
                        uint64_t group_step, int64_t time) {
  DisplacedRows displaced;
  for (const uint32_t r : prepared.fresh) {
    const Slot slot = prepared.slots[r];
    HotRow* row = hot_.row(slot);
    if (!row->has(HotRow::kPending) && row->sequence >= sequence) continue;  // redo of what is there already
    HotTier::Shard& shard = hot_.shard(hot_.shard_of(batch.mixed[r]));
    const std::lock_guard lock(shard.mutex);
    if (needs_displacing(*row) && !row->has(HotRow::kPending)) displace(*row, displaced);
    const bool pending = row->has(HotRow::kPending);
    row->sequence = sequence;
    row->time = time;
    row->update_count = 0;
    row->step = static_cast<uint32_t>(group_step);
    row->flags = static_cast<uint8_t>((row->flags & HotRow::kSaved) | HotRow::kDirty);
    if (pending || !planted("erased row comes back")) shape.first_floats(row->mixed, row->floats());
    if (pending) hot_.insert(shard, slot);
  }
  counters_.created += prepared.fresh.size();
  keep_displaced(std::move(displaced));
}

void Tiers::apply(const TableShape& shape, const Batch& batch, std::span<const uint32_t> rows, const Prepared& prepared,
                  const Optimizer& optimizer, const StepNumbers& numbers, const float* sums, uint64_t sequence,
                  uint64_t group_step, int64_t time) {
  const size_t dimension = shape.spec.dimension;
  const std::shared_ptr<const ShardOrder> by_shard = batch.by_shard && rows.size() == batch.num_rows()
                                                         ? batch.by_shard
                                                         : std::make_shared<const ShardOrder>(batch, rows, hot_);
  const ShardOrder& order = *by_shard;
  const size_t shards = hot_.num_shards();
  const size_t ranges = rows.size() < 512 ? 1 : std::min(shards, pool_.size() * 2);
  std::vector<DisplacedRows> displaced(ranges);
  pool_.run(ranges, [&](size_t range) {
    std::vector<RowUpdate> updates;
    updates.reserve(kUpdateChunk);
    for (size_t s = shards * range / ranges; s < shards * (range + 1) / ranges; ++s) {
      const uint32_t* in_shard = order.order.data() + order.begin[s];
      const size_t count = order.begin[s + 1] - order.begin[s];
      if (count == 0) continue;
      updates.clear();
      const std::lock_guard lock(hot_.shard(s).mutex);
      for (size_t i = 0; i < count; ++i) {
        if (i + 8 < count) __builtin_prefetch(hot_.row(prepared.slots[in_shard[i + 8]]), 1);
        const uint32_t r = in_shard[i];
        HotRow* row = hot_.row(prepared.slots[r]);
        // A row created by this very operation has its sequence number already, and no update yet.
        if (!planted("redo twice") &&
            (row->sequence > sequence || (row->sequence == sequence && row->update_count > 0)))
          continue;
        if (row->sequence < sequence && needs_displacing(*row)) displace(*row, displaced[range]);
        if (row->update_count != ~uint32_t{0}) ++row->update_count;
        row->sequence = sequence;
        row->step = static_cast<uint32_t>(group_step);
        row->time = time;
        row->flags |= HotRow::kDirty | HotRow::kFloats;
        updates.push_back({.weights = row->floats(),
                           .state = row->floats() + dimension,
                           .gradient = sums + r * dimension,
                           .update_count = row->update_count});
        if (updates.size() == kUpdateChunk) {
          optimizer.update_rows(numbers, dimension, updates);
          updates.clear();
        }
      }
      optimizer.update_rows(numbers, dimension, updates);
    }
  });
  for (DisplacedRows& part : displaced) keep_displaced(std::move(part));
}

void Tiers::replace(const TableShape& shape, const Batch& batch, std::span<const uint32_t> rows,
                    const Prepared& prepared, const std::byte* update_counts, const std::byte* floats,
                    uint64_t sequence, uint64_t group_step, int64_t time) {
  DisplacedRows displaced;
  const size_t row_bytes = shape.num_floats() * sizeof(float);
  for (const uint32_t r : rows) {
    HotRow* row = hot_.row(prepared.slots[r]);
    if (row->sequence > sequence) continue;
    const std::lock_guard lock(hot_.shard(hot_.shard_of(batch.mixed[r])).mutex);
    if (row->sequence < sequence && needs_displacing(*row)) displace(*row, displaced);
    row->sequence = sequence;
    row->step = static_cast<uint32_t>(group_step);
    row->time = time;
    row->flags |= HotRow::kDirty | HotRow::kFloats;
    std::memcpy(&row->update_count, update_counts + r * sizeof(uint32_t), sizeof(uint32_t));
    std::memcpy(row->floats(), floats + r * row_bytes, row_bytes);
  }
  keep_displaced(std::move(displaced));
}

void Tiers::erase(std::span<const uint32_t> rows, const Prepared& prepared, uint64_t sequence) {
  DisplacedRows displaced;
  for (const uint32_t r : rows) {
    if (prepared.slots[r] == kNoSlot) continue;
    HotRow* row = hot_.row(prepared.slots[r]);
    if (row->sequence >= sequence) continue;
    const std::lock_guard lock(hot_.shard(hot_.shard_of(row->mixed)).mutex);
    if (needs_displacing(*row)) displace(*row, displaced);
    row->sequence = sequence;
    row->flags |= HotRow::kDirty | HotRow::kErased;
  }
  note_move();
  keep_displaced(std::move(displaced));
}

void Tiers::discard(uint32_t table_id) noexcept {
  for (size_t slab = 0; slab < hot_.num_slabs(); ++slab) {
    const std::lock_guard lock(structure_);
    if (hot_.slab_slot_bytes(slab) == 0) continue;
    ++epoch_;
    // Each as it is visited: a list of them would ask for memory.
    hot_.for_each_row(slab, [&](Slot slot, const HotRow* row) {
      if (!row->has(HotRow::kPending) && row->table_id == table_id) remove_row(slot);
    });
  }
  slots_freed_.notify_all();
}

// -------------------------------------------------------------------- cut

void Tiers::encode(const HotRow& row, std::string& out) const {
  const RowHeader header{.update_count = row.update_count,
                         .step = row.step,
                         .time = row.time,
                         .sequence = row.sequence,
                         .has_floats = row.has(HotRow::kFloats)};
  const size_t num_floats = row.has(HotRow::kFloats) ? shape_of_(row.table_id)->num_floats() : 0;
  encode_row(stored_key(row), header, {row.floats(), num_floats}, out);
}

void Tiers::displace(const HotRow& row, DisplacedRows& out) const {
  Displaced old{.value = {}, .erased = row.has(HotRow::kErased)};
  if (!old.erased) encode(row, old.value);
  out.emplace_back(stored_key(row), std::move(old));
}

void Tiers::keep_displaced(DisplacedRows&& rows) {
  counters_.cut_displaced += rows.size();
  for (auto& [key, old] : rows) {
    displaced_bytes_ += displaced_cost(old);
    displaced_.emplace(key, std::move(old));
  }
}

void Tiers::wait_for_cut_memory() {
  std::unique_lock lock(structure_);
  const size_t limit = hot_.bytes() / 16;
  if (!cut_active_ || displaced_bytes_ <= limit) return;
  ++counters_.write_waits;
  while (cut_active_ && displaced_bytes_ > limit && !stop_ && !failed_.load()) cut_progress_.wait_for(lock, kLookAgain);
}

void Tiers::sort_distinct(std::vector<Leaving>& rows) {
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end(), [](const Leaving& a, const Leaving& b) { return a.same_row(b); }),
             rows.end());
}

void Tiers::put_rows(StoreWriter& writer, const std::string& bytes, std::span<const EncodedRow> rows) {
  for (const EncodedRow& row : rows) {
    if (row.erased) {
      writer.erase(row.key);
      continue;
    }
    if (!planted("filter forgets a key") || row.key.mixed() % 16 != 0) presence_.add(row.key);
    bytes_written_ += StoredKey::kBytes + row.end - row.begin;
    writer.put(row.key, std::as_bytes(std::span(bytes)).subspan(row.begin, row.end - row.begin));
  }
}

void Tiers::cut([[maybe_unused]] std::unique_lock<std::mutex> write, std::unique_lock<std::mutex> order,
                uint64_t sequence, const std::function<void()>& closed) {
  {
    const std::lock_guard lock(structure_);
    cut_active_ = true;
    cut_sequence_ = sequence;
  }
  order.unlock();
  std::vector<Leaving> list;
  const auto end = [&](bool written) {
    // In steps, so that nobody waits long.
    for (size_t begin = 0; begin < list.size(); begin += 16 * kCopyChunk) {
      const std::lock_guard lock(structure_);
      for (size_t i = begin; i < std::min(list.size(), begin + 16 * kCopyChunk); ++i) {
        HotRow* row = row_of(list[i]);
        if (row == nullptr || !row->has(HotRow::kSaved)) continue;
        const std::lock_guard shard_lock(hot_.shard(hot_.shard_of(row->mixed)).mutex);
        row->flags &= static_cast<uint8_t>(~HotRow::kSaved);
        if ((written || planted("failed cut taken for written")) &&
            (row->sequence <= sequence || planted("dirty rows forgotten")))
          row->flags &= static_cast<uint8_t>(~HotRow::kDirty);
      }
    }
    const std::lock_guard lock(structure_);
    cut_active_ = false;
    displaced_.clear();
    displaced_bytes_ = 0;
    cut_progress_.notify_all();
  };
  try {
    write_ahead_(sequence);
    {
      const std::lock_guard lock(structure_);
      list.reserve(hot_.rows());  // at once: a list that grows by copies would need twice the memory
    }
    // Changed rows as of the cut. A row that changes again before it is listed is displaced, and joins below.
    for (size_t slab = 0; slab < hot_.num_slabs(); ++slab) {
      const std::lock_guard lock(structure_);
      if (hot_.slab_slot_bytes(slab) == 0) continue;
      hot_.for_each_row(slab, [&](Slot slot, const HotRow* row) {
        if (!row->has(HotRow::kPending) && needs_displacing(*row)) list.push_back(leaving(slot, *row));
      });
    }
    {
      const std::lock_guard lock(structure_);
      for (const auto& [key, old] : displaced_) list.push_back({key.mixed(), key.table_id(), kNoSlot});
    }
    sort_distinct(list);

    const auto writer = store_.begin_write();
    std::string bytes;
    std::vector<EncodedRow> encoded;
    for (size_t begin = 0; begin < list.size(); begin += kCopyChunk) {
      bytes.clear();
      encoded.clear();
      {
        const std::lock_guard lock(structure_);
        throw_if_failed();  // a row may be half changed
        for (size_t i = begin; i < std::min(list.size(), begin + kCopyChunk); ++i) {
          const size_t at = bytes.size();
          HotRow* row = row_of(list[i]);
          if (row != nullptr && needs_displacing(*row)) {
            const bool erased = row->has(HotRow::kErased);
            if (!erased) encode(*row, bytes);
            encoded.push_back({list[i].key(), at, bytes.size(), erased});
            const std::lock_guard shard_lock(hot_.shard(hot_.shard_of(row->mixed)).mutex);
            row->flags |= HotRow::kSaved;
            continue;
          }
          const auto old = displaced_.find(list[i].key());
          if (old == displaced_.end())
            throw StorageError(
                "[cut] a changed row is neither in memory nor set aside: this is a bug, please report it");
          bytes += old->second.value;
          encoded.push_back({old->first, at, bytes.size(), old->second.erased});
          displaced_bytes_ -= std::min(displaced_bytes_, displaced_cost(old->second));
          displaced_.erase(old);
        }
      }
      cut_progress_.notify_all();
      put_rows(*writer, bytes, encoded);
    }
    writer->commit();
  } catch (...) {
    end(false);
    throw;
  }
  end(true);
  ++counters_.cuts;
  counters_.cut_rows += list.size();
  if (planted("evictions before the cut is closed")) {
    write.unlock();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // so that there are some
  }
  closed();
}

// ---------------------------------------------------------------- eviction

void Tiers::evict_loop() {
  std::unique_lock lock(structure_);
  while (!stop_) {
    size_t slot_bytes = 0, target = 0;
    for (auto it = demand_.begin(); it != demand_.end();) {
      if (hot_.available(it->first) >= it->second && !hot_.over_budget()) {
        it = demand_.erase(it);
        continue;
      }
      // The operation at hand first: were another size's reserve filled up first, out of slabs that this one has just
      // filled, the two would take them from each other for ever.
      if (slot_bytes == 0 || it->first == working_slot_bytes_) {
        slot_bytes = it->first;
        target = it->second;
      }
      ++it;
    }
    if (slot_bytes == working_slot_bytes_)
      std::erase_if(demand_,
                    [&](const auto& demand) { return demand.first != slot_bytes; });  // asked for again if needed
    if (slot_bytes == 0) {
      evict_wake_.wait(lock);
      continue;
    }
    const uint64_t eviction = ++evictions_begun_;
    lock.unlock();
    try {
      evict_some(slot_bytes, target);
      lock.lock();
    } catch (...) {
      const std::exception_ptr error = std::current_exception(), failure = store_.failure();
      if (failure || !is_disk_full(error)) {
        fail(failure ? failure : with_way_out(error));
        lock.lock();
        // Nothing more can be written; whoever needs memory gets the error.
        evict_wake_.wait(lock, [this] { return stop_; });
        return;
      }
      // Its rows stay in memory, changed as they are. Who waits for memory gets the error; who needs some later makes
      // the next attempt.
      lock.lock();
      no_space_ = error;
      no_space_in_ = eviction;
      demand_.clear();
    }
    slots_freed_.notify_all();
  }
}

void Tiers::evict_some(size_t slot_bytes, size_t target) {
  std::vector<Leaving> victims;
  {
    std::unique_lock lock(structure_);
    if (hot_.over_budget()) {
      if (const auto slab = hot_.slab_to_take(0)) {
        lock.unlock();
        empty_slab(*slab);
        lock.lock();  // and on: were its slots all held by whoever waits, returning here would be for ever
      }
    }
    const size_t own = hot_.slabs_of(slot_bytes), sizes = std::max<size_t>(hot_.sizes_in_use(), 1);
    const size_t own_slots = own * (hot_.max_slot_bytes() / slot_bytes);
    const bool starved = own * sizes * 2 < hot_.slab_limit();  // less than half a fair share
    // Room for the operation at hand beside what it waits for: were its own rows the only ones to evict, it would
    // bring them in again and again.
    const size_t working = working_slot_bytes_ == slot_bytes ? working_rows_ : 0;
    if (own_slots < target + working || starved) {
      if (const auto slab = hot_.slab_to_take(slot_bytes)) {
        lock.unlock();
        return empty_slab(*slab);
      }
    }
  }
  // CLOCK: the hand goes round the slabs of this size, counts a row's references down and takes those without.
  // New rows start with none, so a scan that touches rows once does not push the working set out.
  const size_t slabs = hot_.num_slabs();
  for (size_t visited = 0; visited < slabs * (HotRow::kMaxReferenced + 1); ++visited) {
    const std::lock_guard lock(structure_);
    if (stop_) return;
    const size_t free = hot_.available(slot_bytes);
    if (free + victims.size() >= target) break;
    size_t& hand = hand_[slot_bytes];
    hand = (hand + 1) % slabs;
    if (hot_.slab_slot_bytes(hand) != slot_bytes) continue;
    ++epoch_;
    size_t wanted = target - free - victims.size();
    std::vector<Slot> clean;
    hot_.for_each_row(hand, [&](Slot slot, HotRow* row) {
      if (row->has(HotRow::kPending) || wanted == 0) return;
      const uint8_t seen = row->referenced.load(std::memory_order_relaxed);
      if (seen > 0) {
        row->referenced.store(static_cast<uint8_t>(seen - 1), std::memory_order_relaxed);
        return;
      }
      --wanted;
      if (row->has(HotRow::kDirty))
        victims.push_back(leaving(slot, *row));
      else
        clean.push_back(slot);
    });
    for (const Slot slot : clean) remove_row(slot);
    if (!clean.empty()) slots_freed_.notify_all();
  }
  write_back(victims, false);
}

void Tiers::empty_slab(size_t slab) {
  std::vector<Leaving> victims;
  {
    const std::lock_guard lock(structure_);
    ++epoch_;
    std::vector<Slot> clean;
    if (hot_.slab_slot_bytes(slab) == 0) return;
    hot_.for_each_row(slab, [&](Slot slot, HotRow* row) {
      if (row->has(HotRow::kPending)) return;
      if (row->has(HotRow::kDirty))
        victims.push_back(leaving(slot, *row));
      else
        clean.push_back(slot);
    });
    for (const Slot slot : clean) remove_row(slot);
  }
  write_back(victims, true);
}

void Tiers::write_back(std::vector<Leaving>& victims, bool take_slab) {
  if (victims.empty()) return;
  // While a cut is open nothing newer than it may reach the cold tier: wait for it here.
  const std::lock_guard write(write_mutex_);
  sort_distinct(victims);
  const auto writer = store_.begin_write();
  std::vector<uint64_t> written(victims.size(), 0);  // the sequence number at which each row was written; 0: it was not
  std::string bytes;
  std::vector<EncodedRow> encoded;
  for (size_t begin = 0; begin < victims.size(); begin += kCopyChunk) {
    bytes.clear();
    encoded.clear();
    uint64_t newest = 0;
    {
      const std::lock_guard lock(structure_);
      throw_if_failed();  // a row may be half changed
      for (size_t i = begin; i < std::min(victims.size(), begin + kCopyChunk); ++i) {
        const HotRow* row = row_of(victims[i]);
        if (row == nullptr || !row->has(HotRow::kDirty)) continue;  // gone or clean by now
        const size_t at = bytes.size();
        const bool erased = row->has(HotRow::kErased);
        if (!erased) encode(*row, bytes);
        encoded.push_back({victims[i].key(), at, bytes.size(), erased});
        written[i] = row->sequence;
        newest = std::max(newest, row->sequence);
      }
    }
    if (!planted("evicted before the log is synced")) write_ahead_(newest);
    put_rows(*writer, bytes, encoded);
    counters_.written_back += encoded.size();
  }
  writer->commit();
  for (size_t begin = 0; begin < victims.size(); begin += kCopyChunk) {
    const std::lock_guard lock(structure_);
    ++epoch_;
    for (size_t i = begin; i < std::min(victims.size(), begin + kCopyChunk); ++i) {
      HotRow* row = row_of(victims[i]);
      // A row that changed while it was written stays, and stays dirty.
      if (row == nullptr || row->sequence != written[i] || !row->has(HotRow::kDirty)) continue;
      if (take_slab || row->referenced.load(std::memory_order_relaxed) == 0) {
        remove_row(victims[i].slot);
      } else {
        const std::lock_guard shard_lock(hot_.shard(hot_.shard_of(row->mixed)).mutex);
        row->flags &= static_cast<uint8_t>(~HotRow::kDirty);
      }
    }
    slots_freed_.notify_all();
  }
}

}  // namespace damo
