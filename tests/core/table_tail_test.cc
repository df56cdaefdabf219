// SPDX-License-Identifier: Apache-2.0
#include "stores/table_tail.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "error.h"
#include "file.h"
#include "store.h"
#include "temporary_directory.h"

namespace damo {
namespace {

using testing::TemporaryDirectory;

// A table as the store writes it, with so many rows.
std::string table_of(uint64_t rows) {
  TemporaryDirectory directory;
  StoreOptions options;
  options.directory = directory / "store";
  const auto store = open_rocksdb_store(options);
  const auto writer = store->begin_write();
  std::vector<StoredKey> keys;
  for (uint64_t key = 0; key < rows; ++key) keys.push_back(StoredKey::make(1, key));
  std::sort(keys.begin(), keys.end());
  const std::string value(100, 'v');
  for (const StoredKey& key : keys) writer->put(key, std::as_bytes(std::span(value)));
  writer->commit();
  for (const auto& entry : std::filesystem::directory_iterator(options.directory))
    if (entry.path().extension() == ".sst") return read_file(entry.path(), 64 << 20);
  return "";
}

void check(const std::string& table) {
  check_table_tail("table.sst", table.size(), [&](uint64_t offset, size_t size, std::string& into) {
    into = table.substr(std::min<uint64_t>(offset, table.size()), size);
  });
}

// The footer's second handle, of the index block, which RocksDB verifies before it believes it.
bool is_index_handle(size_t at, size_t size) { return at >= size - 53 + 1 && at < size - 53 + 21; }

TEST_CASE("table tail: that of each table is accepted, whatever its size") {
  for (const uint64_t rows : {1, 30, 1000, 30000}) {
    CAPTURE(rows);
    CHECK_NOTHROW(check(table_of(rows)));
  }
}

TEST_CASE("table tail: each flipped bit in properties, metaindex and footer is CorruptionError that names the file") {
  std::string table = table_of(500);
  const size_t properties = table.rfind("rocksdb.block.based.table.index.type");
  REQUIRE(properties != std::string::npos);
  size_t in_handle = 0;
  for (size_t at = properties; at < table.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      CAPTURE(at);
      CAPTURE(bit);
      table[at] = static_cast<char>(table[at] ^ (1 << bit));
      try {
        check(table);
        CHECK(is_index_handle(at, table.size()));
        ++in_handle;
      } catch (const CorruptionError& error) {
        CHECK(std::string(error.what()).starts_with("table.sst is damaged: the "));
      }
      table[at] = static_cast<char>(table[at] ^ (1 << bit));
    }
  }
  CHECK(in_handle <= 8 * 10);
  CHECK_NOTHROW(check(table));
}

TEST_CASE("table tail: a table cut short anywhere near its end is CorruptionError") {
  const std::string table = table_of(500);
  for (size_t cut = 1; cut < 6000; cut += cut < 200 ? 1 : 97) {
    CAPTURE(cut);
    CHECK_THROWS_AS(check(table.substr(0, table.size() - cut)), CorruptionError);
  }
  for (const size_t size : {0, 1, 52, 53, 54}) {
    CAPTURE(size);
    CHECK_THROWS_AS(check(table.substr(0, size)), CorruptionError);
    CHECK_THROWS_AS(check(table.substr(table.size() - size)), CorruptionError);
  }
}

TEST_CASE("table tail: blocks further ahead than one read are read; a failing read passes as it is") {
  std::string table = table_of(500);
  table.insert(table.size() - 53, 5000, 'x');  // handles tell of offsets from the beginning
  for (const size_t good : {0, 1, 2, 3}) {
    CAPTURE(good);
    size_t reads = 0;
    const auto read = [&](uint64_t offset, size_t size, std::string& into) {
      if (reads++ == good) throw StorageError("no such luck");
      into = table.substr(offset, size);
    };
    if (good < 3) {
      CHECK_THROWS_WITH_AS(check_table_tail("table.sst", table.size(), read), "no such luck", StorageError);
    } else {
      CHECK_NOTHROW(check_table_tail("table.sst", table.size(), read));
    }
    CHECK(reads == std::min<size_t>(good + 1, 3));
  }
  const size_t properties = table.rfind("rocksdb.block.based.table.index.type");
  table[properties] ^= 1;
  CHECK_THROWS_AS(check(table), CorruptionError);
}

}  // namespace
}  // namespace damo
