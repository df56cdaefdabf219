// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "error.h"
#include "file.h"
#include "rescue.h"
#include "storage.h"
#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;
using testing::TemporaryDirectory;

constexpr uint32_t kDimension = 256;
constexpr size_t kRows = 8000;  // 8 MB: more than the least memory holds

StorageOptions options_for(bool read_only, uint64_t log_bytes = 0) {
  StorageOptions options;
  options.memory_bytes = kMinMemoryBytes;
  options.threads = 2;
  options.log_bytes = log_bytes;
  options.read_only = read_only;
  return options;
}

std::unique_ptr<Storage> open(const fs::path& path, bool read_only, uint64_t log_bytes = 0) {
  return Storage::open(path, options_for(read_only, log_bytes), OpenMode::kOpenOrCreate);
}

TableSpec spec() {
  TableSpec spec;
  spec.group = 4;
  spec.dimension = kDimension;
  spec.optimizer = "sgd";
  spec.optimizer_settings = {{"lr", 1.0}};
  spec.initializer = "zeros";
  return spec;
}

std::vector<uint64_t> all_keys() {
  std::vector<uint64_t> keys(kRows);
  std::iota(keys.begin(), keys.end(), uint64_t{1000});
  return keys;
}

// One operation: each row's weights become one less.
void step(Table& table) {
  static const std::vector<float> ones(kRows * kDimension, 1.0f);
  table.apply_gradients(all_keys(), ones.data(), std::nullopt);
}

// Every row is as it was after the same operation; returns its number.
uint64_t check_whole(Storage& storage) {
  const uint64_t sequence = storage.stats().sequence;
  if (sequence == 0) return 0;
  Table& table = storage.table(spec());
  CHECK(table.step() == sequence);
  CHECK(table.size() == kRows);
  const auto scan = table.scan();
  std::vector<uint64_t> keys(1000);
  std::vector<float> floats(keys.size() * kDimension);
  std::vector<uint32_t> counts(keys.size());
  std::vector<int64_t> times(keys.size());
  size_t rows = 0, wrong = 0;
  while (const size_t found = scan->next(keys.size(), keys.data(), floats.data(), counts.data(), times.data())) {
    rows += found;
    for (size_t i = 0; i < found; ++i)
      wrong += counts[i] != sequence || floats[i * kDimension] != -static_cast<float>(sequence) ||
               floats[(i + 1) * kDimension - 1] != -static_cast<float>(sequence);
  }
  CHECK(rows == kRows);
  CHECK(wrong == 0);
  return sequence;
}

using Traces = std::map<fs::path, std::tuple<ino_t, off_t, time_t, long, time_t, long>>;

Traces traces_of(const fs::path& directory) {
  Traces traces;
  const auto note = [&](const fs::path& path) {
    struct stat info {};
    REQUIRE(::lstat(path.c_str(), &info) == 0);
    traces[path] = {info.st_ino,          info.st_size,        info.st_mtim.tv_sec,
                    info.st_mtim.tv_nsec, info.st_ctim.tv_sec, info.st_ctim.tv_nsec};
  };
  note(directory);
  for (const auto& entry : fs::recursive_directory_iterator(directory)) note(entry.path());
  return traces;
}

TEST_CASE("read-only: beside a writer that evicts and cuts its log every view is of one operation") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "table.damo";
  const auto writer = open(path, false, 1 << 20);
  Table& table = writer->table(spec());
  step(table);
  std::atomic<bool> stop{false};
  std::thread training([&] {
    while (!stop) step(table);
  });
  std::atomic<int> views{0};
  const auto look = [&] {
    uint64_t last = 0;
    while (!stop) {
      const uint64_t before = writer->stats().sequence;
      const auto reader = open(path, true);
      const uint64_t sequence = check_whole(*reader);
      CHECK(sequence >= std::max(before, last));
      CHECK(check_whole(*reader) == sequence);  // and it stays so
      last = sequence;
      ++views;
      if (views >= 12) stop = true;
    }
  };
  std::thread other(look);
  look();
  other.join();
  training.join();
  CHECK(writer->stats().tiers.cuts > 0);
  CHECK(writer->stats().tiers.written_back > 0);
  writer->close();
  CHECK(check_whole(*open(path, true)) == open(path, true)->stats().sequence);
}

