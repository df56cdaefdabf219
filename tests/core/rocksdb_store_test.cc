// SPDX-License-Identifier: Apache-2.0
#define STORE_NAME "rocksdb store"
#define OPEN_STORE open_rocksdb_store
#include "store_conformance.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>

namespace damo {
namespace {

namespace fs = std::filesystem;

std::vector<fs::path> tables_in(const fs::path& directory) {
  std::vector<fs::path> tables;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.path().extension() == ".sst") tables.push_back(entry.path());
  }
  std::sort(tables.begin(), tables.end());
  return tables;
}

std::set<std::string> files_under(const fs::path& directory) {
  std::set<std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(directory))
    files.insert(fs::relative(entry.path(), directory).string());
  return files;
}

void flip_byte(const fs::path& path, uint64_t offset, std::byte bits = std::byte{0x10}) {
  const FileDescriptor file("flip", path, O_RDWR);
  std::byte byte;
  REQUIRE(file.read_at(std::span(&byte, 1), offset) == 1);
  byte ^= bits;
  file.write_at(std::span(&byte, 1), offset);
}

// Opens, reads all keys both ways, and says what came: "" when every row was right.
std::string open_and_read(const fs::path& directory, const std::vector<StoredKey>& keys, const Entries& expected) {
  try {
    const auto store = open_rocksdb_store(options_for(directory));
    if (read(*store, keys) != expected) return "wrong rows";
    if (scan(*store->snapshot()) != expected) return "wrong scan";
    return "";
  } catch (const CorruptionError&) {
    return "CorruptionError";
  } catch (const StorageError& error) {
    return error.what();
  }
}

TEST_CASE("rocksdb store: committed rows are there after close and reopen") {
  TemporaryDirectory directory;
  Entries model;
  for (uint64_t generation = 0; generation < 5; ++generation) {
    const auto store = open_rocksdb_store(options_for(directory / "store"));
    CHECK(scan(*store->snapshot()) == model);
    const Changes changes = numbered(generation * 50, generation * 50 + 200, generation);
    commit(*store, changes);
    apply_to(model, changes);
    if (generation % 2 == 0) store->close();
  }
  CHECK(scan(*open_rocksdb_store(options_for(directory / "store"))->snapshot()) == model);
}

TEST_CASE("rocksdb store: RocksDB writes no log of its own") {
  TemporaryDirectory directory;
  commit(*open_rocksdb_store(options_for(directory / "store")), numbered(0, 100));
  CHECK_FALSE(fs::exists(directory / "store" / "LOG"));  // it would abort the process on a full disk
}

TEST_CASE("rocksdb store: a damaged table gives CorruptionError, never an absent or another row") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  Changes changes = numbered(0, 1500);
  Entries expected;
  apply_to(expected, changes);
  {
    const auto store = open_rocksdb_store(options_for(path));
    commit(*store, changes);
  }
  const std::vector<StoredKey> keys = sorted_keys(0, 1500);
  REQUIRE(open_and_read(path, keys, expected).empty());
  REQUIRE(tables_in(path).size() == 1);
  const fs::path table = tables_in(path)[0];
  const uint64_t size = fs::file_size(table);
  // All over the data, and finer where filters, indexes, properties and the footer are.
  std::vector<uint64_t> offsets;
  for (uint64_t at = 100; at < size; at += size / 25) offsets.push_back(at);
  for (uint64_t at = size - 12000; at < size; at += 400) offsets.push_back(at);
  for (uint64_t at = size - 50; at < size; at += 12) offsets.push_back(at);
  int noticed = 0;
  for (const uint64_t offset : offsets) {
    CAPTURE(offset);
    flip_byte(table, offset);
    const std::string outcome = open_and_read(path, keys, expected);
    // Damage in a filter costs reads, not rows; so does one in padding.
    if (!outcome.empty()) {
      CHECK(outcome == "CorruptionError");
      ++noticed;
    }
    flip_byte(table, offset);
  }
  CHECK(noticed >= 25);
  CHECK(open_and_read(path, keys, expected).empty());
}

