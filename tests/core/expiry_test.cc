// SPDX-License-Identifier: Apache-2.0
//
// What goes away: expired rows, erased groups, and what is forgotten to keep within the disk.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "storage.h"
#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;
using testing::TemporaryDirectory;

constexpr Lifetime kMinute{AgeUnit::kSeconds, 60};

StorageOptions options(std::optional<Lifetime> lifetime = std::nullopt) {
  StorageOptions options;
  options.memory_bytes = kMinMemoryBytes;
  options.threads = 2;
  options.lifetime = lifetime;
  return options;
}

std::unique_ptr<Storage> open(const fs::path& path, const StorageOptions& given) {
  return Storage::open(path, given, OpenMode::kOpenOrCreate);
}

TableSpec spec_of(uint32_t group, uint32_t dimension = 4) {
  TableSpec spec;
  spec.group = group;
  spec.dimension = dimension;
  spec.optimizer = "sgd";
  spec.optimizer_settings = {{"lr", 1.0}};
  spec.initializer = "zeros";
  return spec;
}

void add(Table& table, const std::vector<uint64_t>& keys, float gradient = -1) {
  const std::vector<float> gradients(keys.size() * table.spec().dimension, gradient);
  table.apply_gradients(keys, gradients.data(), std::nullopt);
}

std::vector<uint64_t> range(uint64_t first, uint64_t last) {
  std::vector<uint64_t> keys;
  for (uint64_t key = first; key < last; ++key) keys.push_back(key);
  return keys;
}

// The first weight of each key, without inserting.
std::vector<float> peek(Table& table, const std::vector<uint64_t>& keys) {
  const size_t dimension = table.spec().dimension;
  std::vector<float> out(keys.size() * dimension), first;
  table.lookup(keys, out.data(), false, false, std::nullopt);
  for (size_t i = 0; i < keys.size(); ++i) first.push_back(out[i * dimension]);
  return first;
}

std::map<uint64_t, uint32_t> counts_of(Table& table) {
  std::map<uint64_t, uint32_t> counts;
  const auto scan = table.scan();
  std::vector<uint64_t> keys(1000);
  std::vector<float> floats(1000 * scan->num_floats());
  std::vector<uint32_t> updates(1000);
  std::vector<int64_t> times(1000);
  while (const size_t got = scan->next(1000, keys.data(), floats.data(), updates.data(), times.data()))
    for (size_t i = 0; i < got; ++i) counts[keys[i]] = updates[i];
  return counts;
}

bool contains(Table& table, uint64_t key) {
  bool found = false;
  table.contains({&key, 1}, &found);
  return found;
}

TEST_CASE("expiry: a row is gone everywhere the second it expires, in memory and on disk, and comes back as new") {
  for (const bool on_disk : {false, true}) {
    CAPTURE(on_disk);
    const TemporaryDirectory directory;
    auto storage = open(directory / "s", options(kMinute));
    storage->set_now(1000);
    Table* table = &storage->table(spec_of(0));
    add(*table, {1, 2});
    storage->set_now(1030);
    add(*table, {2, 3});
    if (on_disk) {
      storage.reset();
      storage = open(directory / "s", options());
      table = &storage->table(spec_of(0));
      storage->set_now(1030);
    }
    CHECK(peek(*table, {1, 2, 3}) == std::vector<float>{1, 2, 1});
    storage->set_now(1060);
    CHECK(table->size() == 3);
    CHECK(contains(*table, 1));
    storage->set_now(1061);
    CHECK(table->size() == 2);
    CHECK_FALSE(contains(*table, 1));
    CHECK_FALSE(table->inspect(1).has_value());
    CHECK(peek(*table, {1, 2, 3}) == std::vector<float>{0, 2, 1});
    CHECK(counts_of(*table) == std::map<uint64_t, uint32_t>{{2, 2}, {3, 1}});
    CHECK(storage->dump(directory / "dump", {}) == 2);
    CHECK(table->erase(std::vector<uint64_t>{1}) == 0);
    // Back as new, by an update and by a lookup.
    add(*table, {1}, -5);
    CHECK(table->inspect(1)->update_count == 1);
    CHECK(peek(*table, {1}) == std::vector<float>{5});
    storage->set_now(1091);
    CHECK(table->size() == 1);
    std::vector<float> out(8);
    table->lookup(std::vector<uint64_t>{2, 1}, out.data(), true, false, std::nullopt);
    CHECK(out[0] == 0);
    CHECK(out[4] == 5);
    CHECK(table->size() == 2);
    CHECK(table->inspect(2)->update_count == 0);
    CHECK(table->inspect(2)->time == 1091);
  }
}

