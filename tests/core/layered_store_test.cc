// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>
#include <stdlib.h>

#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "error.h"
#include "store.h"
#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;
using testing::TemporaryDirectory;
using Entries = std::map<StoredKey, std::string>;
using Changes = std::map<StoredKey, std::optional<std::string>>;  // absent: erased

StoredKey key_of(uint64_t i) { return StoredKey::make(7, mix_key(i)); }
Bytes span_of(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }
std::string text_of(Bytes bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }

void write(StoreWriter& writer, const Changes& changes) {
  for (const auto& [key, value] : changes) {
    if (value)
      writer.put(key, span_of(*value));
    else
      writer.erase(key);
  }
}

void commit(Store& store, const Changes& changes) {
  const auto writer = store.begin_write();
  write(*writer, changes);
  writer->commit();
}

void apply_to(Entries& entries, const Changes& changes) {
  for (const auto& [key, value] : changes) {
    if (value)
      entries[key] = *value;
    else
      entries.erase(key);
  }
}

Entries scan(const StoreSnapshot& snapshot, const StoredKey& first = {}, std::optional<StoredKey> last = {}) {
  Entries entries;
  const auto entry = snapshot.scan(first, last);
  while (entry->next()) {
    if (!entries.empty()) REQUIRE(entries.rbegin()->first < entry->key());
    entries[entry->key()] = text_of(entry->value());
  }
  CHECK_FALSE(entry->next());
  return entries;
}

Entries read(const Store& store, const std::set<StoredKey>& wanted) {
  const std::vector<StoredKey> keys(wanted.begin(), wanted.end());
  Entries found;
  std::mutex mutex;
  store.multi_get(keys, [&](size_t i, Bytes value) {
    const std::lock_guard lock(mutex);
    REQUIRE(found.emplace(keys[i], text_of(value)).second);
  });
  return found;
}

// Temporary files of the test's own, to see what is there.
class TemporaryFiles {
 public:
  TemporaryFiles() : before_(::getenv("TMPDIR") != nullptr ? ::getenv("TMPDIR") : "") {
    ::setenv("TMPDIR", directory_.path().c_str(), 1);
  }
  ~TemporaryFiles() {
    if (before_.empty())
      ::unsetenv("TMPDIR");
    else
      ::setenv("TMPDIR", before_.c_str(), 1);
  }
  size_t count() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(directory_.path()), fs::directory_iterator()));
  }
  const fs::path& path() const { return directory_.path(); }

 private:
  TemporaryDirectory directory_;
  std::string before_;
};

StoreOptions small_options() {
  StoreOptions options;
  options.cache_bytes = 1 << 20;
  options.write_bytes = 2 << 20;
  options.read_threads = 2;
  return options;
}

std::unique_ptr<Store> layered(const Changes& below, size_t memory_bytes) {
  auto base = open_memory_store({});
  commit(*base, below);
  return open_layered_store(std::move(base), memory_bytes, small_options());
}

Changes numbered(uint64_t first, uint64_t last, const std::string& text) {
  Changes changes;
  for (uint64_t i = first; i < last; ++i) changes[key_of(i)] = text + std::to_string(i);
  return changes;
}

TEST_CASE("layered store: reads what lies below, and what was written instead") {
  const auto store = layered(numbered(0, 100, "old"), 1 << 20);
  CHECK(store->snapshot()->scan({}, std::nullopt)->next());
  commit(*store, {{key_of(3), "new"}, {key_of(4), std::nullopt}, {key_of(200), ""}, {key_of(300), std::nullopt}});
  const Entries found = read(*store, {key_of(2), key_of(3), key_of(4), key_of(200), key_of(300)});
  CHECK(found == Entries{{key_of(2), "old2"}, {key_of(3), "new"}, {key_of(200), ""}});
  const Entries all = scan(*store->snapshot());
  CHECK(all.size() == 100);
  CHECK(all.at(key_of(3)) == "new");
  CHECK_FALSE(all.contains(key_of(4)));
  commit(*store, {{key_of(4), "again"}});
  CHECK(read(*store, {key_of(4)}) == Entries{{key_of(4), "again"}});
}

