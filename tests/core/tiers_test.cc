// SPDX-License-Identifier: Apache-2.0
#include "tiers.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "error.h"

namespace damo {
namespace {

// The memory store, with what a test wants to go wrong.
class FaultyStore final : public Store {
 public:
  std::atomic<bool> fail_reads{false}, fail_writes{false}, full{false};
  mutable std::atomic<uint64_t> keys_asked{0};
  std::function<void()> before_commit, after_read;  // set while nobody reads or writes

  void multi_get(std::span<const StoredKey> keys, const Found& found) const override {
    keys_asked += keys.size();
    if (fail_reads) throw StorageError("[read] the disk is gone");
    // What is found is handed over without the inner store's lock, as RocksDB's is.
    std::vector<std::pair<size_t, std::vector<std::byte>>> values;
    inner_->multi_get(keys,
                      [&](size_t i, Bytes value) { values.emplace_back(i, std::vector(value.begin(), value.end())); });
    for (const auto& [i, value] : values) found(i, value);
    if (after_read) after_read();
  }
  std::unique_ptr<StoreWriter> begin_write() override { return std::make_unique<Writer>(*this, inner_->begin_write()); }
  std::shared_ptr<const StoreSnapshot> snapshot() const override { return inner_->snapshot(); }
  std::vector<LinkedFile> link_into(const std::filesystem::path& to) override { return inner_->link_into(to); }
  void set_disposable(Disposable disposable) override { inner_->set_disposable(std::move(disposable)); }
  void compact(std::atomic<bool>* cancelled) override { inner_->compact(cancelled); }
  StoreStats stats() const override { return inner_->stats(); }
  void close() override { inner_->close(); }

 private:
  struct Writer final : StoreWriter {
    Writer(FaultyStore& owner, std::unique_ptr<StoreWriter> writer) : store(owner), inner(std::move(writer)) {}
    void put(const StoredKey& key, Bytes value) override { inner->put(key, value); }
    void erase(const StoredKey& key) override { inner->erase(key); }
    void commit() override {
      if (store.before_commit) store.before_commit();
      if (store.fail_writes) throw StorageError("[write] the disk is broken");
      if (store.full) throw DiskFullError("[write] the disk is full");
      inner->commit();
    }
    FaultyStore& store;
    std::unique_ptr<StoreWriter> inner;
  };
  std::unique_ptr<Store> inner_ = open_memory_store({});
};

TableSpec spec_of(uint32_t table_id, uint32_t dimension) {
  TableSpec spec;
  spec.group = table_id;
  spec.table_id = table_id;
  spec.dimension = dimension;
  spec.optimizer = "adagrad";
  spec.optimizer_settings = {{"lr", 0.5}};
  spec.initializer = "uniform";
  spec.initializer_settings = {{"low", -1.0}, {"high", 1.0}};
  spec.seed = 5;
  spec.stream = table_id;
  return spec;
}

// What one row is: the model beside the tiers.
struct ModelRow {
  RowHeader header;
  std::vector<float> floats;
};
using Model = std::map<std::pair<uint32_t, uint64_t>, ModelRow>;  // by table and key

constexpr size_t kMemory = size_t{1} << 20;

struct Harness {
  explicit Harness(size_t memory = kMemory, size_t threads = 2)
      : pool(threads),
        small(spec_of(1, 4)),
        large(spec_of(2, 40)),
        tiers(
            memory, 4096, 8, store, pool,
            [this](uint64_t wanted) {
              uint64_t known = synced.load();
              while (known < wanted && !synced.compare_exchange_weak(known, wanted)) {
              }
            },
            [this](uint32_t id) { return id == 1   ? &small
                                         : id == 2 ? &large
                                                   : nullptr; }) {}

  const TableShape& shape(uint32_t table) { return table == 1 ? small : large; }

  // One operation as Table does it, on keys that differ; the gradient of a key depends on key and operation.
  void apply(uint32_t table, const std::vector<uint64_t>& keys) {
    const TableShape& s = shape(table);
    const Batch batch(keys, std::nullopt);
    std::vector<uint32_t> rows(batch.num_rows());
    std::iota(rows.begin(), rows.end(), 0u);
    tiers.wait_for_cut_memory();
    const std::lock_guard lock(order);
    Tiers::Prepared prepared = tiers.prepare(s, Expiry{}, batch, rows, true);
    const uint64_t number = ++sequence;
    std::vector<float> sums(rows.size() * s.spec.dimension);
    for (size_t i = 0; i < sums.size(); ++i)
      sums[i] =
          static_cast<float>((keys[i / s.spec.dimension] * 31 + number * 7 + i % s.spec.dimension) % 201) / 100 - 1;
    const StepNumbers numbers = s.optimizer->numbers(0.5, number);
    tiers.create_rows(s, batch, prepared, number, 0, time_of(number));
    tiers.apply(s, batch, rows, prepared, *s.optimizer, numbers, sums.data(), number, number, time_of(number));
    prepared.structure.unlock();
    for (size_t r = 0; r < rows.size(); ++r) {
      ModelRow& row = model_row(table, keys[r], number);
      row.header = {.update_count = row.header.update_count + 1,
                    .step = static_cast<uint32_t>(number),
                    .time = time_of(number),
                    .sequence = number,
                    .has_floats = true};
      s.optimizer->update(numbers, row.header.update_count, s.spec.dimension, row.floats.data(),
                          row.floats.data() + s.spec.dimension, sums.data() + r * s.spec.dimension);
    }
  }