TEST_CASE("read-only: a log larger than memory, and nothing in the directory changes by a look") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "table.damo";
  {
    StorageOptions roomy = options_for(false);
    roomy.memory_bytes = size_t{128} << 20;  // nothing is evicted while its files are copied
    const auto writer = Storage::open(directory / "source.damo", roomy, OpenMode::kOpenOrCreate);
    for (int i = 0; i < 3; ++i) step(writer->table(spec()));
    fs::copy(directory / "source.damo", path, fs::copy_options::recursive);
  }
  const Traces before = traces_of(path);
  {
    const auto reader = open(path, true);
    CHECK(reader->stats().redone_records == 3);
    CHECK(reader->stats().tiers.written_back > 0);
    CHECK(check_whole(*reader) == 3);
    Table& table = reader->table(spec());
    std::vector<float> out(kRows * kDimension);
    table.lookup(all_keys(), out.data(), false, false, std::nullopt);
    CHECK(std::all_of(out.begin(), out.end(), [](float weight) { return weight == -3.0f; }));
    CHECK(reader->verify().damages.empty());
    CHECK(traces_of(path) == before);
  }
  CHECK(traces_of(path) == before);
}

TEST_CASE("read-only: what changes throws ReadOnlyError") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "table.damo";
  {
    const auto writer = open(path, false);
    step(writer->table(spec()));
  }
  const Traces before = traces_of(path);
  const auto reader = open(path, true);
  Table& table = reader->table(spec());
  std::vector<float> floats(kDimension, 1.0f);
  const std::vector<uint64_t> keys{1000};
  const std::vector<uint32_t> counts{1};
  CHECK_THROWS_AS(step(table), ReadOnlyError);
  CHECK_THROWS_AS(table.lookup(keys, floats.data(), true, false, std::nullopt), ReadOnlyError);
  CHECK_THROWS_AS(table.erase(keys), ReadOnlyError);
  CHECK_THROWS_AS(table.import_rows(keys, counts, floats.data()), ReadOnlyError);
  CHECK_THROWS_AS(reader->commit(1, ""), ReadOnlyError);
  CHECK_THROWS_AS(reader->checkpoint(directory / "checkpoint", 1, ""), ReadOnlyError);
  CHECK_THROWS_AS(reader->expire(std::nullopt), ReadOnlyError);
  CHECK_THROWS_AS(reader->compact(), ReadOnlyError);
  CHECK_THROWS_AS(reader->drop_group(4), ReadOnlyError);
  TableSpec absent = spec();
  absent.group = 5;
  CHECK_THROWS_AS(reader->table(absent), ReadOnlyError);
  CHECK(check_whole(*reader) == 1);
  reader->close();
  CHECK_THROWS_AS(reader->commit(1, ""), ClosedError);
  CHECK(traces_of(path) == before);
  CHECK_FALSE(fs::exists(directory / "checkpoint"));
}

TEST_CASE("read-only: an append that is taken back while the log is read is no damage") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "table.damo";
  const auto writer = open(path, false);
  for (int i = 0; i < 2; ++i) step(writer->table(spec()));
  // As a writer on a full disk does it: bytes come, and go again.
  const fs::path log = path / "generation-000001" / "log" / "0000000001.log";
  std::atomic<bool> stop{false};
  std::thread appending([&] {
    const FileDescriptor file("append", log, O_RDWR);
    const uint64_t end = file.bytes();
    const std::string bytes(3 << 20, 'x');
    while (!stop) {
      file.write_at(std::as_bytes(std::span(bytes)), end);
      file.truncate(end);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // else a reader beside many others never gets through
    }
  });
  for (int i = 0; i < 20; ++i) CHECK(open(path, true)->stats().sequence == 2);
  stop = true;
  appending.join();
}

}  // namespace
}  // namespace damo