TEST_CASE("layered store: does as a std::map does, in memory, on the disk and on the way") {
  for (const size_t memory : {size_t{0}, size_t{30'000}, size_t{1} << 30}) {
    CAPTURE(memory);
    const TemporaryFiles temporary;
    std::mt19937_64 random(7 + memory);
    Entries expected;
    const Changes below = numbered(0, 300, "below");
    apply_to(expected, below);
    const auto store = layered(below, memory);
    std::vector<std::pair<std::shared_ptr<const StoreSnapshot>, Entries>> moments;
    for (int round = 0; round < 40; ++round) {
      Changes changes;
      for (uint64_t i = random() % 30; i > 0; --i) {
        const StoredKey key = key_of(random() % 500);
        changes[key] = random() % 3 == 0 ? std::nullopt : std::optional(std::string(random() % 60, 'x'));
      }
      if (random() % 5 == 0) {
        const auto dropped = store->begin_write();
        write(*dropped, changes);
        continue;  // without a commit nothing has happened
      }
      commit(*store, changes);
      apply_to(expected, changes);
      std::set<StoredKey> keys;
      for (int i = 0; i < 100; ++i) keys.insert(key_of(random() % 600));
      Entries wanted;
      for (const StoredKey& key : keys)
        if (expected.contains(key)) wanted[key] = expected[key];
      CHECK(read(*store, keys) == wanted);
      CHECK(scan(*store->snapshot()) == expected);
      const auto [first, last] = std::minmax({key_of(random() % 500), key_of(random() % 500)});
      CHECK(scan(*store->snapshot(), first, last) == Entries(expected.lower_bound(first), expected.lower_bound(last)));
      if (random() % 8 == 0) moments.emplace_back(store->snapshot(), expected);
    }
    for (const auto& [snapshot, then] : moments) CHECK(scan(*snapshot) == then);
    CHECK(temporary.count() == (memory > (1 << 20) ? 0 : 1));
    moments.clear();
    store->close();
    CHECK(temporary.count() == 0);
  }
}

TEST_CASE("layered store: nothing is made before something is written, and what lies below stays as it is") {
  const TemporaryDirectory directory;
  const TemporaryFiles temporary;
  StoreOptions options = small_options();
  options.directory = directory / "rows";
  {
    const auto base = open_rocksdb_store(options);
    commit(*base, numbered(0, 100, "old"));
  }
  options.read_only = options.hold_files = true;
  const auto store = open_layered_store(open_rocksdb_store(options), 0, small_options());
  store->begin_write()->commit();
  CHECK(scan(*store->snapshot()).size() == 100);
  CHECK(temporary.count() == 0);
  commit(*store, numbered(0, 50, "new"));
  CHECK(temporary.count() == 1);
  CHECK(read(*store, {key_of(1), key_of(60)}) == Entries{{key_of(1), "new1"}, {key_of(60), "old60"}});
  store->close();
  const auto again = open_rocksdb_store(options);
  CHECK(read(*again, {key_of(1)}) == Entries{{key_of(1), "old1"}});
}

TEST_CASE("layered store: a batch out of order or committed twice is the caller's mistake") {
  for (const size_t memory : {size_t{0}, size_t{1} << 20}) {
    const auto store = layered({}, memory);
    const std::set<StoredKey> keys{key_of(1), key_of(2)};
    const auto writer = store->begin_write();
    writer->put(*keys.rbegin(), span_of("b"));
    CHECK_THROWS_AS(writer->put(*keys.begin(), span_of("a")), std::invalid_argument);
    CHECK_THROWS_AS(writer->erase(*keys.rbegin()), std::invalid_argument);
    writer->commit();
    CHECK_THROWS_AS(writer->commit(), std::invalid_argument);
    CHECK(scan(*store->snapshot()).size() == 1);
  }
}

TEST_CASE("layered store: after close every call throws ClosedError") {
  const auto store = layered(numbered(0, 10, "old"), 0);
  commit(*store, numbered(0, 5, "new"));
  const auto writer = store->begin_write();
  store->close();
  store->close();
  CHECK_THROWS_AS(read(*store, {key_of(1)}), ClosedError);
  CHECK_THROWS_AS(store->snapshot(), ClosedError);
  CHECK_THROWS_AS(store->begin_write(), ClosedError);
  CHECK_THROWS_AS(writer->put(key_of(1), span_of("x")), ClosedError);
  CHECK_THROWS_AS(store->stats(), ClosedError);
}

TEST_CASE("layered store: without a place for temporary files a write that needs one says so, and reads go on") {
  const TemporaryFiles temporary;
  const auto store = layered(numbered(0, 10, "old"), 0);
  ::setenv("TMPDIR", (temporary.path() / "absent").c_str(), 1);
  CHECK_THROWS_AS(commit(*store, numbered(0, 5, "new")), StorageError);
  CHECK(scan(*store->snapshot()).size() == 10);
  ::setenv("TMPDIR", temporary.path().c_str(), 1);
  commit(*store, numbered(0, 5, "new"));
  CHECK(read(*store, {key_of(1)}) == Entries{{key_of(1), "new1"}});
}

}  // namespace
}  // namespace damo