  void create(uint32_t table, const std::vector<uint64_t>& keys) {
    const Batch batch(keys, std::nullopt);
    std::vector<uint32_t> rows(batch.num_rows());
    std::iota(rows.begin(), rows.end(), 0u);
    const std::lock_guard lock(order);
    const Tiers::Prepared prepared = tiers.prepare(shape(table), Expiry{}, batch, rows, true);
    if (prepared.fresh.empty()) return;
    const uint64_t number = ++sequence;
    tiers.create_rows(shape(table), batch, prepared, number, 0, time_of(number));
    for (const uint64_t key : keys) model_row(table, key, number);
  }

  void erase(uint32_t table, const std::vector<uint64_t>& keys) {
    const Batch batch(keys, std::nullopt);
    std::vector<uint32_t> rows(batch.num_rows());
    std::iota(rows.begin(), rows.end(), 0u);
    const std::lock_guard lock(order);
    const Tiers::Prepared prepared = tiers.prepare(shape(table), Expiry{}, batch, rows, false);
    const uint64_t number = ++sequence;
    tiers.erase(rows, prepared, number);
    for (const uint64_t key : keys) model.erase({table, key});
  }

  // Makes a cut; the model and the store's rows as they were when it closed.
  std::pair<Model, std::shared_ptr<const StoreSnapshot>> cut() {
    std::unique_lock write(tiers.write_mutex(), std::defer_lock);
    std::unique_lock lock(order, std::defer_lock);
    std::lock(write, lock);
    const Model then = model;
    locked = true;
    std::shared_ptr<const StoreSnapshot> snapshot;
    tiers.cut(std::move(write), std::move(lock), sequence, [&] { snapshot = store.snapshot(); });
    return {then, snapshot};
  }

  ModelRow& model_row(uint32_t table, uint64_t key, uint64_t number) {
    const auto [at, added] = model.try_emplace({table, key});
    if (added) {
      at->second.header = {.update_count = 0, .step = 0, .time = time_of(number), .sequence = number};
      at->second.floats.resize(shape(table).num_floats());
      shape(table).first_floats(mix_key(key), at->second.floats.data());
    }
    return at->second;
  }

  static int64_t time_of(uint64_t number) { return 1000 + static_cast<int64_t>(number); }

  // Whether lookups see the model's weights, and exactly its keys exist, of `keys`.
  bool lookups_agree(uint32_t table, const std::vector<uint64_t>& keys, bool insert) {
    const TableShape& s = shape(table);
    const size_t dimension = s.spec.dimension;
    Batch batch(keys, std::nullopt);
    std::vector<float> out(keys.size() * dimension, -9.0f);
    std::set<uint32_t> absent;
    Tiers::HotRead read = tiers.read_hot(s, Expiry{}, batch, ShardOrder(batch, tiers.hot()), out.data(), insert);
    absent.insert(read.gone.begin(), read.gone.end());
    if (insert) {
      const Tiers::Absent nowhere = tiers.bring_in(s, Expiry{}, batch, read.missing, out.data());
      absent.insert(nowhere.rows.begin(), nowhere.rows.end());
    } else {
      std::mutex mutex;
      tiers.read_through(s, Expiry{}, batch, read.missing, [&](uint32_t r, const Tiers::Seen& seen) {
        const std::lock_guard lock(mutex);
        float* to = out.data() + batch.first[r] * dimension;
        if (!seen.found)
          absent.insert(r);
        else if (seen.floats.empty())
          s.first_weights(batch.mixed[r], to);
        else
          std::memcpy(to, seen.floats.data(), dimension * sizeof(float));
      });
    }
    for (uint32_t r = 0; r < batch.num_rows(); ++r) {
      const uint64_t key = unmix_key(batch.mixed[r]);
      const auto known = model.find({table, key});
      if ((known == model.end()) != absent.contains(r)) return false;
      if (known != model.end() && std::memcmp(known->second.floats.data(), out.data() + batch.first[r] * dimension,
                                              dimension * sizeof(float)) != 0)
        return false;
    }
    return true;
  }