TEST_CASE(
    "rocksdb store: a bit that RocksDB believes before it verifies it is CorruptionError, not the process's end") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  commit(*open_rocksdb_store(options_for(path)), numbered(0, 500));
  const fs::path table = tables_in(path).at(0);
  const std::string bytes = read_file(table, 1 << 20);
  // The metaindex block follows the properties block's five bytes of trailer, and begins with three lengths.
  const size_t metaindex = bytes.rfind("partitionedfilter.") - 3;
  REQUIRE(metaindex < bytes.size());
  const size_t number_of_restarts = metaindex - 5 - 4;
  // The top bit says that a hash index of the keys precedes the number.
  flip_byte(table, number_of_restarts + 3, std::byte{0x80});
  CHECK_THROWS_AS(open_rocksdb_store(options_for(path)), CorruptionError);
  StoreOptions read_only = options_for(path);
  read_only.read_only = true;
  CHECK_THROWS_AS(open_rocksdb_store(read_only), CorruptionError);
  flip_byte(table, number_of_restarts + 3, std::byte{0x80});
  CHECK(read(*open_rocksdb_store(options_for(path)), sorted_keys(0, 500)).size() == 500);
}

TEST_CASE("rocksdb store: a table cut short, emptied or missing is CorruptionError at open") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  commit(*open_rocksdb_store(options_for(path)), numbered(0, 500));
  const fs::path table = tables_in(path).at(0);
  const fs::path aside = directory / "aside";
  for (const uint64_t size : {fs::file_size(table) - 1, fs::file_size(table) / 2, uint64_t{0}}) {
    fs::copy_file(table, aside, fs::copy_options::overwrite_existing);
    fs::resize_file(table, size);
    CHECK_THROWS_AS(open_rocksdb_store(options_for(path)), CorruptionError);
    fs::rename(aside, table);
  }
  fs::rename(table, aside);
  CHECK_THROWS_AS(open_rocksdb_store(options_for(path)), CorruptionError);
  fs::rename(aside, table);
  CHECK(read(*open_rocksdb_store(options_for(path)), sorted_keys(0, 500)).size() == 500);
}

TEST_CASE("rocksdb store: a directory that lost CURRENT or COMMITTED is not taken for a new one") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  commit(*open_rocksdb_store(options_for(path)), numbered(0, 500));
  for (const char* name : {"CURRENT", "COMMITTED"}) {
    CAPTURE(name);
    const std::string good = read_file(path / name, 2000);
    fs::remove(path / name);
    CHECK_THROWS_AS(open_rocksdb_store(options_for(path)), CorruptionError);
    write_file_atomically(path / name, "rubbish");
    CHECK_THROWS_AS(open_rocksdb_store(options_for(path)), CorruptionError);
    write_file_atomically(path / name, good);
    CHECK(tables_in(path).size() == 1);
  }
  CHECK(read(*open_rocksdb_store(options_for(path)), sorted_keys(0, 500)).size() == 500);
}

TEST_CASE("rocksdb store: a manifest that is lost is damage, and so is a CURRENT that names none that is there") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  commit(*open_rocksdb_store(options_for(path)), numbered(0, 500));
  const std::string good = read_file(path / "CURRENT", 2000);
  const fs::path manifest = path / good.substr(0, good.size() - 1);
  write_file_atomically(path / "CURRENT", "MANIFEST-000999\n");
  CHECK_THROWS_WITH_AS(open_rocksdb_store(options_for(path)), doctest::Contains("MANIFEST-000999"), CorruptionError);
  write_file_atomically(path / "CURRENT", good);
  fs::rename(manifest, directory / "aside");
  for (const bool read_only : {false, true}) {
    StoreOptions options = options_for(path);
    options.read_only = read_only;
    CHECK_THROWS_WITH_AS(open_rocksdb_store(options), doctest::Contains(manifest.filename().c_str()), CorruptionError);
  }
  fs::rename(directory / "aside", manifest);
  CHECK(read(*open_rocksdb_store(options_for(path)), sorted_keys(0, 500)).size() == 500);
  // Also where nothing was committed yet: all may be in the log.
  const auto empty = directory / "empty";
  open_rocksdb_store(options_for(empty));
  write_file_atomically(empty / "CURRENT", "MANIFEST-000999\n");
  CHECK_THROWS_WITH_AS(open_rocksdb_store(options_for(empty)), doctest::Contains("MANIFEST-000999"), CorruptionError);
}

