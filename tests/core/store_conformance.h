// SPDX-License-Identifier: Apache-2.0
//
// The contract of store.h as tests. Included once by each store's test file,
// after these two lines (so there is no include guard):
//   #define STORE_NAME "memory store"
//   #define OPEN_STORE open_memory_store
#include <doctest/doctest.h>

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "error.h"
#include "file.h"
#include "store.h"
#include "temporary_directory.h"

namespace damo {
namespace {

using testing::TemporaryDirectory;
using Entries = std::map<StoredKey, std::string>;

// Key i of table 7; the mix spreads them as real keys are spread.
StoredKey key_of(uint64_t i) { return StoredKey::make(7, mix_key(i)); }

std::string bytes_for(uint64_t i, uint64_t generation = 0, size_t size = 100) {
  std::mt19937_64 random(i * 1000003 + generation);
  std::string value(size, '\0');
  for (char& c : value) c = static_cast<char>(random());
  return value;
}

Bytes span_of(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }
std::string text_of(Bytes bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }

StoreOptions options_for(const std::filesystem::path& directory) {
  StoreOptions options;
  options.directory = directory;
  options.cache_bytes = 4 << 20;
  options.write_bytes = 4 << 20;
  options.read_threads = 4;
  return options;
}

// Absent: erased.
using Changes = std::map<StoredKey, std::optional<std::string>>;

void commit(Store& store, const Changes& changes) {
  const auto writer = store.begin_write();
  for (const auto& [key, value] : changes) {
    if (value) {
      writer->put(key, span_of(*value));
    } else {
      writer->erase(key);
    }
  }
  writer->commit();
}

Changes numbered(uint64_t first, uint64_t last, uint64_t generation = 0, size_t size = 100) {
  Changes changes;
  for (uint64_t i = first; i < last; ++i) changes[key_of(i)] = bytes_for(i, generation, size);
  return changes;
}

std::vector<StoredKey> sorted_keys(uint64_t first, uint64_t last) {
  std::set<StoredKey> keys;
  for (uint64_t i = first; i < last; ++i) keys.insert(key_of(i));
  return {keys.begin(), keys.end()};
}

Entries read(const Store& store, const std::vector<StoredKey>& keys) {
  Entries found;
  std::mutex mutex;
  store.multi_get(keys, [&](size_t index, Bytes value) {
    const std::lock_guard lock(mutex);
    REQUIRE(index < keys.size());
    const bool is_first = found.emplace(keys[index], text_of(value)).second;
    REQUIRE(is_first);  // never twice for one index
  });
  return found;
}

Entries scan(const StoreSnapshot& snapshot, const StoredKey& first = StoredKey{},
             const std::optional<StoredKey>& last = std::nullopt) {
  Entries entries;
  const auto iterator = snapshot.scan(first, last);
  bool in_order = true;
  while (iterator->next()) {
    if (!entries.empty() && iterator->key() <= entries.rbegin()->first) in_order = false;
    entries[iterator->key()] = text_of(iterator->value());
  }
  CHECK(in_order);
  const bool end_stays_end = !iterator->next();
  CHECK(end_stays_end);
  return entries;
}

void apply_to(Entries& model, const Changes& changes) {
  for (const auto& [key, value] : changes) {
    if (value) {
      model[key] = *value;
    } else {
      model.erase(key);
    }
  }
}

struct Fixture {
  TemporaryDirectory directory;
  std::unique_ptr<Store> store = OPEN_STORE(options_for(directory / "store"));
};

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": a new store is empty") {
  CHECK(read(*store, sorted_keys(0, 100)).empty());
  CHECK(scan(*store->snapshot()).empty());
  CHECK(read(*store, {}).empty());
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": what was committed is read back, bit by bit") {
  Changes changes = numbered(0, 300);
  changes[key_of(1000)] = "";
  changes[key_of(1001)] = bytes_for(1001, 0, 1);
  changes[key_of(1002)] = bytes_for(1002, 0, 300'000);
  changes[StoredKey::make(0, 0)] = "first key there is";
  changes[StoredKey::make(UINT32_MAX, UINT64_MAX)] = "last key there is";
  commit(*store, changes);

  Entries expected;
  apply_to(expected, changes);
  std::vector<StoredKey> keys;
  for (const auto& [key, value] : expected) keys.push_back(key);
  CHECK(read(*store, keys) == expected);
  CHECK(scan(*store->snapshot()) == expected);
  for (const StoredKey& key : {keys.front(), key_of(1002), keys.back()})
    CHECK(read(*store, {key}).at(key) == expected.at(key));
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": a large batch finds each present key once, and no other") {
  commit(*store, numbered(0, 3000));
  const Entries found = read(*store, sorted_keys(1000, 6000));
  CHECK(found.size() == 2000);
  for (uint64_t i = 1000; i < 3000; ++i) REQUIRE(found.at(key_of(i)) == bytes_for(i));
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": later batches replace and erase") {
  commit(*store, numbered(0, 100));
  Changes second;
  second[key_of(5)] = bytes_for(5, 1);
  second[key_of(6)] = std::nullopt;
  second[key_of(500)] = std::nullopt;  // was never there
  commit(*store, second);
  Entries now = read(*store, sorted_keys(0, 600));
  CHECK(now.size() == 99);
  CHECK(now.at(key_of(5)) == bytes_for(5, 1));
  CHECK(now.at(key_of(7)) == bytes_for(7));
  CHECK_FALSE(now.contains(key_of(6)));
  commit(*store, {{key_of(6), bytes_for(6, 2)}});
  CHECK(read(*store, {key_of(6)}).at(key_of(6)) == bytes_for(6, 2));
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": nothing of a batch is seen before commit, nor after a writer was dropped") {
  commit(*store, numbered(0, 10));
  auto writer = store->begin_write();
  const std::vector<StoredKey> keys = sorted_keys(0, 20);
  for (const StoredKey& key : keys) writer->put(key, span_of("new"));
  CHECK(read(*store, keys).size() == 10);
  CHECK(scan(*store->snapshot()).size() == 10);
  writer.reset();
  CHECK(read(*store, keys).size() == 10);
  CHECK(read(*store, keys).at(key_of(3)) == bytes_for(3));
  CHECK(store->stats().commits == 1);
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": an empty batch does nothing") {
  store->begin_write()->commit();
  CHECK(store->stats().commits == 0);
  CHECK(store->stats().files == 0);
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": keys out of order are the caller's mistake and change nothing") {
  commit(*store, numbered(0, 10));
  const std::vector<StoredKey> keys = sorted_keys(0, 10);
  const auto never = [](size_t, Bytes) { FAIL("nothing may be read"); };
  CHECK_THROWS_AS(store->multi_get(std::vector{keys[1], keys[0]}, never), std::invalid_argument);
  CHECK_THROWS_AS(store->multi_get(std::vector{keys[0], keys[0]}, never), std::invalid_argument);

  const auto writer = store->begin_write();
  writer->put(keys[4], span_of("new"));
  CHECK_THROWS_AS(writer->put(keys[4], span_of("again")), std::invalid_argument);
  CHECK_THROWS_AS(writer->erase(keys[4]), std::invalid_argument);
  CHECK_THROWS_AS(writer->put(keys[3], span_of("before")), std::invalid_argument);
  CHECK_THROWS_AS(writer->erase(keys[3]), std::invalid_argument);
  writer->erase(keys[5]);
  CHECK_THROWS_AS(writer->put(keys[5], span_of("after an erase")), std::invalid_argument);
  writer->commit();
  CHECK_THROWS_AS(writer->commit(), std::invalid_argument);
  CHECK_THROWS_AS(writer->put(keys[9], span_of("late")), std::invalid_argument);
  const Entries now = read(*store, keys);
  CHECK(now.size() == 9);
  CHECK(now.at(keys[4]) == "new");
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": a scan takes first and leaves out last") {
  Changes changes;
  for (uint32_t table = 1; table <= 3; ++table) {
    for (uint64_t i = 0; i < 50; ++i) changes[StoredKey::make(table, i * 10)] = bytes_for(i, table);
  }
  commit(*store, changes);
  const auto snapshot = store->snapshot();
  CHECK(scan(*snapshot).size() == 150);
  CHECK(scan(*snapshot, StoredKey::make(2, 0), StoredKey::make(3, 0)).size() == 50);
  CHECK(scan(*snapshot, StoredKey::make(2, 100), StoredKey::make(2, 200)).size() == 10);
  CHECK(scan(*snapshot, StoredKey::make(2, 95), StoredKey::make(2, 201)).size() == 11);
  CHECK(scan(*snapshot, StoredKey::make(3, 480)).size() == 2);
  CHECK(scan(*snapshot, StoredKey::make(4, 0)).empty());
  CHECK(scan(*snapshot, StoredKey::make(2, 0), StoredKey::make(2, 0)).empty());
  CHECK(scan(*snapshot, StoredKey::make(3, 0), StoredKey::make(2, 0)).empty());
  const Entries part = scan(*snapshot, StoredKey::make(1, 10), StoredKey::make(1, 11));
  CHECK(part == Entries{{StoredKey::make(1, 10), bytes_for(1, 1)}});
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": a snapshot stays what it was under later batches") {
  // The first one of the empty store; the second one of a single batch.
  std::vector<std::shared_ptr<const StoreSnapshot>> snapshots{store->snapshot()};
  std::vector<Entries> expected(1);
  Entries model;
  for (uint64_t generation = 0; generation < 12; ++generation) {
    Changes changes = numbered(generation * 20, generation * 20 + 100, generation);
    changes[key_of(generation * 20)] = std::nullopt;
    commit(*store, changes);
    apply_to(model, changes);
    snapshots.push_back(store->snapshot());
    expected.push_back(model);
  }
  for (size_t i = 0; i < snapshots.size(); ++i) CHECK(scan(*snapshots[i]) == expected[i]);
  // In any order of release.
  for (size_t i = 0; i < snapshots.size(); i += 2) snapshots[i].reset();
  commit(*store, numbered(0, 400, 99));
  for (size_t i = 1; i < snapshots.size(); i += 2) CHECK(scan(*snapshots[i]) == expected[i]);
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": an iterator holds its moment after its snapshot was let go") {
  commit(*store, numbered(0, 200));
  auto iterator = store->snapshot()->scan(StoredKey{}, std::nullopt);
  REQUIRE(iterator->next());
  commit(*store, numbered(0, 200, 1));
  size_t count = 1;
  std::set<std::string> seen{text_of(iterator->value())};
  for (; iterator->next(); ++count) seen.insert(text_of(iterator->value()));
  CHECK(count == 200);
  for (uint64_t i = 0; i < 200; ++i) REQUIRE(seen.contains(bytes_for(i)));
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": an exception of the caller's comes out of multi_get, and the store goes on") {
  commit(*store, numbered(0, 2000));
  const std::vector<StoredKey> keys = sorted_keys(0, 2000);
  for (const size_t bad : {size_t{0}, size_t{999}, size_t{1999}}) {
    CHECK_THROWS_WITH_AS(store->multi_get(keys,
                                          [&](size_t index, Bytes) {
                                            if (index == bad) throw std::domain_error("not this one");
                                          }),
                         "not this one", std::domain_error);
  }
  CHECK(read(*store, keys).size() == 2000);
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": readers beside a writer see each batch whole") {
  constexpr uint64_t kKeys = 500;
  const auto batch = [](uint64_t generation) {
    Changes changes;
    for (uint64_t i = 0; i < kKeys; ++i) changes[key_of(i)] = std::to_string(generation);
    return changes;
  };
  commit(*store, batch(0));
  const std::vector<StoredKey> keys = sorted_keys(0, kKeys);
  std::atomic<bool> done{false};
  std::atomic<int> torn{0}, backwards{0};
  std::vector<std::thread> readers;
  for (int reader = 0; reader < 2; ++reader) {
    readers.emplace_back([&, reader] {
      uint64_t last = 0;
      while (!done) {
        std::set<std::string> seen;
        std::mutex mutex;
        size_t count = 0;
        const auto note = [&](Bytes value) {
          const std::lock_guard lock(mutex);
          ++count;
          seen.insert(text_of(value));
        };
        if (reader == 0) {
          store->multi_get(keys, [&](size_t, Bytes value) { note(value); });
        } else {
          const auto iterator = store->snapshot()->scan(StoredKey{}, std::nullopt);
          while (iterator->next()) note(iterator->value());
        }
        if (seen.size() != 1 || count != kKeys) {
          ++torn;
          continue;
        }
        const uint64_t now = std::stoull(*seen.begin());
        if (now < last) ++backwards;
        last = now;
      }
    });
  }
  for (uint64_t generation = 1; generation <= 40; ++generation) commit(*store, batch(generation));
  done = true;
  for (std::thread& thread : readers) thread.join();
  CHECK(torn == 0);
  CHECK(backwards == 0);
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": a linked copy opens as what the store was and shares no later change") {
  Entries model;
  for (uint64_t generation = 0; generation < 3; ++generation) {
    const Changes changes = numbered(generation * 100, generation * 100 + 300, generation);
    commit(*store, changes);
    apply_to(model, changes);
  }
  const auto to = directory / "copy";
  const std::vector<LinkedFile> files = store->link_into(to);

  // The list is the directory, with lengths and sums.
  std::set<std::string> listed;
  for (const LinkedFile& file : files) {
    CHECK(listed.insert(file.name).second);
    CHECK(std::filesystem::file_size(to / file.name) == file.bytes);
    CHECK(crc32c_of_file(to / file.name) == file.crc32c);
  }
  std::set<std::string> present;
  for (const auto& entry : std::filesystem::directory_iterator(to)) present.insert(entry.path().filename().string());
  CHECK(present == listed);

  for (uint64_t generation = 10; generation < 20; ++generation) commit(*store, numbered(0, 600, generation));
  commit(*store, {{key_of(1), std::nullopt}});
  for (const LinkedFile& file : files) CHECK(crc32c_of_file(to / file.name) == file.crc32c);
  {
    const auto copy = OPEN_STORE(options_for(to));
    CHECK(scan(*copy->snapshot()) == model);
    const std::vector<StoredKey> keys = sorted_keys(0, 700);
    CHECK(read(*copy, keys) == model);
    // And the other way round.
    commit(*copy, numbered(0, 600, 77));
    CHECK(read(*store, {key_of(2)}).at(key_of(2)) == bytes_for(2, 19));
    CHECK(read(*copy, {key_of(2)}).at(key_of(2)) == bytes_for(2, 77));
  }
  CHECK(scan(*store->snapshot()).size() == 599);
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": an empty store is copied, too") {
  store->link_into(directory / "copy");
  const auto copy = OPEN_STORE(options_for(directory / "copy"));
  CHECK(scan(*copy->snapshot()).empty());
  commit(*copy, numbered(0, 10));
  CHECK(scan(*copy->snapshot()).size() == 10);
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": a copy into a directory that exists, or under one that does not, is refused") {
  commit(*store, numbered(0, 10));
  std::filesystem::create_directory(directory / "there");
  write_file_atomically(directory / "there" / "file", "mine");
  CHECK_THROWS_AS(store->link_into(directory / "there"), StorageError);
  CHECK(read_file(directory / "there" / "file", 10) == "mine");
  CHECK_THROWS_AS(store->link_into(directory / "absent" / "copy"), StorageError);
  CHECK_FALSE(std::filesystem::exists(directory / "absent"));
  store->link_into(directory / "copy");
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": a read-only store reads and refuses writes") {
  commit(*store, numbered(0, 100));
  store->link_into(directory / "copy");
  StoreOptions options = options_for(directory / "copy");
  options.read_only = true;
  const auto copy = OPEN_STORE(options);
  CHECK(read(*copy, sorted_keys(0, 200)).size() == 100);
  CHECK(scan(*copy->snapshot()).size() == 100);
  CHECK_THROWS_AS(copy->begin_write(), StorageError);
  CHECK(read(*copy, sorted_keys(0, 200)).size() == 100);
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": after close every call throws ClosedError, and what is still held may go") {
  commit(*store, numbered(0, 100));
  auto writer = store->begin_write();
  writer->put(key_of(1), span_of("x"));
  auto snapshot = store->snapshot();
  auto iterator = snapshot->scan(StoredKey{}, std::nullopt);
  REQUIRE(iterator->next());
  auto fresh = snapshot->scan(StoredKey{}, std::nullopt);

  store->close();
  store->close();
  CHECK_THROWS_AS(read(*store, {key_of(1)}), ClosedError);
  CHECK_THROWS_AS(read(*store, {}), ClosedError);
  CHECK_THROWS_AS(store->begin_write(), ClosedError);
  CHECK_THROWS_AS(store->snapshot(), ClosedError);
  CHECK_THROWS_AS(store->stats(), ClosedError);
  CHECK_THROWS_AS(store->link_into(directory / "copy"), ClosedError);
  CHECK_FALSE(std::filesystem::exists(directory / "copy"));
  CHECK_THROWS_AS(writer->put(StoredKey::make(UINT32_MAX, 0), span_of("x")), ClosedError);
  CHECK_THROWS_AS(writer->erase(StoredKey::make(UINT32_MAX, 0)), ClosedError);
  CHECK_THROWS_AS(writer->commit(), ClosedError);
  CHECK_THROWS_AS(snapshot->scan(StoredKey{}, std::nullopt), ClosedError);
  CHECK_THROWS_AS(iterator->next(), ClosedError);
  CHECK_THROWS_AS(fresh->next(), ClosedError);
  SUBCASE("before the store") {
    iterator.reset();
    fresh.reset();
    snapshot.reset();
    writer.reset();
    store.reset();
  }
  SUBCASE("after the store") {
    store.reset();
    snapshot.reset();
    CHECK_THROWS_AS(iterator->next(), ClosedError);
    CHECK_THROWS_AS(writer->commit(), ClosedError);
  }
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": close beside readers and a writer ends them with ClosedError") {
  commit(*store, numbered(0, 500));
  const std::vector<StoredKey> keys = sorted_keys(0, 500);
  std::atomic<int> closed{0}, others{0}, running{0};
  const auto until_closed = [&](const std::function<void()>& call) {
    ++running;
    try {
      for (;;) call();
    } catch (const ClosedError&) {
      ++closed;
    } catch (...) {
      ++others;
    }
  };
  std::vector<std::thread> threads;
  threads.emplace_back([&] { until_closed([&] { store->multi_get(keys, [](size_t, Bytes) {}); }); });
  threads.emplace_back([&] { until_closed([&] { scan(*store->snapshot()); }); });
  threads.emplace_back([&] { until_closed([&] { commit(*store, numbered(0, 50, 1)); }); });
  while (running < 3) std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  store->close();
  for (std::thread& thread : threads) thread.join();
  CHECK(closed == 3);
  CHECK(others == 0);
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": stats count keys, bytes and batches") {
  commit(*store, numbered(0, 100));
  commit(*store, {{key_of(1), std::nullopt}, {key_of(2), "ab"}});
  read(*store, sorted_keys(0, 200));
  read(*store, {key_of(1)});
  const StoreStats stats = store->stats();
  CHECK(stats.commits == 2);
  CHECK(stats.keys_written == 102);
  CHECK(stats.bytes_written == 102 * StoredKey::kBytes + 100 * 100 + 2);
  CHECK(stats.keys_read == 201);
  CHECK(stats.keys_found == 99);
}

TEST_CASE_FIXTURE(Fixture, STORE_NAME ": does as a std::map does, over random batches, reads, scans and snapshots") {
  for (uint64_t seed = 0; seed < 3; ++seed) {
    CAPTURE(seed);
    std::mt19937_64 random(seed);
    const auto path = directory / ("model" + std::to_string(seed));
    auto tested = OPEN_STORE(options_for(path));
    Entries model;
    std::vector<std::pair<std::shared_ptr<const StoreSnapshot>, Entries>> held;
    const auto random_key = [&] {
      return StoredKey::make(static_cast<uint32_t>(random() % 3), mix_key(random() % 400));
    };
    for (int step = 0; step < 150; ++step) {
      CAPTURE(step);
      switch (random() % 6) {
        case 0:
        case 1: {
          Changes changes;
          for (uint64_t left = random() % 120; left > 0; --left) {
            auto& change = changes[random_key()];
            if (random() % 4 != 0) change = bytes_for(random(), 0, random() % 300);
          }
          commit(*tested, changes);
          apply_to(model, changes);
          break;
        }
        case 2:
        case 3: {
          std::set<StoredKey> keys;
          for (uint64_t left = random() % 200; left > 0; --left) keys.insert(random_key());
          Entries expected;
          for (const StoredKey& key : keys) {
            if (const auto entry = model.find(key); entry != model.end()) expected.insert(*entry);
          }
          REQUIRE(read(*tested, {keys.begin(), keys.end()}) == expected);
          break;
        }
        case 4: {
          const StoredKey first = random_key(), last = random_key();
          const Entries found = scan(*tested->snapshot(), first, last);
          if (last <= first) {
            REQUIRE(found.empty());
          } else {
            REQUIRE(found == Entries(model.lower_bound(first), model.lower_bound(last)));
          }
          break;
        }
        case 5:
          if (held.size() < 3) {
            held.emplace_back(tested->snapshot(), model);
          } else {
            const size_t which = random() % held.size();
            REQUIRE(scan(*held[which].first) == held[which].second);
            held.erase(held.begin() + static_cast<std::ptrdiff_t>(which));
          }
          break;
      }
    }
    REQUIRE(scan(*tested->snapshot()) == model);
  }
}

}  // namespace
}  // namespace damo
