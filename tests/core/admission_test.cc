// SPDX-License-Identifier: Apache-2.0
//
// A group's filter from one cut to the next: what the log, the manifest and the filter's file say together after a kill
// at any point of a cut. What admission means to a caller is in tests/python/test_admission.py, beside the oracle.
#include "admission.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "file.h"
#include "storage.h"
#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;
using testing::TemporaryDirectory;

const FilterSettings kFilter{500, 3, 1e-2, 700};
constexpr const char* kGeneration = "generation-000001";

std::unique_ptr<Storage> open(const fs::path& path, size_t memory = kMinMemoryBytes) {
  return Storage::open(path, {.memory_bytes = memory, .threads = 2}, OpenMode::kOpenOrCreate);
}

Table& table_of(Storage& storage, const FilterSettings& filter = kFilter, uint32_t group = 0) {
  TableSpec spec;
  spec.group = group;
  spec.dimension = 4;
  spec.optimizer = "sgd";
  spec.optimizer_settings = {{"lr", 0.5}};
  spec.initializer = "uniform";
  spec.initializer_settings = {{"low", -1.0}, {"high", 1.0}};
  return storage.table(spec, std::nullopt, {WantedAdmission::Kind::kFilter, filter});
}

// Lookups `first` to `last`, the same in every storage.
void train(Table& table, uint64_t first, uint64_t last) {
  std::vector<float> out(100 * 4);
  for (uint64_t step = first; step < last; ++step) {
    std::mt19937_64 random(step);
    std::vector<uint64_t> keys(100);
    for (uint64_t& key : keys) key = random() % 600;
    table.lookup(keys, out.data(), true, false, std::nullopt);
    table.apply_gradients(keys, out.data(), std::nullopt);
    if (step % 4 == 3) table.erase(std::span(keys).first(5));
  }
}

// What a table is: adds, estimates, rows.
std::string state_of(Table& table) {
  std::vector<uint64_t> keys(600);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = i;
  std::vector<uint8_t> estimates(keys.size());
  table.filter_estimate(keys, estimates.data());
  std::string state = std::to_string(table.filter_info().adds) + "/" + std::to_string(table.size()) + "/" +
                      std::to_string(table.step()) + ":";
  for (const uint8_t estimate : estimates) state += static_cast<char>('a' + estimate);
  for (const uint64_t key : keys) {
    const auto row = table.inspect(key);
    if (!row) continue;
    state += std::to_string(key) + "x" + std::to_string(row->update_count) + "@" + std::to_string(row->sequence) + "=";
    for (const float number : row->floats) state += std::to_string(number) + ",";
  }
  return state;
}

// Every file, as a kill would leave it. Nothing goes on in the background of so small a storage.
std::map<std::string, std::string> files_of(const fs::path& path) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(path))
    if (entry.is_regular_file() && entry.path().filename() != "LOCK")
      files[fs::relative(entry.path(), path)] = read_file(entry.path(), size_t{1} << 30);
  return files;
}

void write_files(const fs::path& path, const std::map<std::string, std::string>& files) {
  for (const auto& [name, text] : files) {
    fs::create_directories((path / name).parent_path());
    write_file_atomically(path / name, text);
  }
}

std::vector<std::string> filters_of(const fs::path& path) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(path / kGeneration))
    if (is_name_of_saved_filter(entry.path().filename())) names.push_back(entry.path().filename());
  return names;
}

// The files at points of one history: before a cut, after it, some steps later.
struct History {
  TemporaryDirectory directory;
  std::map<std::string, std::string> before, after, later;
  std::string at_cut, at_end;
  History() {
    const auto storage = open(directory / "s");
    Table& table = table_of(*storage);
    train(table, 0, 5);
    storage->compact();  // cuts the log
    train(table, 5, 12);
    storage->commit(1, "");
    at_cut = state_of(table);
    before = files_of(directory / "s");
    storage->compact();
    after = files_of(directory / "s");
    train(table, 12, 20);
    storage->commit(2, "");
    at_end = state_of(table);
    later = files_of(directory / "s");
  }
};

std::map<std::string, std::string> only(const std::map<std::string, std::string>& files, const std::string& part) {
  std::map<std::string, std::string> some;
  for (const auto& [name, text] : files)
    if (name.find(part) != std::string::npos) some[name] = text;
  return some;
}

TEST_CASE("admission: after a kill the filter's file and the log make the counters and the rows again, to the bit") {
  History history;
  CHECK(only(history.before, "/filter-").size() == 1);
  CHECK(only(history.before, "/filter-") != only(history.after, "/filter-"));
  for (const auto& [files, expected] :
       {std::pair(history.before, history.at_cut), {history.after, history.at_cut}, {history.later, history.at_end}}) {
    const TemporaryDirectory killed;
    write_files(killed / "s", files);
    for (int again = 0; again < 2; ++again) {  // and after a close
      const auto storage = open(killed / "s");
      CHECK(state_of(table_of(*storage)) == expected);
    }
  }
}