  // Whether a snapshot of the store holds exactly the model's rows, to the bit.
  bool snapshot_is(const StoreSnapshot& snapshot, const Model& expected) {
    std::map<StoredKey, const ModelRow*> sorted;
    for (const auto& [name, row] : expected) sorted[StoredKey::make(name.first, mix_key(name.second))] = &row;
    const auto rows = snapshot.scan(StoredKey::make(0, 0), std::nullopt);
    auto at = sorted.begin();
    for (; rows->next(); ++at) {
      if (at == sorted.end() || !(rows->key() == at->first)) return false;
      const DecodedRow row = decode_row(rows->key(), rows->value(), shape(at->first.table_id()).num_floats());
      const RowHeader &is = row.header, &should = at->second->header;
      if (is.update_count != should.update_count || is.step != should.step || is.time != should.time ||
          is.sequence != should.sequence || is.has_floats != should.has_floats)
        return false;
      if (is.has_floats && std::memcmp(row.floats.data(), at->second->floats.data(), row.floats.size()) != 0)
        return false;
    }
    return at == sorted.end();
  }

  FaultyStore store;
  ThreadPool pool;
  TableShape small, large;
  std::atomic<uint64_t> synced{0};
  std::mutex order;
  uint64_t sequence = 0;
  Model model;                      // under `order`
  std::atomic<bool> locked{false};  // a cut has both its locks
  Tiers tiers;
};

std::vector<uint64_t> range(uint64_t first, uint64_t last) {
  std::vector<uint64_t> keys(last - first);
  std::iota(keys.begin(), keys.end(), first);
  return keys;
}

std::vector<uint64_t> some_of(uint64_t last, size_t count, std::mt19937_64& random) {
  std::set<uint64_t> keys;
  while (keys.size() < count) keys.insert(random() % last);
  return {keys.begin(), keys.end()};
}

TEST_CASE("tiers: rows that left a tiny hot tier come back bit-identical, of two sizes, through every door") {
  Harness h;
  h.tiers.presence().set_complete();
  std::mt19937_64 random(1);
  bool right = true;
  for (int round = 0; round < 60; ++round) {
    h.apply(1, some_of(20000, 1500, random));
    h.apply(2, some_of(6000, 300, random));
    h.create(1, some_of(25000, 100, random));
    if (round % 5 == 0) {
      right = right && h.lookups_agree(1, some_of(26000, 2000, random), round % 2 == 0);
      right = right && h.lookups_agree(2, some_of(7000, 700, random), round % 2 != 0);
    }
  }
  CHECK(right);
  CHECK(h.lookups_agree(1, range(0, 26000), false));
  CHECK(h.lookups_agree(2, range(0, 7000), true));
  const TiersStats stats = h.tiers.stats();
  CHECK(stats.evicted > 10000);
  CHECK(stats.written_back > 10000);
  CHECK(stats.cold_hits > 1000);
  CHECK(stats.hot_bytes_in_use <= kMemory + (64 << 10));
  const auto [model, snapshot] = h.cut();
  CHECK(h.snapshot_is(*snapshot, model));
}

TEST_CASE("tiers: no row reaches the cold tier before the log is synced past its number") {
  Harness h;
  std::atomic<bool> ahead{false};
  h.store.before_commit = [&] {
    // Everything the commit may hold was applied before it began; what it does hold must be synced.
    if (h.synced.load() == 0) ahead = true;
  };
  for (uint64_t i = 0; i < 40; ++i) h.apply(1, range(i * 1000, i * 1000 + 1000));
  const auto [model, snapshot] = h.cut();
  CHECK_FALSE(ahead);
  CHECK(h.synced >= h.sequence);
  // The newest row of any write is at most what was synced, always.
  const auto rows = snapshot->scan(StoredKey::make(0, 0), std::nullopt);
  uint64_t newest = 0;
  while (rows->next())
    newest = std::max(newest, decode_row(rows->key(), rows->value(), h.small.num_floats()).header.sequence);
  CHECK(newest <= h.synced);
}

TEST_CASE("tiers: a cut is exactly its moment while another thread goes on changing, creating and erasing") {
  Harness h;
  h.tiers.presence().set_complete();
  h.apply(1, range(0, 2500));
  h.apply(2, range(0, 500));
  std::atomic<bool> stop{false};
  std::atomic<int> done{0};
  std::thread trainer([&] {
    std::mt19937_64 random(2);
    while (!stop) {
      h.apply(1, some_of(9000, 300, random));
      h.apply(2, some_of(1500, 60, random));
      h.create(1, some_of(12000, 20, random));
      h.erase(1, some_of(9000, 20, random));
      ++done;
    }
  });
  int exact = 0;
  constexpr int kCuts = 12;
  for (int i = 0; i < kCuts; ++i) {
    const int before = done;
    while (done == before) std::this_thread::yield();
    const auto [model, snapshot] = h.cut();
    exact += h.snapshot_is(*snapshot, model);
  }
  stop = true;
  trainer.join();
  CHECK(exact == kCuts);
  CHECK(h.lookups_agree(1, range(0, 12000), false));
  CHECK(h.tiers.stats().cuts == kCuts);
}

TEST_CASE("tiers: rows changed while a cut is open are in it as they were, and later writes hold the new ones") {
  Harness h;
  h.apply(1, range(0, 2500));
  h.create(1, range(2500, 2600));
  h.erase(1, range(0, 50));  // tombstones of rows the cold tier never had
  const auto first = h.cut();
  CHECK(h.snapshot_is(*first.second, first.first));
  h.erase(1, range(50, 100));  // tombstones of rows it has
  h.apply(1, range(0, 20));    // a tombstone becomes a row again
  h.apply(1, range(1000, 2000));

  // While the cut writes: change what it saves, what it saved, what it does not know, and revive what was erased.
  Model at_cut;
  {
    bool once = false;
    h.store.before_commit = [&] {
      if (std::exchange(once, true)) return;
      std::thread([&] {
        h.apply(1, range(0, 2700));
        h.erase(1, range(1500, 1600));
        h.create(1, range(4000, 4100));
        h.apply(1, range(1500, 1550));
      }).join();
    };
    const auto [model, snapshot] = h.cut();
    h.store.before_commit = nullptr;
    CHECK(once);
    CHECK(h.snapshot_is(*snapshot, model));
    at_cut = model;
  }
  CHECK(h.lookups_agree(1, range(0, 5000), false));
  const auto [model, snapshot] = h.cut();
  CHECK(model.size() != at_cut.size());
  CHECK(h.snapshot_is(*snapshot, model));
}

TEST_CASE("tiers: rows changed before an open cut has listed them are set aside and are in it as they were") {
  Harness h;
  for (int round = 0; round < 5; ++round) {
    h.apply(1, range(0, 2500));
    h.erase(1, range(100, 120));
    h.locked = false;
    std::pair<Model, std::shared_ptr<const StoreSnapshot>> cut;
    std::thread cutter([&] { cut = h.cut(); });
    // As soon as the cut lets go of the order lock, rows change: some before they are listed, some after.
    while (!h.locked) std::this_thread::yield();
    h.apply(1, range(0, 200));
    h.apply(1, range(1000, 2500));
    h.erase(1, range(500, 600));
    cutter.join();
    CHECK(h.snapshot_is(*cut.second, cut.first));
  }
  CHECK(h.lookups_agree(1, range(0, 3000), false));
}

TEST_CASE("tiers: tombstones hide rows of the cold tier until a cut or an eviction removes them there") {
  Harness h;
  h.apply(1, range(0, 1000));
  h.cut();
  CHECK(h.store.stats().keys_written == 1000);
  h.erase(1, range(0, 500));
  CHECK(h.lookups_agree(1, range(0, 1000), false));
  CHECK(h.lookups_agree(1, range(0, 1000), true));
  const auto [model, snapshot] = h.cut();
  CHECK(model.size() == 500);
  CHECK(h.snapshot_is(*snapshot, model));
  // Pushed out of memory by other rows: gone for good.
  for (uint64_t i = 0; i < 20; ++i) h.apply(1, range(10000 + i * 1000, 11000 + i * 1000));
  CHECK(h.lookups_agree(1, range(0, 1000), false));
  h.create(1, range(0, 10));
  CHECK(h.lookups_agree(1, range(0, 1000), false));
  const auto later = h.cut();
  CHECK(h.snapshot_is(*later.second, later.first));
}

TEST_CASE("tiers: a cut that fails leaves everything as it was, and the next one is whole") {
  Harness h;
  h.apply(1, range(0, 2000));
  h.erase(1, range(0, 10));
  const Model before = h.model;
  h.store.fail_writes = true;
  CHECK_THROWS_WITH_AS(h.cut(), "[write] the disk is broken", StorageError);
  CHECK(h.lookups_agree(1, range(0, 2000), false));
  CHECK(h.snapshot_is(*h.store.snapshot(), {}));
  h.apply(1, range(0, 100));
  h.store.fail_writes = false;
  const auto [model, snapshot] = h.cut();
  CHECK(h.snapshot_is(*snapshot, model));
}

TEST_CASE(
    "tiers: when the cold tier refuses an eviction, operations that need memory get its error and lookups go on") {
  Harness h;
  h.tiers.presence().set_complete();
  h.apply(1, range(0, 2000));
  h.cut();
  h.store.fail_writes = true;
  const std::string said =
      "[write] the disk is broken; nothing more is written to the disk " + std::string(kUntilOpenedAgain);
  CHECK_THROWS_WITH_AS(
      [&] {
        for (uint64_t i = 0; i < 100; ++i) h.apply(1, range(5000 + i * 1000, 6000 + i * 1000));
      }(),
      said.c_str(), StorageError);
  CHECK_THROWS_WITH_AS(h.apply(1, {1}), said.c_str(), StorageError);
  CHECK_THROWS_WITH_AS(h.tiers.throw_if_failed(), said.c_str(), StorageError);
  h.store.fail_writes = false;  // it stays latched all the same
  CHECK_THROWS_AS(h.apply(1, {1}), StorageError);
  // Nothing was lost: what is in memory, and what is below.
  CHECK(h.lookups_agree(1, range(0, 20000), false));
  CHECK(h.lookups_agree(1, range(0, 20000), true));
}

TEST_CASE(
    "tiers: while the disk is full, operations that need memory fail and lookups go on; with space, all goes on") {
  Harness h;
  h.tiers.presence().set_complete();
  h.apply(1, range(0, 2000));
  h.cut();
  for (int round = 0; round < 3; ++round) {
    h.store.full = true;
    CHECK_THROWS_WITH_AS(
        [&] {
          for (uint64_t i = 0; i < 100; ++i) h.apply(1, range(5000 + i * 1000, 6000 + i * 1000));
        }(),
        "[write] the disk is full", DiskFullError);
    CHECK_THROWS_AS(h.cut(), DiskFullError);
    CHECK(h.lookups_agree(1, range(0, 20000), false));
    h.store.full = false;
    for (uint64_t i = 0; i < 20; ++i) h.apply(1, range(200000 + i * 1000, 201000 + i * 1000));
    CHECK(h.lookups_agree(1, range(0, 20000), round % 2 == 0));
  }
  CHECK(h.lookups_agree(1, range(200000, 220000), false));
  const auto [model, snapshot] = h.cut();
  CHECK(h.snapshot_is(*snapshot, model));
}

TEST_CASE("tiers: a failed read is an error, never an absent key, and changes nothing") {
  Harness h;
  for (uint64_t i = 0; i < 20; ++i) h.apply(1, range(i * 1000, i * 1000 + 1000));
  h.cut();
  const uint64_t before = h.sequence;
  h.store.fail_reads = true;
  CHECK_THROWS_WITH_AS(h.lookups_agree(1, range(0, 20000), false), "[read] the disk is gone", StorageError);
  CHECK_THROWS_WITH_AS(h.lookups_agree(1, range(0, 20000), true), "[read] the disk is gone", StorageError);
  CHECK_THROWS_WITH_AS(h.apply(1, range(0, 2000)), "[read] the disk is gone", StorageError);
  CHECK_THROWS_WITH_AS(h.erase(1, range(0, 2000)), "[read] the disk is gone", StorageError);
  CHECK(h.sequence == before);
  h.store.fail_reads = false;
  CHECK(h.lookups_agree(1, range(0, 20000), true));
  h.apply(1, range(0, 2000));
  CHECK(h.lookups_agree(1, range(0, 20000), false));
}

TEST_CASE("tiers: a damaged row of the cold tier is CorruptionError in every door, and no slot is lost by it") {
  Harness h;
  {
    const auto writer = h.store.begin_write();
    writer->put(StoredKey::make(1, 5), std::as_bytes(std::span("not a row", 9)));
    writer->commit();
  }
  const std::vector<uint64_t> keys{unmix_key(5), 123};
  const uint64_t in_use = h.tiers.stats().hot_bytes_in_use;
  for (int i = 0; i < 50; ++i) {
    CHECK_THROWS_AS(h.lookups_agree(1, keys, i % 2 == 0), CorruptionError);
    CHECK_THROWS_AS(h.apply(1, keys), CorruptionError);
  }
  CHECK(h.tiers.stats().hot_bytes_in_use == in_use);
  CHECK(h.tiers.stats().hot_rows == 0);
  h.apply(1, {123});
  CHECK(h.lookups_agree(1, {123}, false));
}

TEST_CASE("tiers: prepare and abandon change nothing that can be seen") {
  Harness h;
  h.apply(1, range(0, 100));
  h.erase(1, range(0, 10));
  const TiersStats before = h.tiers.stats();
  for (int i = 0; i < 100; ++i) {
    const Batch batch(range(0, 300), std::nullopt);
    std::vector<uint32_t> rows(300);
    std::iota(rows.begin(), rows.end(), 0u);
    const std::lock_guard lock(h.order);
    Tiers::Prepared prepared = h.tiers.prepare(h.small, Expiry{}, batch, rows, true);
    CHECK(prepared.fresh.size() == 210);
    CHECK(prepared.structure.owns_lock());
    h.tiers.abandon(prepared);
    CHECK_FALSE(prepared.structure.owns_lock());
  }
  const TiersStats after = h.tiers.stats();
  CHECK(after.hot_rows == before.hot_rows);
  CHECK(after.created == before.created);
  CHECK(after.hot_bytes_in_use == before.hot_bytes_in_use);
  CHECK(h.lookups_agree(1, range(0, 300), false));
  const auto [model, snapshot] = h.cut();
  CHECK(h.snapshot_is(*snapshot, model));
}

TEST_CASE("tiers: rows of two tables are prepared together, if memory holds them, and abandoned together") {
  Harness h(4 * kMemory);
  const size_t quarter = h.tiers.chunk_rows(h.small);
  h.apply(2, range(0, 100));
  for (size_t i = 0; i < 8; ++i) h.apply(1, range(i * quarter, (i + 1) * quarter));  // twice what memory holds
  const Expiry never{};
  // Rows that are there, on disk by now, and new ones.
  const Batch small(range(quarter / 2, quarter), std::nullopt), large(range(50, 150), std::nullopt);
  const Batch fresh(range(100 * quarter, 100 * quarter + quarter / 3), std::nullopt);
  const auto all = [](const Batch& batch) {
    std::vector<uint32_t> rows(batch.num_rows());
    std::iota(rows.begin(), rows.end(), 0u);
    return rows;
  };
  const auto small_rows = all(small), large_rows = all(large), fresh_rows = all(fresh);
  for (const Batch* first : {&small, &fresh}) {
    const std::vector<Tiers::Request> requests{
        {h.small, never, *first, first == &small ? small_rows : fresh_rows, true},
        {h.large, never, large, large_rows, true}};
    for (int i = 0; i < 3; ++i) {
      const std::lock_guard lock(h.order);
      auto prepared = h.tiers.prepare_together(requests);
      REQUIRE(prepared.has_value());
      CHECK((*prepared)[0].structure.owns_lock());
      CHECK((*prepared)[0].fresh.size() == (first == &small ? 0 : fresh.num_rows()));
      CHECK((*prepared)[1].fresh.size() == 50);
      std::set<Slot> slots;
      for (size_t which = 0; which < 2; ++which)
        for (const uint32_t r : requests[which].rows) {
          const Slot slot = (*prepared)[which].slots[r];
          const HotRow* row = h.tiers.hot().row(slot);
          CHECK(row->mixed == requests[which].batch.mixed[r]);
          CHECK(row->table_id == which + 1);
          CHECK(slots.insert(slot).second);
        }
      h.tiers.abandon(*prepared);
      CHECK_FALSE((*prepared)[0].structure.owns_lock());
    }
  }
  // More than memory holds.
  const Batch many(range(0, 3 * quarter + quarter / 2), std::nullopt);
  const auto many_rows = all(many);
  const std::vector<Tiers::Request> requests{{h.small, never, many, many_rows, true},
                                             {h.large, never, large, large_rows, true}};
  const std::lock_guard lock(h.order);
  CHECK_FALSE(h.tiers.prepare_together(requests).has_value());
}

TEST_CASE("tiers: an update finds its rows wherever they went since their lookup") {
  Harness h(kMemory / 2);
  const std::vector<uint64_t> keys = range(0, 300);
  h.apply(1, keys);
  const auto looked_up = [&] {
    Batch batch(keys, std::nullopt);
    h.tiers.read_hot(h.small, Expiry{}, batch, ShardOrder(batch, h.tiers.hot()), nullptr, true);
    return batch;
  };
  Batch batch = looked_up();
  std::vector<uint32_t> rows(batch.num_rows());
  std::iota(rows.begin(), rows.end(), 0u);
  // The keys that an update of the batch would make anew. Every row has its slot, and no other's.
  const auto fresh = [&](const Expiry& expiry) {
    const std::lock_guard lock(h.order);
    Tiers::Prepared prepared = h.tiers.prepare(h.small, expiry, batch, rows, true);
    bool right = true;
    for (const uint32_t r : rows) {
      const HotRow* row = h.tiers.hot().row(prepared.slots[r]);
      right = right && row->mixed == batch.mixed[r] && row->table_id == 1;
    }
    CHECK(right);
    std::vector<uint64_t> made;
    for (const uint32_t r : prepared.fresh) made.push_back(unmix_key(batch.mixed[r]));
    h.tiers.abandon(prepared);
    std::sort(made.begin(), made.end());
    return made;
  };

  CHECK(batch.hints_at == h.tiers.moves());
  CHECK(fresh({}).empty());
  h.apply(1, range(100, 200));
  const Expiry since_second_update{AgeUnit::kSeconds, Harness::time_of(2), 0};
  CHECK(fresh(since_second_update).size() == 200);  // though none has moved
  h.create(1, range(1000, 1010));
  CHECK(batch.hints_at == h.tiers.moves());
  h.erase(1, range(10, 20));
  CHECK(fresh({}) == range(10, 20));
  h.create(1, range(10, 15));
  CHECK(fresh({}) == range(15, 20));
  batch = looked_up();
  CHECK(fresh({}) == range(15, 20));
  for (uint64_t i = 0; h.tiers.stats().evicted < 30000; ++i) h.apply(1, range(10000 + i * 1000, 11000 + i * 1000));
  CHECK(fresh({}) == range(15, 20));
}

TEST_CASE("tiers: an operation with a number a row has seen already changes nothing: redo may repeat itself") {
  Harness h;
  h.apply(1, range(0, 100));
  h.apply(1, range(50, 150));
  const Model before = h.model;
  for (const uint64_t number : {1, 2}) {
    const std::vector<uint64_t> keys = number == 1 ? range(0, 100) : range(50, 150);
    const Batch batch(keys, std::nullopt);
    std::vector<uint32_t> rows(keys.size());
    std::iota(rows.begin(), rows.end(), 0u);
    const std::vector<float> sums(keys.size() * 4, 1.0f);
    const Tiers::Prepared prepared = h.tiers.prepare(h.small, Expiry{}, batch, rows, true);
    CHECK(prepared.fresh.empty());
    h.tiers.create_rows(h.small, batch, prepared, number, 0, 5);
    h.tiers.apply(h.small, batch, rows, prepared, *h.small.optimizer, h.small.optimizer->numbers(1, 1), sums.data(),
                  number, 1, 5);
    h.tiers.erase(rows, prepared, number);
  }
  CHECK(h.lookups_agree(1, range(0, 200), false));
  const auto [model, snapshot] = h.cut();
  CHECK(h.snapshot_is(*snapshot, before));
}

TEST_CASE("tiers: lookups beside operations, evictions and cuts see each row at one moment") {
  Harness h(kMemory, 3);
  h.tiers.presence().set_complete();
  // All weights of a row of table 1 start alike and get the same gradient, so they are equal at every moment.
  TableSpec spec = spec_of(1, 4);
  spec.initializer = "constant";
  spec.initializer_settings = {{"value", 0.25}};
  const TableShape same(spec);
  std::atomic<bool> stop{false};
  std::atomic<int> torn{0}, rounds{0};
  std::thread trainer([&] {
    std::mt19937_64 random(3);
    for (int i = 0; i < 80; ++i) {
      const std::vector<uint64_t> keys = some_of(20000, 1000, random);
      const Batch batch(keys, std::nullopt);
      std::vector<uint32_t> rows(keys.size());
      std::iota(rows.begin(), rows.end(), 0u);
      std::vector<float> sums(keys.size() * 4);
      for (size_t j = 0; j < sums.size(); ++j) sums[j] = static_cast<float>(j / 4 % 17 + 1);
      h.tiers.wait_for_cut_memory();
      const std::lock_guard lock(h.order);
      const Tiers::Prepared prepared = h.tiers.prepare(same, Expiry{}, batch, rows, true);
      const uint64_t number = ++h.sequence;
      h.tiers.create_rows(same, batch, prepared, number, 0, 0);
      h.tiers.apply(same, batch, rows, prepared, *same.optimizer, same.optimizer->numbers(0.1, number), sums.data(),
                    number, number, 0);
    }
    stop = true;
  });
  std::thread cutter([&] {
    while (!stop) h.cut();
  });
  std::vector<std::thread> readers;
  for (int t = 0; t < 2; ++t) {
    readers.emplace_back([&, t] {
      std::mt19937_64 random(static_cast<uint64_t>(t) + 10);
      while (!stop) {
        const std::vector<uint64_t> keys = some_of(20000, 500, random);
        Batch batch(keys, std::nullopt);
        std::vector<float> out(keys.size() * 4, 0.0f);
        Tiers::HotRead read =
            h.tiers.read_hot(same, Expiry{}, batch, ShardOrder(batch, h.tiers.hot()), out.data(), true);
        h.tiers.bring_in(same, Expiry{}, batch, read.missing, out.data());
        for (size_t p = 0; p < keys.size(); ++p)
          for (size_t d = 1; d < 4; ++d) torn += out[p * 4 + d] != out[p * 4];
        ++rounds;
      }
    });
  }
  trainer.join();
  cutter.join();
  for (std::thread& reader : readers) reader.join();
  CHECK(torn == 0);
  CHECK(rounds > 2);
}

TEST_CASE("tiers: a row that changed and left while a lookup read it from disk is read again") {
  Harness h(kMemory / 2);
  h.apply(1, range(0, 100));
  for (uint64_t i = 0; i < 20; ++i) h.apply(1, range(10000 + i * 1000, 11000 + i * 1000));
  h.cut();
  bool once = false;
  h.store.after_read = [&] {
    if (std::exchange(once, true)) return;
    h.apply(1, range(0, 100));
    for (uint64_t i = 0; i < 20; ++i) h.apply(1, range(40000 + i * 1000, 41000 + i * 1000));
  };
  const bool agree = h.lookups_agree(1, range(0, 100), true);
  h.store.after_read = nullptr;
  CHECK(once);
  CHECK(agree);
}

// For ThreadSanitizer: nothing but the tiers' own locks orders the lookup's thread before the eviction's.
TEST_CASE("tiers: an eviction does not look at what a lookup writes into its slots") {
  Harness h(kMemory / 2);
  h.apply(1, range(0, 100));
  for (uint64_t i = 0; i < 20; ++i) h.apply(1, range(10000 + i * 1000, 11000 + i * 1000));
  std::atomic<bool> filled{false}, evicted{false};
  const std::thread::id trainer = std::this_thread::get_id();
  h.store.after_read = [&] {
    if (std::this_thread::get_id() == trainer) return;
    filled.store(true, std::memory_order_relaxed);
    while (!evicted.load(std::memory_order_relaxed)) std::this_thread::yield();
  };
  std::thread lookup([&] {
    Batch batch(range(0, 100), std::nullopt);
    std::vector<uint32_t> rows(batch.num_rows());
    std::iota(rows.begin(), rows.end(), 0u);
    h.tiers.bring_in(h.small, Expiry{}, batch, rows, nullptr);
  });
  while (!filled.load(std::memory_order_relaxed)) std::this_thread::yield();
  const uint64_t before = h.tiers.stats().evicted;
  for (uint64_t i = 0; i < 20; ++i) h.apply(1, range(40000 + i * 1000, 41000 + i * 1000));
  CHECK(h.tiers.stats().evicted > before + 10000);
  evicted.store(true, std::memory_order_relaxed);
  lookup.join();
  h.store.after_read = nullptr;
  CHECK(h.lookups_agree(1, range(0, 100), true));
}

TEST_CASE("tiers: a row that was erased and left while a lookup read it is absent") {
  Harness h(kMemory / 2);
  h.apply(1, range(0, 100));
  for (uint64_t i = 0; i < 20; ++i) h.apply(1, range(10000 + i * 1000, 11000 + i * 1000));
  h.cut();
  bool once = false;
  h.store.after_read = [&] {
    if (std::exchange(once, true)) return;
    h.erase(1, range(0, 100));
    for (uint64_t i = 0; i < 20; ++i) h.apply(1, range(40000 + i * 1000, 41000 + i * 1000));
  };
  const bool agree = h.lookups_agree(1, range(0, 100), true);
  h.store.after_read = nullptr;
  CHECK(once);
  CHECK(agree);
}

TEST_CASE("tiers: with a complete filter a new key costs no read") {
  Harness h;
  h.tiers.presence().set_complete();
  h.apply(1, range(0, 500));
  CHECK(h.store.keys_asked < 50);
  h.store.keys_asked = 0;
  h.lookups_agree(1, range(1000, 2000), false);
  CHECK(h.store.keys_asked < 50);
}

TEST_CASE("tiers: rows of one size make room for another size that comes late") {
  Harness h;
  h.tiers.presence().set_complete();
  for (uint64_t i = 0; i < 20; ++i) h.apply(1, range(i * 1000, i * 1000 + 1000));
  for (uint64_t i = 0; i < 20; ++i) h.apply(2, range(i * 200, i * 200 + 200));
  CHECK(h.lookups_agree(1, range(0, 20000), false));
  CHECK(h.lookups_agree(2, range(0, 4000), false));
}

TEST_CASE("tiers: the rows that are looked up again and again stay while others pass by once") {
  Harness h;
  h.tiers.presence().set_complete();
  const std::vector<uint64_t> favourites = range(0, 500);
  h.apply(1, favourites);
  for (uint64_t i = 0; i < 60; ++i) {
    for (int again = 0; again < 2; ++again) h.lookups_agree(1, favourites, true);
    h.apply(1, range(10000 + i * 500, 10500 + i * 500));
  }
  Batch batch(favourites, std::nullopt);
  const auto read = h.tiers.read_hot(h.small, Expiry{}, batch, ShardOrder(batch, h.tiers.hot()), nullptr, false);
  CHECK(h.tiers.stats().evicted > 5000);
  CHECK(read.missing.size() < 50);
}

TEST_CASE("tiers: whoever waits for memory is told when it is closed") {
  Harness h;
  h.apply(1, range(0, 2000));
  h.tiers.stop();
  CHECK_THROWS_AS(
      [&] {
        for (uint64_t i = 0; i < 100; ++i) h.apply(1, range(5000 + i * 1000, 6000 + i * 1000));
      }(),
      ClosedError);
}

}  // namespace
}  // namespace damo