TEST_CASE("rocksdb store: a manifest with a damaged byte or cut short never opens with fewer rows, nor loses a table") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  {
    const auto store = open_rocksdb_store(options_for(path));
    for (uint64_t generation = 0; generation < 3; ++generation)
      commit(*store, numbered(generation * 100, generation * 100 + 100));
  }
  const std::string current = read_file(path / "CURRENT", 100);
  const std::string manifest = current.substr(0, current.size() - 1);
  const std::string good = read_file(path / manifest, 1 << 20);
  const size_t tables = tables_in(path).size();
  // A byte of the zeros RocksDB allocates ahead is no damage; the records end with the last one that is not zero.
  const size_t end = good.find_last_not_of('\0') + 1;
  int refused = 0;
  for (size_t at = 0; at < end; at += 11) {
    for (const bool cut : {false, true}) {
      CAPTURE(at);
      CAPTURE(cut);
      const auto copy = directory / "copy";
      fs::remove_all(copy);
      fs::copy(path, copy, fs::copy_options::recursive);
      if (cut) {
        fs::resize_file(copy / manifest, at);
      } else {
        flip_byte(copy / manifest, at);
      }
      try {
        const size_t rows = read(*open_rocksdb_store(options_for(copy)), sorted_keys(0, 500)).size();
        CHECK(rows == 300);
      } catch (const Error&) {
        ++refused;
        CHECK(tables_in(copy).size() == tables);
      }
    }
  }
  CHECK(refused > 10);
}

TEST_CASE("rocksdb store: a second open of a directory is refused and harms nothing") {
  TemporaryDirectory directory;
  const auto store = open_rocksdb_store(options_for(directory / "store"));
  commit(*store, numbered(0, 10));
  CHECK_THROWS_AS(open_rocksdb_store(options_for(directory / "store")), StorageError);
  commit(*store, numbered(10, 20));
  CHECK(read(*store, sorted_keys(0, 20)).size() == 20);
}

TEST_CASE("rocksdb store: a directory whose parent is missing, or that is a file, is an error") {
  TemporaryDirectory directory;
  CHECK_THROWS_AS(open_rocksdb_store(options_for(directory / "a/b")), MissingFileError);
  write_file_atomically(directory / "file", "x");
  CHECK_THROWS_AS(open_rocksdb_store(options_for(directory / "file")), StorageError);
  StoreOptions options = options_for(directory / "absent");
  options.read_only = true;
  CHECK_THROWS_AS(open_rocksdb_store(options), StorageError);
  CHECK_FALSE(fs::exists(directory / "absent"));
}

TEST_CASE("rocksdb store: a writer that did not commit leaves no files") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  const auto store = open_rocksdb_store(options_for(path));
  commit(*store, numbered(0, 10));
  const std::set<std::string> before = files_under(path);
  {
    const auto writer = store->begin_write();
    for (const StoredKey& key : sorted_keys(0, 5000)) writer->put(key, span_of(bytes_for(1)));
    CHECK(files_under(path).size() == before.size() + 1);
  }
  CHECK(files_under(path) == before);
  store->begin_write()->commit();
  CHECK(files_under(path) == before);
}

TEST_CASE("rocksdb store: what a killed writer left is removed at the next open") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  commit(*open_rocksdb_store(options_for(path)), numbered(0, 10));
  write_file_atomically(path / "ingest.tmp" / "3.sst", "half a table");
  const auto store = open_rocksdb_store(options_for(path));
  CHECK(fs::is_empty(path / "ingest.tmp"));
  CHECK(read(*store, sorted_keys(0, 10)).size() == 10);
}