TEST_CASE("admission: log segments that a power loss brings back after a cut are not counted once more") {
  History history;
  REQUIRE(only(history.before, "/log/") != only(history.after, "/log/"));
  const TemporaryDirectory killed;
  write_files(killed / "s", only(history.before, "/log/"));
  write_files(killed / "s", history.later);
  const auto storage = open(killed / "s");
  CHECK(state_of(table_of(*storage)) == history.at_end);
  storage->close();
  for (const auto& [name, text] : only(history.before, "/log/")) CHECK_FALSE(fs::exists(killed / "s" / name));
}

TEST_CASE("admission: a new file of a filter that the manifest does not name yet is passed over and removed") {
  History history;
  const TemporaryDirectory killed;
  write_files(killed / "s", only(history.after, "/filter-"));
  write_files(killed / "s", history.before);
  REQUIRE(filters_of(killed / "s").size() == 2);
  const auto storage = open(killed / "s");
  CHECK(state_of(table_of(*storage)) == history.at_cut);
  CHECK(filters_of(killed / "s").size() == 1);
}

TEST_CASE("admission: a manifest that names the filter's new file while its old one and the old log are still there") {
  History history;
  const TemporaryDirectory killed;
  write_files(killed / "s", only(history.before, "/filter-"));
  write_files(killed / "s", only(history.before, "/log/"));
  write_files(killed / "s", history.after);
  REQUIRE(filters_of(killed / "s").size() == 2);
  const auto storage = open(killed / "s");
  CHECK(state_of(table_of(*storage)) == history.at_cut);
  CHECK(filters_of(killed / "s").size() == 1);
}

TEST_CASE("admission: a log without the segment that its cut began is corruption, not other counters") {
  History history;
  const TemporaryDirectory killed;
  write_files(killed / "s", history.later);
  // Old segments alone: none begins behind the operation that the filter's file is of.
  fs::remove_all(killed / "s" / kGeneration / "log");
  write_files(killed / "s", only(history.before, "/log/"));
  CHECK_THROWS_WITH_AS(open(killed / "s"), doctest::Contains("where the log was cut"), CorruptionError);
}

TEST_CASE("admission: a filter that cannot be saved leaves the log whole, and nothing is lost") {
  const TemporaryDirectory directory;
  std::string state;
  {
    const auto storage = open(directory / "s");
    Table& table = table_of(*storage);
    train(table, 0, 6);
    state = state_of(table);
    const std::string name = "filter-1-" + std::to_string(storage->stats().sequence) + ".tmp";
    fs::create_directory(directory / "s" / kGeneration / name);
    CHECK_NOTHROW(storage->close());
  }
  const auto storage = open(directory / "s");
  CHECK(storage->stats().redone_records > 0);
  CHECK(state_of(table_of(*storage)) == state);
}

TEST_CASE("admission: lookups of many threads count every key once for each time it stands in one") {
  const TemporaryDirectory directory;
  const FilterSettings settings{20'000, 15, 1e-6, 0};
  const auto storage = open(directory / "s", 64u << 20);
  Table& table = table_of(*storage, settings);
  std::vector<uint64_t> keys(3'000);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = i;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      std::vector<uint64_t> mine(keys);
      std::shuffle(mine.begin(), mine.end(), std::mt19937_64(static_cast<uint64_t>(t)));
      std::vector<float> out(mine.size() * 4);
      for (int i = 0; i < 3; ++i) table.lookup(mine, out.data(), true, true, std::nullopt);
      std::vector<uint8_t> estimates(mine.size());
      table.filter_estimate(mine, estimates.data());
    });
  for (int i = 0; i < 3; ++i) storage->compact();
  for (std::thread& thread : threads) thread.join();
  std::vector<uint8_t> estimates(keys.size());
  table.filter_estimate(keys, estimates.data());
  CHECK(std::all_of(estimates.begin(), estimates.end(), [](uint8_t estimate) { return estimate == 12; }));
  CHECK(table.size() == 0);
  std::vector<float> out(keys.size() * 4);
  for (int i = 0; i < 3; ++i) table.lookup(keys, out.data(), true, true, std::nullopt);
  CHECK(table.size() == keys.size());
  CHECK(table.filter_info().refused == 14 * keys.size());
}

TEST_CASE("admission: a lookup of more new keys than memory takes at once lets all of them in") {
  const TemporaryDirectory directory;
  std::vector<uint64_t> keys(120'000);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = i * 3;
  {
    const auto storage = open(directory / "s");
    Table& table = table_of(*storage, {150'000, 2, 1e-2, 0});
    std::vector<float> out(keys.size() * 4);
    table.lookup(keys, out.data(), true, true, std::nullopt);
    CHECK(table.size() < 2'000);
    table.lookup(keys, out.data(), true, true, std::nullopt);
    CHECK(table.size() == keys.size());
    CHECK(std::none_of(out.begin(), out.end(), [](float weight) { return weight == 0.0f; }));
    CHECK(storage->stats().tiers.evicted > 0);
    keys.push_back(1);  // one that is not in
    std::vector<float> gradients(keys.size() * 4, 1.0f);
    table.apply_gradients(keys, gradients.data(), std::nullopt);
    CHECK(table.filter_info().ignored == 1);
    CHECK(table.size() == keys.size() - 1);
  }
  const auto storage = open(directory / "s");
  CHECK(table_of(*storage, {150'000, 2, 1e-2, 0}).size() == keys.size() - 1);
}

}  // namespace
}  // namespace damo