TEST_CASE("expiry: a lookup does not prolong a life, an update does") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s", options(kMinute));
  Table& table = storage->table(spec_of(0));
  storage->set_now(1000);
  add(table, {1, 2});
  storage->set_now(1050);
  std::vector<float> out(4);
  table.lookup(std::vector<uint64_t>{1}, out.data(), true, false, std::nullopt);
  add(table, {2});
  storage->set_now(1070);
  CHECK_FALSE(contains(table, 1));
  CHECK(contains(table, 2));
}

TEST_CASE("expiry: by steps, rows go that the last n updates of the group had no part in") {
  const TemporaryDirectory directory;
  auto storage = open(directory / "s", options());
  Table* table = &storage->table(spec_of(0), Lifetime{AgeUnit::kSteps, 3});
  add(*table, {1, 2});  // step 1
  for (int i = 0; i < 3; ++i) add(*table, {2});
  CHECK(contains(*table, 1));
  add(*table, {2});  // step 5: four since
  CHECK_FALSE(contains(*table, 1));
  CHECK(table->size() == 1);
  storage.reset();
  storage = open(directory / "s", options());
  table = &storage->table(spec_of(0));
  CHECK(table->spec().lifetime == Lifetime{AgeUnit::kSteps, 3});
  CHECK_FALSE(contains(*table, 1));
  CHECK(table->size() == 1);
}

TEST_CASE(
    "expiry: len, rows and scans agree with a model, through evictions, erases, reopening and changes of the ttl") {
  const TemporaryDirectory directory;
  std::mt19937_64 random(11);
  std::map<uint64_t, std::pair<int64_t, uint32_t>> model;  // last update, count
  int64_t now = 1000, ttl = 50;
  uint64_t evicted = 0;
  auto storage = open(directory / "s", options(Lifetime{AgeUnit::kSeconds, 50}));
  Table* table = &storage->table(spec_of(0, 256));
  const auto forget = [&] { std::erase_if(model, [&](const auto& row) { return now - row.second.first > ttl; }); };
  for (int round = 0; round < 35; ++round) {
    now += static_cast<int64_t>(random() % 10);
    storage->set_now(now);
    forget();
    std::vector<uint64_t> keys;
    for (int i = 0; i < 3000; ++i) keys.push_back(random() % 100'000);
    std::sort(keys.begin(), keys.end());
    keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
    if (random() % 4 == 0) {
      uint64_t expected = 0;
      for (const uint64_t key : keys) expected += model.erase(key);
      CHECK(table->erase(keys) == expected);
    } else {
      add(*table, keys);
      for (const uint64_t key : keys) model[key] = {now, model[key].second + 1};
    }
    CHECK(table->size() == model.size());
    if (round % 10 == 9) {
      std::map<uint64_t, uint32_t> expected;
      for (const auto& [key, row] : model) expected[key] = row.second;
      CHECK(counts_of(*table) == expected);
    }
    if (round % 15 == 14) {
      evicted += storage->stats().tiers.evicted;
      storage.reset();
      // What is gone stays gone, under a longer life too.
      ttl = round == 29 ? 120 : round == 44 ? 20 : ttl;
      storage = open(directory / "s", options(Lifetime{AgeUnit::kSeconds, static_cast<uint64_t>(ttl)}));
      storage->set_now(now);
      table = &storage->table(spec_of(0, 256));
      forget();
      CHECK(table->size() == model.size());
    }
  }
  CHECK(evicted > 0);
}

TEST_CASE("expiry: a ttl that is taken away brings nothing back") {
  const TemporaryDirectory directory;
  {
    const auto storage = open(directory / "s", options(kMinute));
    storage->set_now(1000);
    add(storage->table(spec_of(0)), {1});
    storage->set_now(2000);
    add(storage->table(spec_of(0)), {2});
  }
  const auto storage = open(directory / "s", options(Lifetime{}));
  Table& table = storage->table(spec_of(0));
  CHECK(counts_of(table) == std::map<uint64_t, uint32_t>{{2, 1}});
  CHECK(table.size() == 1);
  storage->set_now(1'000'000);
  CHECK(contains(table, 2));
}

TEST_CASE("expiry: a group's own ttl goes before the storage's") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s", options(kMinute));
  storage->set_now(1000);
  Table& usual = storage->table(spec_of(0));
  Table& never = storage->table(spec_of(1), Lifetime{});
  Table& longer = storage->table(spec_of(2), Lifetime{AgeUnit::kSeconds, 500});
  for (Table* table : {&usual, &never, &longer}) add(*table, {1});
  storage->set_now(1400);
  CHECK(usual.size() == 0);
  CHECK(never.size() == 1);
  CHECK(longer.size() == 1);
  storage->set_now(9000);
  CHECK(never.size() == 1);
  CHECK(longer.size() == 0);
  CHECK_THROWS_AS(storage->table(spec_of(2), kMinute), SchemaMismatchError);
}