TEST_CASE("rocksdb store: a read-only store changes no file") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  commit(*open_rocksdb_store(options_for(path)), numbered(0, 100));
  write_file_atomically(path / "ingest.tmp" / "3.sst", "a writer's work");
  const std::set<std::string> before = files_under(path);
  StoreOptions options = options_for(path);
  options.read_only = true;
  {
    const auto store = open_rocksdb_store(options);
    CHECK(read(*store, sorted_keys(0, 100)).size() == 100);
    CHECK(files_under(path) == before);
  }
  CHECK(files_under(path) == before);
}

TEST_CASE("rocksdb store: one that holds its files goes on when a writer has replaced them") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  const auto writer = open_rocksdb_store(options_for(path));
  // Fewer than begin a compaction: it might remove files while the reader opens, which then has to try again.
  for (uint64_t i = 0; i < 6; ++i) commit(*writer, numbered(i * 100, i * 100 + 150, i));
  const Entries expected = scan(*writer->snapshot());
  StoreOptions options = options_for(path);
  options.read_only = options.hold_files = true;
  const auto reader = open_rocksdb_store(options);
  const auto tables = tables_in(path);
  commit(*writer, numbered(0, 2000, 77));
  writer->compact(nullptr);
  const auto is_gone = [](const fs::path& table) { return !fs::exists(table); };
  CHECK(std::any_of(tables.begin(), tables.end(), is_gone));
  CHECK(scan(*reader->snapshot()) == expected);
  CHECK(read(*reader, sorted_keys(0, 2000)) == expected);
  uint64_t files = 0, bytes = 0;
  CHECK(reader->verify(files, bytes).empty());
  writer->close();
  fs::remove_all(path);
  CHECK(scan(*reader->snapshot()) == expected);
  CHECK(read(*reader, sorted_keys(0, 2000)) == expected);
}