TEST_CASE("expiry: a clock that runs back expires nothing and takes nothing back") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s", options(kMinute));
  Table& table = storage->table(spec_of(0));
  storage->set_now(1000);
  add(table, {1});
  storage->set_now(1061);
  add(table, {2});
  storage->set_now(10);
  CHECK(storage->now() == 1061);
  CHECK_FALSE(contains(table, 1));
  CHECK(contains(table, 2));
}

TEST_CASE("expiry: one jump of years expires nothing until it is confirmed") {
  const TemporaryDirectory directory;
  {
    const auto storage = open(directory / "s", options(kMinute));
    Table& table = storage->table(spec_of(0));
    storage->set_now(1'000'000);
    add(table, {1, 2});
    CHECK_THROWS_WITH_AS(storage->set_now(1'000'000 + kMaxClockStep + 1), doctest::Contains("expire(now="),
                         std::invalid_argument);
    CHECK(table.size() == 2);
  }
  // By the wall clock: it is fifty years later.
  const auto storage = open(directory / "s", options());
  Table& table = storage->table(spec_of(0));
  CHECK(table.size() == 2);
  CHECK(storage->stats().clock_held_seconds > kMaxClockStep);
  add(table, {1});
  CHECK(storage->now() == 1'000'000);
  CHECK(table.size() == 2);
  CHECK(storage->expire(std::nullopt) == 2);
  CHECK(table.size() == 0);
  CHECK(storage->stats().clock_held_seconds == 0);
  CHECK(storage->now() > 1'700'000'000);
}

TEST_CASE("expiry: the space of expired rows, and of a dropped group, comes back") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s", options(kMinute));
  storage->set_now(1000);
  Table &table = storage->table(spec_of(0, 64)), &other = storage->table(spec_of(1, 64));
  add(table, range(0, 20'000));
  add(other, range(0, 20'000));
  storage->compact();
  const uint64_t full = storage->stats().store.disk_bytes;
  storage->set_now(1050);
  add(other, range(0, 20'000));
  storage->set_now(1090);
  storage->compact();
  const uint64_t half = storage->stats().store.disk_bytes;
  CHECK(half < full * 6 / 10);
  CHECK(other.size() == 20'000);
  CHECK(peek(other, {7}) == std::vector<float>{2});
  storage->drop_group(1);
  storage->compact();
  CHECK(storage->stats().store.disk_bytes < full / 20);
}

TEST_CASE("expiry: an open scan sees what was alive when it began, whatever is compacted meanwhile") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s", options(kMinute));
  storage->set_now(1000);
  Table& table = storage->table(spec_of(0));
  add(table, range(0, 5000));
  const auto scan = table.scan();
  storage->set_now(2000);
  storage->compact();
  CHECK(table.size() == 0);
  std::vector<uint64_t> keys(6000);
  std::vector<float> floats(6000 * scan->num_floats());
  std::vector<uint32_t> updates(6000);
  std::vector<int64_t> times(6000);
  CHECK(scan->next(6000, keys.data(), floats.data(), updates.data(), times.data()) == 5000);
}

TEST_CASE("expiry: a restored checkpoint has the clock and the ages of its moment") {
  const TemporaryDirectory directory;
  {
    const auto storage = open(directory / "s", options(kMinute));
    storage->set_now(1000);
    Table& table = storage->table(spec_of(0));
    add(table, {1});
    storage->set_now(1061);
    add(table, {2});
    storage->checkpoint(directory / "c", 1, "");
    storage->set_now(5000);
    CHECK(table.size() == 0);
  }
  Storage::restore(directory / "c", directory / "s");
  const auto storage = open(directory / "s", options());
  storage->set_now(1100);
  Table& table = storage->table(spec_of(0));
  CHECK(counts_of(table) == std::map<uint64_t, uint32_t>{{2, 1}});
  CHECK(table.size() == 1);
}

TEST_CASE("expiry: a dropped group is gone over reopening; its Table throws, its number serves a new one") {
  const TemporaryDirectory directory;
  {
    const auto storage = open(directory / "s", options());
    Table &table = storage->table(spec_of(3)), &other = storage->table(spec_of(4));
    add(table, range(0, 100));
    add(other, {1});
    storage->drop_group(3);
    CHECK_THROWS_WITH_AS(table.size(), doctest::Contains("was dropped"), std::invalid_argument);
    CHECK_THROWS_AS(add(table, {1}), std::invalid_argument);
    CHECK_THROWS_AS(storage->drop_group(3), std::invalid_argument);
    Table& fresh = storage->table(spec_of(3, 8));
    CHECK(fresh.size() == 0);
    add(fresh, {5});
    CHECK(other.size() == 1);
  }
  const auto storage = open(directory / "s", options());
  CHECK(counts_of(storage->table(spec_of(3, 8))) == std::map<uint64_t, uint32_t>{{5, 1}});
  CHECK(storage->table(spec_of(4)).size() == 1);
}

TEST_CASE("expiry: a limit on disk is kept; the oldest and rarest rows go, and are counted") {
  const TemporaryDirectory directory;
  StorageOptions given = options();
  given.disk_bytes = size_t{64} << 20;
  given.log_bytes = size_t{4} << 20;
  const auto storage = open(directory / "s", given);
  Table& table = storage->table(spec_of(0, 64));
  const auto used = [&] {
    uint64_t bytes = 0;
    std::error_code gone;
    for (const auto& entry : fs::recursive_directory_iterator(directory / "s"))
      if (entry.is_regular_file()) bytes += std::max<uintmax_t>(entry.file_size(gone), 0) * (gone ? 0 : 1);
    return bytes;
  };
  uint64_t most = 0;
  const std::vector<uint64_t> popular = range(1'000'000'000, 1'000'000'500);
  for (uint64_t step = 0; step < 200; ++step) {
    add(table, range(step * 1000, step * 1000 + 1000));
    if (step % 10 == 0) add(table, popular);
    if (step % 2 == 0) {
      try {
        most = std::max(most, used());
      } catch (const fs::filesystem_error&) {
      }
    }
  }
  for (int i = 0; i < 300 && storage->stats().forgotten == 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(storage->stats().forgotten > 10'000);
  // The background may be in the middle of a batch.
  for (int i = 0; i < 500 && table.size() + storage->stats().forgotten != 200'500; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(table.size() + storage->stats().forgotten == 200'500);
  CHECK(most <= given.disk_bytes);
  std::vector<uint8_t> there(popular.size());
  table.contains(popular, reinterpret_cast<bool*>(there.data()));
  CHECK(std::count(there.begin(), there.end(), 1) == 500);
  CHECK(contains(table, 199'999));
  CHECK_FALSE(contains(table, 0));
}

TEST_CASE("import_rows: rows as given, over what was there, through redo and reopening; bad ones change nothing") {
  const TemporaryDirectory directory;
  {
    const auto storage = open(directory / "s", options());
    Table& table = storage->table(spec_of(0, 2));
    add(table, {1, 2});
    const std::vector<uint64_t> keys{2, 3};
    const std::vector<uint32_t> updates{7, 0};
    const std::vector<float> floats{20, 21, 30, 31};
    table.import_rows(keys, updates, floats.data());
    const std::vector<uint64_t> twice{4, 4};
    CHECK_THROWS_WITH_AS(table.import_rows(twice, updates, floats.data()), doctest::Contains("key 4 stands twice"),
                         std::invalid_argument);
    const std::vector<float> bad{1, 2, 3, std::numeric_limits<float>::infinity()};
    CHECK_THROWS_WITH_AS(table.import_rows(keys, updates, bad.data()), doctest::Contains("key 3"),
                         std::invalid_argument);
    CHECK(table.size() == 3);
    CHECK(peek(table, {1, 2, 3}) == std::vector<float>{1, 20, 30});
    storage->commit(1, "");
    fs::copy(directory / "s", directory / "killed", fs::copy_options::recursive);
  }
  for (const char* name : {"s", "killed"}) {
    const auto storage = open(directory / name, options());
    Table& table = storage->table(spec_of(0, 2));
    CHECK(table.size() == 3);
    CHECK(peek(table, {1, 2, 3}) == std::vector<float>{1, 20, 30});
    CHECK(table.inspect(2)->update_count == 7);
    CHECK(table.inspect(3)->update_count == 0);
  }
}

}  // namespace
}  // namespace damo