TEST_CASE("rocksdb store: one that may not hold its files says what limit it needs") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  commit(*open_rocksdb_store(options_for(path)), numbered(0, 10));
  for (int i = 0; i < 300; ++i) write_file_atomically(path / ("9" + std::to_string(10'000 + i) + ".sst"), "no table");
  StoreOptions options = options_for(path);
  options.read_only = options.hold_files = true;
  struct rlimit before {};
  REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
  const struct rlimit low { 256, before.rlim_max };
  REQUIRE(setrlimit(RLIMIT_NOFILE, &low) == 0);
  std::string said;
  try {
    open_rocksdb_store(options);
  } catch (const StorageError& error) {
    said = error.what();
  }
  REQUIRE(setrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(said.find("ulimit -n") != std::string::npos);
  // Files that nobody knows are left alone.
  CHECK(read(*open_rocksdb_store(options), sorted_keys(0, 10)).size() == 10);
  CHECK(tables_in(path).size() == 301);
}

TEST_CASE("rocksdb store: one that is being made has no rows to hold") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  make_directory(path);
  StoreOptions options = options_for(path);
  options.read_only = options.hold_files = true;
  CHECK(scan(*open_rocksdb_store(options)->snapshot()).empty());
  CHECK(fs::is_empty(path));
  commit(*open_rocksdb_store(options_for(path)), numbered(0, 10));
  fs::remove(path / "CURRENT");
  CHECK_THROWS_AS(open_rocksdb_store(options), Error);
}

TEST_CASE("rocksdb store: a batch of several files appears at once, with the checksums RocksDB keeps") {
  TemporaryDirectory directory;
  const auto store = open_rocksdb_store(options_for(directory / "store"));
  const std::string value = bytes_for(1, 0, 1 << 20);
  const auto writer = store->begin_write();
  const std::vector<StoredKey> keys = sorted_keys(0, 80);
  for (const StoredKey& key : keys) writer->put(key, span_of(value));
  CHECK(read(*store, keys).empty());
  writer->commit();
  CHECK(store->stats().files == 2);
  size_t found = 0;
  std::mutex mutex;
  store->multi_get(keys, [&](size_t, Bytes bytes) {
    const std::lock_guard lock(mutex);
    found += text_of(bytes) == value ? 1 : 0;
  });
  CHECK(found == 80);
  for (const LinkedFile& file : store->link_into(directory / "copy"))
    CHECK(crc32c_of_file(directory / "copy" / file.name) == file.crc32c);
}

// RocksDB 7 to 10 lose the wake-up of who waits for files to be deleted, where there is nothing to delete after all
// (facebook/rocksdb#14069): its list of write-ahead logs waited for ever.
TEST_CASE("rocksdb store: copies and walks end beside iterators that come and go") {
  TemporaryDirectory directory;
  const auto store = open_rocksdb_store(options_for(directory / "store"));
  commit(*store, numbered(0, 10));
  constexpr int kRounds = 200;
  std::atomic<bool> stop{false};
  std::atomic<int> rounds{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      while (!stop) store->snapshot()->scan(key_of(0), std::nullopt)->next();
    });
  }
  std::thread copying([&] {
    for (int round = 0; round < kRounds; ++round) {
      commit(*store, numbered(0, 1, static_cast<uint64_t>(round)));
      store->link_into(directory / "copy");
      fs::remove_all(directory / "copy");
      uint64_t files = 0, bytes = 0;
      CHECK(store->verify(files, bytes).empty());
      ++rounds;
    }
  });
  int before = -1;
  while (rounds < kRounds && rounds > before) {
    before = rounds;
    for (int i = 0; i < 300 && rounds == before; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  if (rounds == before) {
    std::fprintf(stderr, "a copy did not end within 30 s, after %d of them\n", before);
    std::abort();  // its thread cannot be joined
  }
  copying.join();
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

TEST_CASE("rocksdb store: compaction changes neither rows nor snapshots, and its files carry checksums") {
  TemporaryDirectory directory;
  const auto store = open_rocksdb_store(options_for(directory / "store"));
  Entries model, early;
  std::shared_ptr<const StoreSnapshot> snapshot;
  constexpr uint64_t kBatches = 40;
  for (uint64_t generation = 0; generation < kBatches; ++generation) {
    Changes changes = numbered(generation * 10, generation * 10 + 200, generation);
    changes[key_of(generation * 10 + 3)] = std::nullopt;
    commit(*store, changes);
    apply_to(model, changes);
    if (generation == 10) {
      snapshot = store->snapshot();
      early = model;
    }
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (store->stats().files >= kBatches / 2 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(store->stats().files < kBatches / 2);
  CHECK(scan(*snapshot) == early);
  CHECK(scan(*store->snapshot()) == model);
  CHECK(read(*store, sorted_keys(0, 1000)) == model);
  for (const LinkedFile& file : store->link_into(directory / "copy"))
    CHECK(crc32c_of_file(directory / "copy" / file.name) == file.crc32c);
  CHECK(scan(*open_rocksdb_store(options_for(directory / "copy"))->snapshot()) == model);
}

TEST_CASE("rocksdb store: close does not wait for compaction to end") {
  TemporaryDirectory directory;
  const auto store = open_rocksdb_store(options_for(directory / "store"));
  for (uint64_t generation = 0; generation < 9; ++generation) commit(*store, numbered(0, 5000, generation, 300));
  const auto start = std::chrono::steady_clock::now();
  store->close();
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
  const auto again = open_rocksdb_store(options_for(directory / "store"));
  CHECK(read(*again, {key_of(4)}).at(key_of(4)) == bytes_for(4, 8, 300));
  CHECK(scan(*again->snapshot()).size() == 5000);
}

// ------------------------------------------------------------ failed writes

std::string failure_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const StorageError& error) {
    return error.what();
  }
  return "";
}

TEST_CASE("rocksdb store: the first failed write is latched, reads go on, a reopened store has what was committed") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  auto store = open_rocksdb_store(options_for(path));
  commit(*store, numbered(0, 300));

  std::string first;
  SUBCASE("no file may grow: the table cannot be written") {
    struct rlimit before {};
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
    const auto handler = ::signal(SIGXFSZ, SIG_IGN);
    const struct rlimit small { 4096, before.rlim_max };
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
    first = failure_of([&] { commit(*store, numbered(0, 3000, 1)); });
    ::setrlimit(RLIMIT_FSIZE, &before);
    ::signal(SIGXFSZ, handler);
    CHECK(first.find("File too large") != std::string::npos);
  }
  SUBCASE("the ingest directory is gone: the table cannot be created") {
    fs::remove_all(path / "ingest.tmp");
    first = failure_of([&] { commit(*store, numbered(0, 3000, 1)); });
    CHECK(first.find("No such file") != std::string::npos);
    fs::create_directory(path / "ingest.tmp");
  }
  SUBCASE("the table vanished before commit") {
    const auto writer = store->begin_write();
    for (const StoredKey& key : sorted_keys(0, 3000)) writer->put(key, span_of("new"));
    fs::remove_all(path / "ingest.tmp");
    first = failure_of([&] { writer->commit(); });
    fs::create_directory(path / "ingest.tmp");
  }
  REQUIRE_FALSE(first.empty());
  CHECK(first.find(path.string()) != std::string::npos);
  for (int again = 0; again < 2; ++again) {
    const std::string later = failure_of([&] { store->begin_write(); });
    CHECK(later.starts_with(first + "; nothing more is written"));
    CHECK(failure_of([&] { std::rethrow_exception(store->failure()); }) == later);
    Entries expected;
    apply_to(expected, numbered(0, 300));
    CHECK(read(*store, sorted_keys(0, 3000)) == expected);
    CHECK(scan(*store->snapshot()) == expected);
  }
  store->close();
  store = open_rocksdb_store(options_for(path));
  CHECK(scan(*store->snapshot()).size() == 300);
  commit(*store, numbered(0, 3000, 1));
  CHECK(scan(*store->snapshot()).size() == 3000);
}

TEST_CASE("rocksdb store: a full disk fails the batch whole, and the store goes on with the next that finds space") {
  TemporaryDirectory directory;
  const auto mounted = directory / "small";
  fs::create_directory(mounted);
  if (::mount("none", mounted.c_str(), "tmpfs", 0, "size=8m") != 0) {
    MESSAGE("skipped: mounting a tmpfs needs root");
    return;
  }
  struct Unmount {
    fs::path path;
    ~Unmount() { ::umount2(path.c_str(), MNT_DETACH); }
  } unmount{mounted};

  auto store = open_rocksdb_store(options_for(mounted / "store"));
  commit(*store, numbered(0, 1000));
  for (uint64_t round = 1; round < 4; ++round) {
    CHECK_THROWS_WITH_AS(commit(*store, numbered(0, 20000, 1, 1000)), doctest::Contains("No space left"),
                         DiskFullError);
    CHECK(read(*store, sorted_keys(0, 3000)).size() == (round == 1 ? 1000 : 2000));
    commit(*store, numbered(0, 2000, round));
    CHECK(read(*store, {key_of(1999)}).at(key_of(1999)) == bytes_for(1999, round));
  }
  store->close();
  store = open_rocksdb_store(options_for(mounted / "store"));
  CHECK(read(*store, sorted_keys(0, 3000)).size() == 2000);
  CHECK(read(*store, {key_of(1999)}).at(key_of(1999)) == bytes_for(1999, 3));
}

// ------------------------------------------------------------------- kill

constexpr uint64_t kChildKeys = 2000;

// Run by the next test in a process of its own: commits batch after batch, every key in each, and says so.
TEST_CASE("rocksdb store: (child) commits until it is killed" * doctest::skip()) {
  const char* path = std::getenv("DAMO_TEST_CHILD_STORE");
  if (path == nullptr) return;
  const auto store = open_rocksdb_store(options_for(path));
  for (uint64_t generation = 1;; ++generation) {
    commit(*store, numbered(0, kChildKeys, generation));
    const auto byte = static_cast<char>(generation);
    if (::write(STDOUT_FILENO, &byte, 1) != 1) std::_Exit(1);
  }
}

TEST_CASE("rocksdb store: after kill -9 a batch is there whole or not at all, and always if it was acknowledged") {
  TemporaryDirectory directory;
  const auto path = directory / "store";
  std::mt19937_64 random(5);
  for (int round = 0; round < 4; ++round) {
    CAPTURE(round);
    fs::remove_all(path);
    REQUIRE(::setenv("DAMO_TEST_CHILD_STORE", path.c_str(), 1) == 0);
    int pipe_ends[2];
    REQUIRE(::pipe2(pipe_ends, O_CLOEXEC) == 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], STDOUT_FILENO);
    std::string program = fs::read_symlink("/proc/self/exe").string(), skip = "--no-skip", quiet = "--no-version",
                filter = "--test-case=rocksdb store: (child) commits until it is killed";
    char* arguments[] = {program.data(), skip.data(), quiet.data(), filter.data(), nullptr};
    pid_t child = 0;
    REQUIRE(::posix_spawn(&child, program.c_str(), &actions, nullptr, arguments, environ) == 0);
    posix_spawn_file_actions_destroy(&actions);
    ::unsetenv("DAMO_TEST_CHILD_STORE");
    ::close(pipe_ends[1]);

    uint64_t acknowledged = 0;
    const uint64_t wanted = 1 + random() % 12;
    char byte = 0;
    while (acknowledged < wanted && ::read(pipe_ends[0], &byte, 1) == 1) ++acknowledged;
    REQUIRE(acknowledged == wanted);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 30'000));
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    while (::read(pipe_ends[0], &byte, 1) == 1) ++acknowledged;
    ::close(pipe_ends[0]);

    const auto store = open_rocksdb_store(options_for(path));
    const Entries found = scan(*store->snapshot());
    REQUIRE(found.size() == kChildKeys);
    uint64_t generation = acknowledged;
    if (found.at(key_of(0)) != bytes_for(0, generation)) ++generation;  // committed, and killed before it said so
    CAPTURE(acknowledged);
    CAPTURE(generation);
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < kChildKeys; ++i) wrong += found.at(key_of(i)) != bytes_for(i, generation) ? 1 : 0;
    CHECK(wrong == 0);
    CHECK(read(*store, sorted_keys(0, kChildKeys)) == found);
    CHECK(fs::is_empty(path / "ingest.tmp"));
    commit(*store, numbered(0, 10, 1000));
  }
}

// ---------------------------------------------------------------- threads

TEST_CASE("rocksdb store: no thread of the store takes signals") {
  std::set<std::string> before;
  for (const auto& entry : fs::directory_iterator("/proc/self/task")) before.insert(entry.path().filename().string());
  TemporaryDirectory directory;
  const auto store = open_rocksdb_store(options_for(directory / "store"));
  for (uint64_t generation = 0; generation < 12; ++generation) commit(*store, numbered(0, 1000, generation));
  read(*store, sorted_keys(0, 1000));
  size_t threads = 0;
  for (const auto& entry : fs::directory_iterator("/proc/self/task")) {
    if (before.contains(entry.path().filename().string())) continue;
    ++threads;
    // A thread that has not run yet still blocks everything, as the C library starts it.
    uint64_t blocked = ~uint64_t{0};
    for (int tries = 0; tries < 1000 && (blocked >> (SIGSEGV - 1) & 1) == 1; ++tries) {
      if (tries > 0) std::this_thread::sleep_for(std::chrono::milliseconds(10));
      std::ifstream status(entry.path() / "status");
      for (std::string word; status >> word;) {
        if (word == "SigBlk:") status >> std::hex >> blocked;
      }
    }
    for (const int signal : {SIGINT, SIGTERM, SIGALRM, SIGUSR1}) CHECK((blocked >> (signal - 1) & 1) == 1);
    CHECK((blocked >> (SIGSEGV - 1) & 1) == 0);
  }
  CHECK(threads >= 3);  // the readers, at least

  // The caller's own mask is what it was.
  sigset_t mask;
  ::pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  CHECK(sigismember(&mask, SIGINT) == 0);
}

}  // namespace
}  // namespace damo
