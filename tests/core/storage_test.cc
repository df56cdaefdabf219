// SPDX-License-Identifier: Apache-2.0
#include "storage.h"

#include <doctest/doctest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "directory.h"
#include "error.h"
#include "file.h"
#include "rescue.h"
#include "system_faults.h"
#include "temporary_directory.h"

extern char** environ;

namespace damo {
namespace {

namespace fs = std::filesystem;
using testing::FaultScope;
using testing::system_faults;
using testing::TemporaryDirectory;

StorageOptions small_options(uint64_t log_bytes = 0) {
  return {.memory_bytes = kMinMemoryBytes, .durability = Durability::kLogged, .threads = 2, .log_bytes = log_bytes};
}

std::unique_ptr<Storage> open(const fs::path& path, const StorageOptions& options = small_options()) {
  return Storage::open(path, options, OpenMode::kOpenOrCreate);
}

TableSpec spec_of(uint32_t group, uint32_t dimension, const std::string& optimizer = "adam") {
  TableSpec spec;
  spec.group = group;
  spec.dimension = dimension;
  spec.optimizer = optimizer;
  spec.optimizer_settings = {{"lr", 0.01}};
  spec.initializer = "uniform";
  spec.initializer_settings = {{"low", -1.0}, {"high", 1.0}};
  spec.seed = 5;
  return spec;
}

TableSpec named(const std::string& name, uint32_t dimension, const std::string& optimizer = "adagrad") {
  TableSpec spec = spec_of(kNumGroups, dimension, optimizer);
  spec.name = name;
  return spec;
}

// A batch of step `step`: keys with repeats, some new, some old; gradients that depend on both. The same on every run.
struct StepBatch {
  std::vector<uint64_t> keys;
  std::vector<float> gradients;
  StepBatch(uint64_t step, size_t count, uint64_t distinct, size_t dimension) {
    std::mt19937_64 random(step * 77 + distinct);
    for (size_t i = 0; i < count; ++i) keys.push_back(random() % distinct * 0x9E3779B97F4A7C15ULL);
    for (size_t i = 0; i < count * dimension; ++i)
      gradients.push_back(static_cast<float>(static_cast<int64_t>(random() % 2001) - 1000) / 1000);
  }
};

// One training step on both tables: lookup, apply, now and then an erase.
void train_step(Storage& storage, Table& a, Table& b, uint64_t step, size_t count, uint64_t distinct) {
  storage.set_now(1000 + static_cast<int64_t>(step));
  for (Table* table : {&a, &b}) {
    const StepBatch batch(step, count, distinct, table->spec().dimension);
    std::vector<float> out(batch.gradients.size());
    if (step % 2 == 0) table->lookup(batch.keys, out.data(), true, false, std::nullopt);
    table->apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
    if (step % 5 == 4) table->erase(std::span(batch.keys).first(10));
  }
}

// Every row of a table, by key: weights and state, update count, time of the last update.
using Rows = std::map<uint64_t, std::tuple<std::vector<float>, uint32_t, int64_t>>;

Rows rows_of(Table& table) {
  Rows rows;
  const auto scan = table.scan();
  const size_t width = scan->num_floats(), limit = 1000;
  std::vector<uint64_t> keys(limit);
  std::vector<float> floats(limit * width);
  std::vector<uint32_t> counts(limit);
  std::vector<int64_t> times(limit);
  while (const size_t got = scan->next(limit, keys.data(), floats.data(), counts.data(), times.data()))
    for (size_t i = 0; i < got; ++i)
      rows[keys[i]] = {{floats.begin() + static_cast<ptrdiff_t>(i * width),
                        floats.begin() + static_cast<ptrdiff_t>((i + 1) * width)},
                       counts[i],
                       times[i]};
  return rows;
}

std::vector<float> lookup(Table& table, const std::vector<uint64_t>& keys, bool insert = false, bool zeros = false) {
  std::vector<float> out(keys.size() * table.spec().dimension, -7.0f);
  table.lookup(keys, out.data(), insert, zeros, std::nullopt);
  return out;
}

// Name, size and time of change of every file.
std::map<std::string, std::pair<uintmax_t, fs::file_time_type>> listing_of(const fs::path& path) {
  std::map<std::string, std::pair<uintmax_t, fs::file_time_type>> listing;
  for (const auto& entry : fs::recursive_directory_iterator(path))
    if (entry.is_regular_file()) listing[entry.path()] = {entry.file_size(), entry.last_write_time()};
  return listing;
}

// The directory as a kill would leave it: every file as it is now. LOCK stays out: closing a second descriptor of it
// here would give this process's lock away. A kill is one moment, a copy is not: while evictions or compactions go on
// in the background, the copy is of several moments, so it is made again until nothing changed beside it.
void copy_as_killed(const fs::path& from, const fs::path& to) {
  for (int attempt = 0; attempt < 200; ++attempt) {
    try {
      const auto before = listing_of(from);
      fs::remove_all(to);
      fs::create_directories(to);
      for (const auto& entry : fs::directory_iterator(from)) {
        if (entry.path().filename() == "LOCK") continue;
        fs::copy(entry.path(), to / entry.path().filename(), fs::copy_options::recursive);
      }
      if (listing_of(from) == before) return;
    } catch (const fs::filesystem_error&) {  // a file went away beside the copy
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  FAIL("the directory never came to rest");
}

std::map<std::string, std::string> files_of(const fs::path& path) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(path))
    if (entry.is_regular_file() && entry.path().filename() != "LOCK")
      files[fs::relative(entry.path(), path)] = read_file(entry.path(), size_t{1} << 30);
  return files;
}

size_t log_segments(const fs::path& path) {
  size_t count = 0;
  for (const auto& entry : fs::recursive_directory_iterator(path))
    count += entry.path().parent_path().filename() == "log";
  return count;
}

// ------------------------------------------------------------ close, reopen

TEST_CASE(
    "storage: what was trained is there after close and reopen, to the bit, and training goes on as if never closed") {
  const TemporaryDirectory directory;
  Rows whole_a, whole_b;
  {
    const auto storage = open(directory / "whole");
    Table &a = storage->table(spec_of(0, 8)), &b = storage->table(named("user", 3));
    for (uint64_t step = 1; step <= 12; ++step) train_step(*storage, a, b, step, 300, 700);
    whole_a = rows_of(a);
    whole_b = rows_of(b);
    CHECK(a.size() == whole_a.size());
    CHECK(b.size() == whole_b.size());
  }
  for (uint64_t step = 1; step <= 12; ++step) {
    if (step % 4 != 1) continue;
    const auto storage = open(directory / "parts");
    CHECK(storage->stats().redone_records == 0);
    Table &a = storage->table(spec_of(0, 8)), &b = storage->table(named("user", 3));
    CHECK(a.step() == step - 1);
    CHECK(storage->now() >= 1000 + static_cast<int64_t>(step) - 1);
    for (uint64_t s = step; s < step + 4; ++s) train_step(*storage, a, b, s, 300, 700);
    if (step == 5) storage->close();  // or by the destructor
  }
  const auto storage = Storage::open(directory / "parts", small_options(), OpenMode::kOpen);
  Table &a = storage->table(spec_of(0, 8)), &b = storage->table(named("user", 3));
  CHECK(rows_of(a) == whole_a);
  CHECK(rows_of(b) == whole_b);
  CHECK(a.size() == whole_a.size());
  CHECK(b.step() == 12);
}

TEST_CASE("storage: a lookup that inserts nothing changes nothing and returns what training starts from") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table& table = storage->table(spec_of(3, 5));
  const std::vector<uint64_t> keys{0, 1, ~uint64_t{0}, 1};
  const uint64_t before = storage->stats().sequence;
  const std::vector<float> seen = lookup(table, keys);
  CHECK(lookup(table, keys, false, true) == std::vector<float>(20, 0.0f));
  CHECK(table.size() == 0);
  CHECK(storage->stats().sequence == before);
  CHECK_FALSE(table.inspect(0));
  CHECK(lookup(table, keys, true) == seen);
  CHECK(table.size() == 3);
  bool there[2] = {};
  table.contains(std::vector<uint64_t>{1, 2}, there);
  CHECK(there[0]);
  CHECK_FALSE(there[1]);
  REQUIRE(table.inspect(~uint64_t{0}));
  CHECK(table.inspect(~uint64_t{0})->update_count == 0);
  CHECK(table.inspect(~uint64_t{0})->in_memory);
  CHECK(table.erase(keys) == 3);
  CHECK(table.erase(keys) == 0);
  CHECK(table.size() == 0);
  CHECK(lookup(table, keys) == seen);
}

TEST_CASE("storage: padding positions read as zeros and get no row") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table& table = storage->table(spec_of(0, 2, "sgd"));
  const std::vector<uint64_t> keys{0, 9, 0};
  std::vector<float> out(6, 3.0f);
  const auto batch = table.lookup(keys, out.data(), true, false, uint64_t{0});
  CHECK(table.size() == 1);
  CHECK((out[0] == 0 && out[1] == 0 && out[4] == 0 && out[5] == 0));
  const std::vector<float> gradients(6, 1.0f);
  const Table::Part part{batch.get(), gradients.data()};
  table.apply_gradients({&part, 1}, 1.0);
  CHECK(table.size() == 1);
  CHECK(lookup(table, {9})[0] == out[2] - 1.0f);
}

TEST_CASE("storage: the same group with other dimension, optimizer, initializer, seed or name is SchemaMismatchError") {
  const TemporaryDirectory directory;
  {
    const auto storage = open(directory / "s");
    storage->table(spec_of(7, 4));
    CHECK(&storage->table(spec_of(7, 4)) == &storage->table(spec_of(7, 4)));
  }
  const auto storage = open(directory / "s");
  const auto refused = [&](const std::function<void(TableSpec&)>& change) {
    TableSpec spec = spec_of(7, 4);
    change(spec);
    CHECK_THROWS_AS(storage->table(spec), SchemaMismatchError);
  };
  refused([](TableSpec& s) { s.dimension = 5; });
  refused([](TableSpec& s) { s.optimizer = "adagrad"; });
  refused([](TableSpec& s) { s.initializer = "normal", s.initializer_settings = {}; });
  refused([](TableSpec& s) { s.initializer_settings["high"] = 2.0; });
  refused([](TableSpec& s) { s.seed = 6; });
  // Another rate is fine at a new open, and is remembered.
  TableSpec other = spec_of(7, 4);
  other.optimizer_settings["lr"] = 0.25;
  CHECK(storage->table(other).lr() == 0.25);
  CHECK_THROWS_AS(storage->table(spec_of(7, 4)), SchemaMismatchError);
  for (const std::function<void(TableSpec&)>& change : std::initializer_list<std::function<void(TableSpec&)>>{
           [](TableSpec& s) { s.group = 256; }, [](TableSpec& s) { s.dimension = 0; },
           [](TableSpec& s) { s.dimension = kMaxDimension + 1; }, [](TableSpec& s) { s.optimizer = "nadam"; },
           [](TableSpec& s) { s.optimizer_settings["lr"] = -1; },
           [](TableSpec& s) { s.name = std::string(256, 'x'); }}) {
    TableSpec bad = spec_of(9, 4);
    change(bad);
    CHECK_THROWS_AS(storage->table(bad), std::invalid_argument);
  }
  CHECK(storage->stats().groups.size() == 1);
}

TEST_CASE("storage: a call that leaves no record does not move the clock") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table& table = storage->table(spec_of(0, 4));
  storage->set_now(int64_t{1} << 40);
  lookup(table, {1, 2}, true);
  storage->set_now((int64_t{1} << 40) + 500);
  CHECK(table.erase(std::vector<uint64_t>{7}) == 0);
  lookup(table, {1, 2}, true);
  storage->checkpoint(directory / "checkpoint", 1, "");
  storage->close();
  Storage::restore(directory / "checkpoint", directory / "restored");
  CHECK(open(directory / "restored")->now() == int64_t{1} << 40);
}

TEST_CASE("storage: groups are saved once, before the first operation after they were opened, and at close") {
  const TemporaryDirectory directory;
  const fs::path manifest = directory / "s" / "generation-000001" / "MANIFEST";
  const auto saved = [&] {
    const std::string bytes = read_file(manifest, size_t{1} << 20);
    return decode_manifest(std::as_bytes(std::span(bytes)), "manifest").tables.size();
  };
  {
    const auto storage = open(directory / "s");
    for (uint32_t group = 0; group < 256; ++group) storage->table(spec_of(group, 1 + group));
    CHECK(saved() == 0);
    lookup(storage->table(spec_of(3, 4)), {1, 2}, true);
    CHECK(saved() == 256);
    copy_as_killed(directory / "s", directory / "killed");
  }
  {
    const auto storage = open(directory / "killed");
    CHECK(storage->stats().groups.size() == 256);
    CHECK(storage->table(spec_of(3, 4)).size() == 2);
    TableSpec other = spec_of(3, 4);
    other.optimizer_settings = {{"lr", 0.25}};
    CHECK_THROWS_AS(storage->table(other), SchemaMismatchError);
    other.group = 4;
    other.dimension = 5;
    storage->table(other);  // another rate
  }
  const std::string bytes = read_file(directory / "killed" / "generation-000001" / "MANIFEST", size_t{1} << 20);
  CHECK(decode_manifest(std::as_bytes(std::span(bytes)), "manifest").tables[4].optimizer_settings.at("lr") == 0.25);
  // Opened and never used: nothing names it, so nothing is missed when the process dies.
  {
    const auto storage = open(directory / "t");
    storage->table(spec_of(1, 2));
    copy_as_killed(directory / "t", directory / "unused");
    storage->checkpoint(directory / "checkpoint", 1, "");
    copy_as_killed(directory / "t", directory / "checkpointed");
    CHECK(open(directory / "checkpointed")->stats().groups.size() == 1);
    const auto again = open(directory / "unused");
    CHECK(again->stats().groups.empty());
    lookup(again->table(spec_of(9, 7)), {1}, true);  // takes the same table id
    copy_as_killed(directory / "unused", directory / "used");
    CHECK(open(directory / "used")->table(spec_of(9, 7)).size() == 1);
  }
  CHECK(open(directory / "t")->stats().groups.size() == 1);
  Storage::restore(directory / "checkpoint", directory / "restored");
  CHECK(open(directory / "restored")->stats().groups.size() == 1);
}

TEST_CASE("storage: one writer a directory; bad options and a damaged manifest are told, and leave the lock free") {
  const TemporaryDirectory directory;
  {
    const auto storage = open(directory / "s");
    storage->table(spec_of(1, 2));
    CHECK_THROWS_AS(open(directory / "s"), AlreadyOpenError);
    CHECK_THROWS_AS(Storage::restore(directory / "s", directory / "s"), StorageError);
  }
  StorageOptions options = small_options();
  options.memory_bytes = kMinMemoryBytes - 1;
  CHECK_THROWS_AS(open(directory / "s", options), std::invalid_argument);
  const fs::path manifest = directory / "s" / "generation-000001" / "MANIFEST";
  const std::string good = read_file(manifest, 100000);
  std::string bad = good;
  bad[20] = static_cast<char>(bad[20] ^ 1);
  write_file_atomically(manifest, bad);
  CHECK_THROWS_AS(open(directory / "s"), CorruptionError);
  fs::remove(manifest);
  CHECK_THROWS_AS(open(directory / "s"), CorruptionError);
  write_file_atomically(manifest, good);
  CHECK(open(directory / "s")->stats().groups.size() == 1);
}

// --------------------------------------------------------------- schedules

// What a test wants to be asked for rates.
class Asked final : public Schedule {
 public:
  explicit Asked(std::function<double(uint64_t)> rate) : rate_(std::move(rate)) {}
  double rate(uint64_t step) const override {
    steps.push_back(step);  // asked under the order lock
    return rate_(step);
  }
  mutable std::vector<uint64_t> steps;

 private:
  std::function<double(uint64_t)> rate_;
};

TableSpec sgd_from_zero(uint32_t group) {
  TableSpec spec = spec_of(group, 1, "sgd");
  spec.optimizer_settings = {{"lr", 1.0}};
  spec.initializer = "zeros";
  spec.initializer_settings = {};
  return spec;
}

TEST_CASE("storage: an update's rate is its schedule's for the step it gets, over close and kill") {
  const TemporaryDirectory directory;
  const std::vector<uint64_t> keys{7};
  const float one = 1.0f;
  const auto powers = [] { return std::make_shared<Asked>([](uint64_t step) { return std::ldexp(1.0, int(step)); }); };
  {
    const auto storage = open(directory / "s");
    Table& table = storage->table(sgd_from_zero(0));
    table.set_lr(powers());
    for (int i = 0; i < 3; ++i) table.apply_gradients(keys, &one, std::nullopt);
    CHECK(lookup(table, keys)[0] == -7.0f);
    CHECK(table.lr() == 8.0);
  }
  const auto storage = open(directory / "s");
  Table& table = storage->table(sgd_from_zero(0));
  CHECK(table.lr() == 1.0);  // a schedule is not stored
  const auto schedule = powers();
  table.set_lr(schedule);
  table.apply_gradients(keys, &one, std::nullopt);   // 8
  table.apply_gradients(keys, &one, 0.25);           // a rate of its own: a step, but nobody is asked
  table.apply_gradients({}, nullptr, std::nullopt);  // no step
  table.apply_gradients(keys, &one, std::nullopt);   // 32
  CHECK(lookup(table, keys)[0] == -7.0f - 8.0f - 0.25f - 32.0f);
  CHECK(schedule->steps == std::vector<uint64_t>{3, 5});
  table.set_lr(0.5);
  table.apply_gradients(keys, &one, std::nullopt);
  CHECK(lookup(table, keys)[0] == -47.75f);
  copy_as_killed(directory / "s", directory / "killed");
  const auto again = open(directory / "killed");  // redo has the rates in its log
  Table& killed = again->table(sgd_from_zero(0));
  CHECK(lookup(killed, keys)[0] == -47.75f);
  CHECK(killed.step() == 7);
}

TEST_CASE("storage: threads that update one group get one rate each, in the order of the steps") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table &table = storage->table(sgd_from_zero(0)), &other = storage->table(sgd_from_zero(1));
  const auto schedule = std::make_shared<Asked>([](uint64_t step) {
    std::this_thread::sleep_for(std::chrono::microseconds(100));  // so that the others do wait
    return static_cast<double>(step);
  });
  table.set_lr(schedule);
  constexpr int kThreads = 4, kUpdates = 50;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < kUpdates; ++i) {
        const std::vector<uint64_t> keys{uint64_t(t), 99};
        const float ones[] = {1.0f, 1.0f};
        table.apply_gradients(keys, ones, std::nullopt);
        other.apply_gradients(keys, ones, std::nullopt);
      }
    });
  for (std::thread& thread : threads) thread.join();
  std::vector<uint64_t> expected(kThreads * kUpdates);
  std::iota(expected.begin(), expected.end(), uint64_t{0});
  CHECK(schedule->steps == expected);
  CHECK(lookup(table, {99})[0] == -199.0f * 200.0f / 2.0f);
  const std::vector<float> own = lookup(table, {0, 1, 2, 3});
  CHECK(own[0] + own[1] + own[2] + own[3] == -199.0f * 200.0f / 2.0f);
}

TEST_CASE("storage: a schedule that throws or gives no rate stops the update before anything is logged") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table &table = storage->table(sgd_from_zero(0)), &good = storage->table(sgd_from_zero(1));
  const std::vector<uint64_t> keys{1, 2};
  const float ones[] = {1.0f, 1.0f};
  lookup(table, {1}, true);
  const uint64_t sequence = storage->stats().sequence, log_bytes = storage->stats().log_bytes;
  struct Surprise {};
  const auto refused = [&](const std::function<double(uint64_t)>& rate, const auto& attempt) {
    table.set_lr(std::make_shared<Asked>(rate));
    attempt();
    CHECK(storage->stats().sequence == sequence);
    CHECK(storage->stats().log_bytes == log_bytes);
    CHECK(table.step() == 0);
    CHECK(good.step() == 0);
    CHECK(table.size() == 1);
    CHECK(good.size() == 0);
  };
  const auto apply = [&] { table.apply_gradients(keys, ones, std::nullopt); };
  // The good one comes first, and is not applied either.
  const auto apply_both = [&] {
    const Batch batch(keys, std::nullopt);
    const std::vector<Table::Update> updates{{&good, {{&batch, ones}}, std::nullopt},
                                             {&table, {{&batch, ones}}, std::nullopt}};
    Table::apply_gradients(updates);
  };
  refused([](uint64_t) -> double { throw Surprise{}; }, [&] { CHECK_THROWS_AS(apply(), Surprise); });
  refused([](uint64_t) -> double { throw Surprise{}; }, [&] { CHECK_THROWS_AS(apply_both(), Surprise); });
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {std::nan(""), infinity, -infinity, -1e-300, 1e39}) {
    CAPTURE(bad);
    refused([bad](uint64_t) { return bad; }, [&] { CHECK_THROWS_AS(apply(), std::invalid_argument); });
    refused([bad](uint64_t) { return bad; }, [&] { CHECK_THROWS_AS(apply_both(), std::invalid_argument); });
  }
  CHECK_THROWS_WITH(apply(),
                    "[apply_gradients] the schedule of group 0 gives 1e+39 for step 0, expected a number in [0, "
                    "3.4028234663852886e+38]: give another one, or set lr to a number");
  CHECK_THROWS_AS(table.lr(), std::invalid_argument);
  table.set_lr(1.0);
  apply_both();
  CHECK(lookup(table, keys) == std::vector<float>{-1.0f, -1.0f});
  CHECK(lookup(good, keys) == std::vector<float>{-1.0f, -1.0f});
}

TEST_CASE("storage: an update of no keys after a training lookup of none does nothing") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table& table = storage->table(sgd_from_zero(0));
  const std::span<const uint64_t> nothing;  // without an address: under UBSan a comparison of its bytes is a report
  table.lookup(nothing, nullptr, true, false, std::nullopt);
  table.apply_gradients(nothing, nullptr, std::nullopt);
  CHECK(table.step() == 0);
  CHECK(table.size() == 0);
}

TEST_CASE("storage: one call names a table once") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table &table = storage->table(sgd_from_zero(0)), &other = storage->table(sgd_from_zero(1));
  const std::vector<uint64_t> keys{1};
  const float one = 1.0f;
  const Batch batch(keys, std::nullopt), empty(std::span<const uint64_t>{}, std::nullopt);
  std::vector<Table::Update> updates{{&table, {{&batch, &one}}, std::nullopt},
                                     {&other, {{&batch, &one}}, std::nullopt},
                                     {&table, {{&empty, &one}}, std::nullopt}};
  Table::apply_gradients(updates);  // nothing is no update
  CHECK(table.step() == 1);
  updates[2].parts[0].batch = &batch;
  CHECK_THROWS_WITH_AS(Table::apply_gradients(updates),
                       "[apply_gradients] group 0 stands twice in one call, expected each group once: give its parts "
                       "together",
                       std::invalid_argument);
  CHECK(table.step() == 1);
  CHECK(other.step() == 1);
}

TEST_CASE("storage: tables of two storages are not updated by one call") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s"), stranger = open(directory / "t");
  Table &table = storage->table(sgd_from_zero(0)), &other = stranger->table(sgd_from_zero(1));
  const std::vector<uint64_t> keys{1};
  const float one = 1.0f;
  const Batch batch(keys, std::nullopt);
  const std::vector<Table::Update> updates{{&table, {{&batch, &one}}, std::nullopt},
                                           {&other, {{&batch, &one}}, std::nullopt}};
  CHECK_THROWS_WITH(Table::apply_gradients(updates),
                    "[apply_gradients] group 1 is of another storage than group 0: make one call for each storage");
  CHECK(table.step() == 0);
}

TEST_CASE("storage: a schedule that uses a storage is refused, where it would wait for its own thread") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s"), stranger = open(directory / "t");
  Table &table = storage->table(sgd_from_zero(0)), &other = stranger->table(sgd_from_zero(0));
  const std::vector<uint64_t> keys{1};
  const float one = 1.0f;
  float out = 0.0f;
  const std::vector<std::function<void()>> uses{
      [&] { storage->stats(); },
      [&] { storage->now(); },
      [&] { storage->commit(1, ""); },
      [&] { storage->close(); },
      [&] { storage->table(sgd_from_zero(3)); },
      [&] { table.lookup(keys, &out, true, false, std::nullopt); },
      [&] { table.apply_gradients(keys, &one, 1.0); },
      [&] { other.apply_gradients(keys, &one, 1.0); },
  };
  for (size_t use = 0; use < uses.size(); ++use) {
    CAPTURE(use);
    bool refused = false;
    table.set_lr(std::make_shared<Asked>([&](uint64_t) {
      try {
        uses[use]();
      } catch (const std::invalid_argument& error) {
        refused = std::string(error.what()).find("called by a learning-rate schedule") != std::string::npos;
      }
      return 1.0;
    }));
    table.apply_gradients(keys, &one, std::nullopt);
    CHECK(refused);
  }
  CHECK(table.step() == uses.size());
  CHECK(other.step() == 0);
  CHECK(table.size() == 1);
  // What goes away while another storage's schedule is asked is closed as always.
  auto third = open(directory / "u");
  Table& of_third = third->table(sgd_from_zero(0));
  of_third.apply_gradients(keys, &one, std::nullopt);
  table.set_lr(std::make_shared<Asked>([&](uint64_t) {
    third.reset();
    return 1.0;
  }));
  table.apply_gradients(keys, &one, std::nullopt);
  const auto reopened = open(directory / "u");
  CHECK(reopened->stats().redone_records == 0);
  CHECK(lookup(reopened->table(sgd_from_zero(0)), keys)[0] == -1.0f);
}

// -------------------------------------------------------------------- redo

TEST_CASE(
    "storage: after a kill everything that returned is there, to the bit: updates, inserts, erases, commits, counts") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table &a = storage->table(spec_of(0, 8)), &b = storage->table(named("user", 3));
  for (uint64_t step = 1; step <= 6; ++step) train_step(*storage, a, b, step, 300, 700);
  storage->commit(6, "six");
  rows_of(a);  // a cut: part of it is in the cold tier, and the log goes on in another segment
  for (uint64_t step = 7; step <= 11; ++step) train_step(*storage, a, b, step, 300, 700);
  a.set_lr(0.5);
  train_step(*storage, a, b, 12, 300, 700);
  lookup(b, {1, 2, 3, 4}, true);
  copy_as_killed(directory / "s", directory / "killed");
  const auto again = open(directory / "killed");
  CHECK(again->stats().redone_records > 20);
  Table &a2 = again->table(spec_of(0, 8)), &b2 = again->table(named("user", 3));
  CHECK(a2.size() == a.size());
  CHECK(b2.size() == b.size());
  CHECK(a2.step() == 12);
  CHECK(again->last_commit()->step == 6);
  CHECK(again->last_commit()->extra == "six");
  CHECK(again->stats().sequence == storage->stats().sequence);
  CHECK(rows_of(a2) == rows_of(a));
  CHECK(rows_of(b2) == rows_of(b));
  CHECK(a2.size() == rows_of(a2).size());
}

// Operation number `i` of a run that may be killed and go on: repeating one that was half done ends at the same rows.
void child_step(Storage& storage, Table& a, Table& b, uint64_t i) {
  constexpr size_t kBatch = 4000;
  constexpr uint64_t kKeys = 90000;  // more than fits into memory
  Table& table = i % 2 == 0 ? a : b;
  const StepBatch batch(i, kBatch, kKeys, table.spec().dimension);
  storage.set_now(1000 + static_cast<int64_t>(i));
  if (i % 5 == 4)
    table.erase(std::span<const uint64_t>(StepBatch(i - 2, kBatch, kKeys, table.spec().dimension).keys).first(50));
  if (i % 3 == 0) lookup(table, batch.keys, true);
  table.apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
}

// Not a test: what the next test runs in a process of its own, to be killed. Tells each operation that returned.
TEST_CASE("storage: a child that trains until it is killed" * doctest::skip()) {
  const char* path = std::getenv("DAMO_TEST_DIRECTORY");
  REQUIRE(path != nullptr);
  const auto storage = open(path, small_options(2 << 20));
  Table &a = storage->table(spec_of(0, 16)), &b = storage->table(named("user", 3));
  for (uint64_t i = a.step() + b.step() + 1;; ++i) {
    child_step(*storage, a, b, i);
    if (::write(3, ".", 1) != 1) return;
  }
}

TEST_CASE("storage: killed again and again while it evicts and cuts its log, it equals a run that was never killed") {
  const TemporaryDirectory directory;
  ::setenv("DAMO_TEST_DIRECTORY", (directory / "killed").c_str(), 1);
  const char* arguments[] = {"tests", "--no-skip", "--test-case=storage: a child that trains until it is killed",
                             nullptr};
  uint64_t returned = 0;
  for (const uint64_t steps : {9, 14, 11}) {
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 3);
    pid_t child = 0;
    REQUIRE(::posix_spawn(&child, "/proc/self/exe", &actions, nullptr, const_cast<char**>(arguments), environ) == 0);
    posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    uint64_t seen = 0;
    for (char c; seen < steps && ::read(ends[0], &c, 1) == 1;) ++seen;
    ::kill(child, SIGKILL);
    for (char c; ::read(ends[0], &c, 1) == 1;) ++seen;
    int status = 0;
    ::waitpid(child, &status, 0);
    ::close(ends[0]);
    CHECK(WIFSIGNALED(status));
    CHECK(seen >= steps);
    returned += seen;
  }
  ::unsetenv("DAMO_TEST_DIRECTORY");
  const auto killed = open(directory / "killed", small_options(2 << 20));
  Table &a = killed->table(spec_of(0, 16)), &b = killed->table(named("user", 3));
  const uint64_t done = a.step() + b.step();
  CHECK(done >= returned);
  CHECK(done <= returned + 3);  // an operation a child may have returned and not been told
  // The one it was in the middle of may have erased or looked up already.
  child_step(*killed, a, b, done + 1);
  StorageOptions roomy = small_options();
  roomy.memory_bytes = size_t{64} << 20;
  const auto whole = open(directory / "whole", roomy);
  Table &whole_a = whole->table(spec_of(0, 16)), &whole_b = whole->table(named("user", 3));
  for (uint64_t i = 1; i <= done + 1; ++i) child_step(*whole, whole_a, whole_b, i);
  CHECK(whole->stats().tiers.evicted == 0);
  CHECK(a.size() == whole_a.size());
  CHECK(b.size() == whole_b.size());
  CHECK(rows_of(a) == rows_of(whole_a));
  CHECK(rows_of(b) == rows_of(whole_b));
}

TEST_CASE("storage: counts and steps agree after every reopen, wherever the log's segments begin") {
  const TemporaryDirectory directory;
  auto storage = open(directory / "s", small_options(4 << 20));
  Table* table = &storage->table(spec_of(0, 16, "sgd"));
  size_t segments = log_segments(directory / "s"), reopened = 0;
  for (uint64_t step = 1; step <= 30 && reopened < 4; ++step) {
    const StepBatch batch(step, 4000, 20000, 16);
    table->apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
    if (const size_t now = log_segments(directory / "s"); now == segments) continue;
    // This operation began a segment: the state at its head must be the one without, or with, exactly this operation.
    ++reopened;
    const uint64_t rows = table->size();
    for (const bool killed : {true, false}) {
      const fs::path path = killed ? directory / ("killed" + std::to_string(step)) : directory / "s";
      if (killed)
        copy_as_killed(directory / "s", path);
      else
        storage.reset();
      auto again = open(path, small_options(4 << 20));
      Table& known = again->table(spec_of(0, 16, "sgd"));
      CHECK(known.step() == step);
      CHECK(known.size() == rows);
      if (!killed) {
        storage = std::move(again);
        table = &known;
      }
    }
    segments = log_segments(directory / "s");
  }
  CHECK(reopened == 4);
  CHECK(table->size() == rows_of(*table).size());
}

// ----------------------------------------------------------- beyond memory

TEST_CASE("storage: one call with more rows than memory holds equals the same call with memory for all") {
  const TemporaryDirectory directory;
  StorageOptions roomy = small_options();
  roomy.memory_bytes = size_t{96} << 20;
  constexpr size_t kRows = 50000;
  std::vector<uint64_t> keys;
  for (uint64_t i = 0; i < kRows + 5000; ++i) keys.push_back(i % kRows);
  std::vector<float> gradients(keys.size() * 16);
  std::mt19937_64 random(9);
  for (float& g : gradients) g = static_cast<float>(random() % 1000) / 500 - 1;
  const std::vector<uint64_t> gone(keys.begin(), keys.begin() + 30000);

  const auto small = open(directory / "small"), large = open(directory / "large", roomy);
  Rows rows[2];
  int at = 0;
  for (Storage* storage : {small.get(), large.get()}) {
    storage->set_now(1000);
    Table& table = storage->table(spec_of(0, 16));
    table.apply_gradients(keys, gradients.data(), std::nullopt);
    CHECK(table.size() == kRows);
    lookup(table, keys, true);
    table.apply_gradients(keys, gradients.data(), 0.1);
    if (storage == small.get()) copy_as_killed(directory / "small", directory / "killed");
    CHECK(table.erase(gone) == 30000);
    CHECK(table.size() == kRows - 30000);
    rows[at++] = rows_of(table);
  }
  CHECK(rows[0] == rows[1]);
  CHECK(small->stats().tiers.evicted > 10000);
  // Redo of such calls, and again after what it wrote.
  const auto killed = open(directory / "killed");
  Table& table = killed->table(spec_of(0, 16));
  CHECK(table.size() == kRows);
  CHECK(table.erase(gone) == 30000);
  CHECK(rows_of(table) == rows[1]);
}

TEST_CASE("storage: a small log_bytes bounds the log, and operations wait for that rather than let it grow") {
  const TemporaryDirectory directory;
  constexpr uint64_t kLimit = 2 << 20;
  uint64_t most = 0;
  {
    const auto storage = open(directory / "s", small_options(kLimit));
    Table& table = storage->table(spec_of(0, 16, "sgd"));
    for (uint64_t step = 0; step < 60; ++step) {
      const StepBatch batch(step, 4000, 6000, 16);
      table.apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
      most = std::max(most, storage->stats().log_bytes);
    }
    CHECK(storage->stats().tiers.cuts >= 3);
    CHECK(most <= 2 * kLimit + (1 << 20));
    for (int i = 0; i < 500 && storage->stats().log_bytes > kLimit; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    CHECK(storage->stats().log_bytes <= kLimit);
  }
  const auto storage = open(directory / "s", small_options(kLimit));
  CHECK(storage->table(spec_of(0, 16, "sgd")).step() == 60);
}

TEST_CASE("storage: an operation does not wait for a log to be cut that compact() has cut already") {
  const TemporaryDirectory directory;
  {
    const auto storage = open(directory / "s");
    std::vector<uint64_t> keys(200000);
    std::iota(keys.begin(), keys.end(), 0);
    lookup(storage->table(spec_of(0, 4)), keys, true);
  }
  {
    const auto storage = open(directory / "s");
    const StepBatch batch(0, 2000, 1000000, 128);
    storage->table(spec_of(1, 128, "sgd")).apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
    copy_as_killed(directory / "s", directory / "killed");
  }
  std::vector<fs::path> presence;
  for (const auto& entry : fs::recursive_directory_iterator(directory / "killed"))
    if (entry.path().filename() == "presence") presence.push_back(entry.path());
  REQUIRE(presence.size() == 1);
  fs::remove(presence[0]);
  // The thread that cuts a full log has the filter of keys to build first.
  const auto storage = open(directory / "killed", small_options(64 << 10));
  Table& table = storage->table(spec_of(0, 4));
  REQUIRE(storage->stats().log_bytes > 128 << 10);
  storage->compact();
  lookup(table, {200000}, true);
  CHECK(table.size() == 200001);
}

TEST_CASE("storage: a log bound below the log's own head makes no endless cuts") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s", small_options(1));
  Table& table = storage->table(spec_of(0, 4));
  lookup(table, {1, 2, 3}, true);
  storage->commit(1, std::string(100000, 'x'));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  const uint64_t cuts = storage->stats().tiers.cuts;
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  CHECK(storage->stats().tiers.cuts == cuts);
  CHECK(cuts < 10);
  CHECK(table.size() == 3);
}

TEST_CASE("storage: prefetch brings rows in without changing any") {
  const TemporaryDirectory directory;
  std::vector<uint64_t> keys(2000);
  for (uint64_t i = 0; i < keys.size(); ++i) keys[i] = i;
  const std::vector<float> gradients(keys.size() * 4, 0.5f);
  std::vector<float> before;
  {
    const auto storage = open(directory / "s");
    Table& table = storage->table(spec_of(0, 4));
    table.apply_gradients(keys, gradients.data(), std::nullopt);
    before = lookup(table, keys);
  }
  const auto storage = open(directory / "s");
  Table& table = storage->table(spec_of(0, 4));
  CHECK(storage->stats().tiers.hot_rows == 0);
  std::vector<uint64_t> more = keys;
  more.push_back(123456);  // unknown: stays so
  const uint64_t sequence = storage->stats().sequence;
  table.prefetch(more);
  for (int i = 0; i < 500 && storage->stats().tiers.hot_rows < keys.size(); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  CHECK(storage->stats().tiers.hot_rows == keys.size());
  CHECK(lookup(table, keys) == before);
  CHECK(table.size() == keys.size());
  CHECK(storage->stats().sequence == sequence);
}

// ----------------------------------------- checkpoint, restore, scan, dump

TEST_CASE(
    "storage: restore brings back exactly the checkpoint, twice, and training from it repeats itself to the bit") {
  const TemporaryDirectory directory;
  Rows kept_a, kept_b, later_a;
  uint64_t sequence = 0;
  {
    const auto storage = open(directory / "s");
    Table &a = storage->table(spec_of(0, 8)), &b = storage->table(named("user", 3));
    for (uint64_t step = 1; step <= 5; ++step) train_step(*storage, a, b, step, 300, 700);
    lookup(a, {111111, 222222}, true);  // rows without floats
    storage->commit(5, "five");
    sequence = storage->stats().sequence;
    storage->checkpoint(directory / "checkpoint", 5, "user's");
    CHECK_THROWS_WITH_AS(storage->checkpoint(directory / "checkpoint", 5, ""), doctest::Contains("exists already"),
                         StorageError);
    CHECK_THROWS_AS(storage->checkpoint(directory / "no" / "where", 5, ""), StorageError);
    CHECK_THROWS_AS(Storage::restore(directory / "checkpoint", directory / "s"), AlreadyOpenError);
    kept_a = rows_of(a);
    kept_b = rows_of(b);
    storage->table(spec_of(9, 2));  // a group the checkpoint does not know
    for (uint64_t step = 6; step <= 9; ++step) train_step(*storage, a, b, step, 300, 700);
    later_a = rows_of(a);
    CHECK_FALSE(later_a == kept_a);
  }
  const auto checkpoint = files_of(directory / "checkpoint");
  for (const std::string where : {"s", "s", "elsewhere"}) {
    Storage::restore(directory / "checkpoint", directory / where);
    const auto storage = Storage::open(directory / where, small_options(), OpenMode::kOpen);
    CHECK(storage->stats().groups.size() == 2);
    CHECK(storage->stats().sequence == sequence);
    CHECK(storage->last_commit().has_value());
    Table &a = storage->table(spec_of(0, 8)), &b = storage->table(named("user", 3));
    CHECK(a.step() == 5);
    CHECK(a.size() == kept_a.size());
    CHECK(rows_of(a) == kept_a);
    CHECK(rows_of(b) == kept_b);
    for (uint64_t step = 6; step <= 9; ++step) train_step(*storage, a, b, step, 300, 700);
    CHECK(rows_of(a) == later_a);
  }
  CHECK(files_of(directory / "checkpoint") == checkpoint);
  size_t generations = 0;
  for (const auto& entry : fs::directory_iterator(directory / "s"))
    generations += entry.path().filename().string().starts_with("generation-");
  CHECK(generations == 1);
}

TEST_CASE("storage: a checkpoint with any file damaged, cut or missing is refused, and the storage stays as it is") {
  const TemporaryDirectory directory;
  {
    const auto storage = open(directory / "s");
    Table& table = storage->table(spec_of(0, 4));
    lookup(table, {1, 2, 3}, true);
    storage->checkpoint(directory / "checkpoint", 1, "");
    lookup(table, {4}, true);
  }
  const auto before = files_of(directory / "s");
  const auto files = files_of(directory / "checkpoint");
  CHECK(files.size() >= 4);
  for (const auto& [name, good] : files) {
    const fs::path path = directory / "checkpoint" / name;
    CAPTURE(name);
    for (const size_t at : {size_t{0}, good.size() / 2, good.size() - 1}) {
      if (at >= good.size()) continue;
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ 4);
      write_file_atomically(path, bad);
      CHECK_THROWS_AS(Storage::restore(directory / "checkpoint", directory / "s"), CorruptionError);
    }
    write_file_atomically(path, std::string_view(good).substr(0, good.size() / 2));
    if (good.size() > 1) CHECK_THROWS_AS(Storage::restore(directory / "checkpoint", directory / "s"), CorruptionError);
    fs::remove(path);
    CHECK_THROWS_AS(Storage::restore(directory / "checkpoint", directory / "s"), Error);
    write_file_atomically(path, good);
  }
  CHECK_THROWS_WITH_AS(Storage::restore(directory / "s", directory / "t"), doctest::Contains("is not a checkpoint"),
                       StorageError);
  CHECK_FALSE(fs::exists(directory / "t"));
  CHECK(files_of(directory / "s") == before);
  Storage::restore(directory / "checkpoint", directory / "s");
  const auto storage = open(directory / "s");
  CHECK(storage->table(spec_of(0, 4)).size() == 3);
}

TEST_CASE("storage: a scan is the moment it was made, whatever happens while it is read") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table &table = storage->table(spec_of(0, 4)), &other = storage->table(spec_of(1, 4));
  std::vector<uint64_t> keys(5000);
  for (uint64_t i = 0; i < keys.size(); ++i) keys[i] = i;
  const std::vector<float> gradients(keys.size() * 4, 1.0f);
  table.apply_gradients(keys, gradients.data(), std::nullopt);
  other.apply_gradients(keys, gradients.data(), std::nullopt);
  const std::vector<float> then = lookup(table, keys);
  const auto scan = table.scan();
  table.apply_gradients(keys, gradients.data(), std::nullopt);
  table.erase(std::span(keys).first(1000));
  lookup(table, {1000000}, true);
  std::vector<float> floats(64 * scan->num_floats());
  uint64_t found[64];
  uint32_t counts[64];
  int64_t times[64];
  size_t total = 0, wrong = 0;
  while (const size_t got = scan->next(64, found, floats.data(), counts, times)) {
    for (size_t i = 0; i < got; ++i)
      wrong += found[i] >= keys.size() || counts[i] != 1 ||
               std::memcmp(&floats[i * scan->num_floats()], &then[found[i] * 4], 16) != 0;
    total += got;
  }
  CHECK(total == keys.size());
  CHECK(wrong == 0);
  storage->close();
  CHECK_THROWS_AS(scan->next(64, found, floats.data(), counts, times), ClosedError);
}

struct DumpFile {
  std::array<int32_t, 256> dimensions{};
  std::array<uint64_t, 256> counts{};
  std::map<std::pair<int32_t, uint64_t>, std::vector<float>> rows;
};

// The serving file's documented bytes, read by code of its own.
DumpFile read_dump(const fs::path& path) {
  const std::string text = read_file(path, size_t{1} << 26);
  DumpFile dump;
  size_t at = 0;
  const auto take = [&](void* to, size_t size) {
    REQUIRE(at + size <= text.size());
    std::memcpy(to, text.data() + at, size);
    at += size;
  };
  take(dump.dimensions.data(), 1024);
  take(dump.counts.data(), 2048);
  while (at < text.size()) {
    uint64_t key = 0;
    int32_t group = 0;
    take(&key, 8);
    take(&group, 4);
    REQUIRE(group >= 0);
    REQUIRE(group < 256);
    std::vector<float> weights(static_cast<size_t>(dump.dimensions[static_cast<size_t>(group)]));
    take(weights.data(), weights.size() * 4);
    REQUIRE(dump.rows.emplace(std::pair(group, key), weights).second);
  }
  return dump;
}

TEST_CASE(
    "storage: the dump holds every row's weights under group and key, and its head agrees; conditions select rows") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table &a = storage->table(spec_of(2, 3)), &b = storage->table(spec_of(200, 1, "sgd"));
  storage->table(spec_of(9, 7));  // without rows
  storage->set_now(1000);
  const std::vector<float> ones(30, 1.0f);
  a.apply_gradients(std::vector<uint64_t>{1, 2, ~uint64_t{0}}, ones.data(), std::nullopt);
  storage->set_now(2000);
  a.apply_gradients(std::vector<uint64_t>{2}, ones.data(), std::nullopt);
  b.apply_gradients(std::vector<uint64_t>{0}, ones.data(), std::nullopt);
  lookup(a, {77}, true);
  lookup(a, {1}, true);  // a lookup is no update: its time stays

  CHECK(storage->dump(directory / "all.bin", {}) == 5);
  const DumpFile all = read_dump(directory / "all.bin");
  for (size_t g = 0; g < 256; ++g) {
    CHECK(all.dimensions[g] == (g == 2 ? 3 : g == 200 ? 1 : g == 9 ? 7 : 0));
    CHECK(all.counts[g] == (g == 2 ? 4 : g == 200 ? 1 : 0));
  }
  REQUIRE(all.rows.size() == 5);
  for (const uint64_t key : {uint64_t{1}, uint64_t{2}, ~uint64_t{0}, uint64_t{77}})
    CHECK(all.rows.at({2, key}) == lookup(a, {key}));
  CHECK(all.rows.at({200, 0}) == lookup(b, {0}));

  const auto keys_with = [&](const Storage::DumpConditions& conditions) {
    const uint64_t rows = storage->dump(directory / "some.bin", conditions);  // replaces the one before
    const DumpFile some = read_dump(directory / "some.bin");
    CHECK(some.rows.size() == rows);
    std::vector<std::pair<int32_t, uint64_t>> keys;
    for (const auto& [key, weights] : some.rows) {
      CHECK(weights == all.rows.at(key));
      keys.push_back(key);
    }
    return keys;
  };
  using Keys = std::vector<std::pair<int32_t, uint64_t>>;
  CHECK(keys_with({.group = 200}) == Keys{{200, 0}});
  CHECK(keys_with({.group = 2, .min_count = 1}) == Keys{{2, 1}, {2, 2}, {2, ~uint64_t{0}}});
  CHECK(keys_with({.min_count = 2}) == Keys{{2, 2}});
  CHECK(keys_with({.min_count = 3}).empty());
  CHECK(keys_with({.min_count = 1, .updated_since = 1001}).size() == 2);
  CHECK_THROWS_AS(storage->dump(directory / "no" / "where.bin", {}), StorageError);
  CHECK_THROWS_AS(storage->dump(directory / "s", {}), StorageError);
  for (const auto& entry : fs::directory_iterator(directory.path()))
    CHECK(entry.path().string().find(".building") == std::string::npos);
}

TEST_CASE("storage: a dump says how far it is, and what that throws leaves the file of before and no other") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table& table = storage->table(spec_of(2, kMaxDimension, "sgd"));
  storage->table(spec_of(3, 1));
  const uint64_t rows = 2500;  // 16 KB written a row: reported at both ends and twice between them
  std::vector<uint64_t> keys(100);
  for (uint64_t begin = 0; begin < rows; begin += keys.size()) {
    for (uint64_t i = 0; i < keys.size(); ++i) keys[i] = begin + i;
    lookup(table, keys, true);
  }
  using Calls = std::vector<std::pair<uint64_t, uint64_t>>;
  const auto calls_of = [&](const Storage::DumpConditions& conditions) {
    Calls calls;
    storage->dump(directory / "dump.bin", conditions,
                  [&](uint64_t done, uint64_t total) { calls.emplace_back(done, total); });
    return calls;
  };
  const Calls calls = calls_of({});
  REQUIRE(calls.size() == 4);
  CHECK(calls.front() == std::pair(uint64_t{0}, rows));
  CHECK(calls.back() == std::pair(rows, rows));
  CHECK(std::is_sorted(calls.begin(), calls.end()));
  CHECK(calls_of({.min_count = 1}) == calls);  // rows left out are gone through, too
  CHECK(calls_of({.group = 3}) == Calls{{0, 0}, {0, 0}});

  write_file_atomically(directory / "dump.bin", std::string_view("of before"));
  for (const auto& [at, total] : calls) {
    CHECK_THROWS_WITH_AS(storage->dump(directory / "dump.bin", {},
                                       [stop = at](uint64_t done, uint64_t) {
                                         if (done == stop) throw std::runtime_error("enough");
                                       }),
                         "enough", std::runtime_error);
    CHECK(read_file(directory / "dump.bin", 100) == "of before");
  }
  for (const auto& entry : fs::directory_iterator(directory.path()))
    CHECK(entry.path().string().find(".building") == std::string::npos);
}

TEST_CASE("storage: a row of a newer format is refused by every verb that needs it, and stays as it is") {
  const TemporaryDirectory directory;
  const uint64_t key = 7;
  {
    const auto storage = open(directory / "s");
    const std::vector<float> ones(2 * 4, 1.0f);
    storage->table(spec_of(0, 4)).apply_gradients(std::vector<uint64_t>{key, 8}, ones.data(), std::nullopt);
  }
  const StoreOptions cold{.directory = directory / "s" / "generation-000001" / "rocksdb"};
  const StoredKey stored = StoredKey::make(1, mix_key(key));
  const auto stored_bytes = [&] {
    std::string row;
    open_rocksdb_store(cold)->multi_get({&stored, 1}, [&](size_t, Bytes value) {
      row.assign(reinterpret_cast<const char*>(value.data()), value.size());
    });
    return row;
  };
  // What a newer version would have written, under a checksum that agrees.
  std::string newer = stored_bytes();
  REQUIRE(newer.size() > kRowHeaderBytes);
  newer[0] = static_cast<char>(kRowFormat + 1);
  std::fill_n(newer.begin() + 4, 4, '\0');
  const std::string keyed = std::string(reinterpret_cast<const char*>(stored.bytes.data()), StoredKey::kBytes) + newer;
  const auto checksum = static_cast<uint32_t>(checksum64(std::as_bytes(std::span(keyed))));
  std::memcpy(newer.data() + 4, &checksum, sizeof checksum);
  {
    const auto store = open_rocksdb_store(cold);
    const auto writer = store->begin_write();
    writer->put(stored, std::as_bytes(std::span(newer)));
    writer->commit();
  }
  {
    const auto storage = open(directory / "s");
    Table& table = storage->table(spec_of(0, 4));
    const std::vector<uint64_t> keys{8, key};
    const std::vector<float> ones(keys.size() * 4, 1.0f);
    const uint64_t sequence = storage->stats().sequence;
    const auto refused = [](auto&& use) {
      CHECK_THROWS_WITH_AS(use(), doctest::Contains("upgrade damo-embedding"), CorruptionError);
    };
    refused([&] { lookup(table, keys); });
    refused([&] { lookup(table, keys, true); });
    refused([&] { table.apply_gradients(keys, ones.data(), std::nullopt); });
    refused([&] { table.inspect(key); });
    refused([&] { rows_of(table); });
    refused([&] { storage->dump(directory / "dump.bin", {}); });
    CHECK_FALSE(fs::exists(directory / "dump.bin"));
    CHECK(storage->stats().sequence == sequence);
    CHECK(table.step() == 1);
    lookup(table, {8}, true);  // the other row is as good as before
    storage->checkpoint(directory / "checkpoint", 1, "");
  }
  CHECK(stored_bytes() == newer);
}

TEST_CASE("storage: two dumps and two checkpoints to one name at once leave one whole file, one whole checkpoint") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table& table = storage->table(spec_of(0, 4));
  std::vector<uint64_t> keys(20000);
  for (uint64_t i = 0; i < keys.size(); ++i) keys[i] = i;
  lookup(table, keys, true);
  std::vector<std::thread> threads;
  std::atomic<int> checkpoints{0};
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      storage->dump(directory / "dump.bin", {});
      try {
        storage->checkpoint(directory / "checkpoint", 1, "");
        ++checkpoints;
      } catch (const StorageError&) {
        // The other one had the name first.
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(read_dump(directory / "dump.bin").rows.size() == keys.size());
  CHECK(checkpoints == 1);
  Storage::restore(directory / "checkpoint", directory / "restored");
  CHECK(open(directory / "restored")->table(spec_of(0, 4)).size() == keys.size());
  for (const auto& entry : fs::directory_iterator(directory.path()))
    CHECK(entry.path().string().find(".building") == std::string::npos);
}

// ----------------------------------------------------------------- threads

TEST_CASE("storage: threads that meet new keys make one row each and lose no gradient, beside lookups and cuts") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s", small_options(2 << 20));
  TableSpec spec = spec_of(0, 8, "sgd");
  spec.optimizer_settings = {{"lr", 1.0}};
  spec.initializer = "zeros";
  spec.initializer_settings = {};
  Table& table = storage->table(spec);
  constexpr uint64_t kKeys = 3000;
  std::vector<uint64_t> keys(kKeys);
  for (uint64_t i = 0; i < kKeys; ++i) keys[i] = i;
  const std::vector<float> ones(kKeys * 8, 1.0f);
  std::atomic<bool> stop{false};
  std::atomic<int> torn{0}, wrong{0};
  std::vector<std::thread> threads;
  constexpr int kTrainers = 2, kSteps = 12;
  for (int t = 0; t < kTrainers; ++t) {
    threads.emplace_back([&, t] {
      std::vector<float> out(kKeys * 8);
      for (int step = 0; step < kSteps; ++step) {
        if ((step + t) % 2 == 0) table.lookup(keys, out.data(), true, false, std::nullopt);
        table.apply_gradients(keys, ones.data(), std::nullopt);
      }
    });
  }
  std::thread reader([&] {
    std::vector<float> out(kKeys * 8), last(kKeys, 0.0f);
    for (bool insert = false; !stop; insert = !insert) {
      table.lookup(keys, out.data(), insert, false, std::nullopt);
      for (size_t k = 0; k < kKeys; ++k) {
        for (size_t d = 1; d < 8; ++d) torn += out[k * 8 + d] != out[k * 8];
        wrong += out[k * 8] > last[k];  // weights only fall
        last[k] = out[k * 8];
      }
    }
  });
  std::thread scanner([&] {
    while (!stop) {
      const auto scan = table.scan();
      uint64_t some[100];
      std::vector<float> floats(100 * scan->num_floats());
      uint32_t counts[100];
      int64_t times[100];
      std::optional<uint32_t> count;
      while (const size_t got = scan->next(100, some, floats.data(), counts, times)) {
        for (size_t i = 0; i < got; ++i) {
          // Every apply changes all keys, so a moment has one count.
          wrong += counts[i] != count.value_or(counts[i]);
          count = counts[i];
          wrong += floats[i * 8] != -static_cast<float>(counts[i]);
        }
      }
    }
  });
  for (std::thread& thread : threads) thread.join();
  stop = true;
  reader.join();
  scanner.join();
  CHECK(torn == 0);
  CHECK(wrong == 0);
  CHECK(table.size() == kKeys);
  CHECK(lookup(table, keys) == std::vector<float>(kKeys * 8, -float{kTrainers * kSteps}));
  CHECK(table.inspect(17)->update_count == kTrainers * kSteps);
}

// For ThreadSanitizer: an eviction asks for the log, which the open sets when the last of it is redone.
TEST_CASE("storage: what is redone may be evicted while the open ends") {
  const TemporaryDirectory directory;
  StorageOptions roomy = small_options(size_t{512} << 20);
  roomy.memory_bytes = size_t{128} << 20;
  const auto whole = open(directory / "whole", roomy);
  Table& table = whole->table(spec_of(0, 256));
  for (uint64_t i = 1; i <= 18; ++i) {
    const StepBatch batch(i, 600, 100000, 256);
    table.apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
    if (i < 9) continue;  // soon there are more rows than the least memory holds
    const fs::path path = directory / std::to_string(i);
    copy_as_killed(directory / "whole", path);
    const auto killed = open(path);
    CHECK(killed->stats().redone_records == i);
    CHECK(killed->stats().tiers.evicted > 0);
    CHECK(lookup(killed->table(spec_of(0, 256)), batch.keys) == lookup(table, batch.keys));
  }
  CHECK(whole->stats().tiers.evicted == 0);
}

TEST_CASE("storage: cuts and evictions at once do not wait for each other for ever") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s", small_options(2 << 20));
  Table& table = storage->table(spec_of(0, 64));
  std::atomic<bool> stop{false};
  std::thread cutter([&] {
    while (!stop) table.scan();
  });
  for (uint64_t step = 0; step < 25; ++step) {
    const StepBatch batch(step, 1500, 1000000, 64);
    table.apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
  }
  stop = true;
  cutter.join();
  CHECK(storage->stats().tiers.evicted > 0);
  CHECK(table.step() == 25);
}

// ------------------------------------------------------- several tables

// An update of each table, with the gradients of StepBatch.
void apply_together(const std::vector<Table*>& tables, uint64_t step, size_t count, uint64_t distinct) {
  std::vector<StepBatch> batches;
  std::vector<Batch> indexed;
  std::vector<Table::Update> updates;
  for (size_t i = 0; i < tables.size(); ++i) {
    batches.emplace_back(step + 1000 * i, count, distinct, tables[i]->spec().dimension);
    indexed.emplace_back(batches[i].keys, std::nullopt);
  }
  for (size_t i = 0; i < tables.size(); ++i)
    updates.push_back({tables[i], {{&indexed[i], batches[i].gradients.data()}}, std::nullopt});
  Table::apply_gradients(updates);
}

// The same one after the other.
void apply_in_turn(const std::vector<Table*>& tables, uint64_t step, size_t count, uint64_t distinct) {
  for (size_t i = 0; i < tables.size(); ++i) {
    const StepBatch batch(step + 1000 * i, count, distinct, tables[i]->spec().dimension);
    tables[i]->apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
  }
}

// Of three layouts, one with a filter, two that expire.
std::vector<Table*> three_tables(Storage& storage) {
  TableSpec filtered = spec_of(1, 8, "adagrad"), passing = spec_of(2, 3, "sgd");
  filtered.admission.emplace();
  filtered.admission->filter.capacity = 1000;
  filtered.admission->filter.count = 2;
  filtered.lifetime = {.unit = AgeUnit::kSeconds, .ttl = 40};
  filtered.own_lifetime = true;
  passing.lifetime = {.unit = AgeUnit::kSteps, .ttl = 3};
  passing.own_lifetime = true;
  return {&storage.table(spec_of(0, 4)), &storage.table(filtered), &storage.table(passing)};
}

std::vector<Rows> rows_of(const std::vector<Table*>& tables) {
  std::vector<Rows> rows;
  for (Table* table : tables) rows.push_back(rows_of(*table));
  return rows;
}

TEST_CASE("storage: updates of several tables in one call do what they do one after the other") {
  const TemporaryDirectory directory;
  const auto together = open(directory / "together"), apart = open(directory / "apart");
  const std::vector<Table*> a = three_tables(*together), b = three_tables(*apart);
  for (uint64_t step = 0; step < 12; ++step) {
    for (const auto& [storage, tables] : {std::pair(together.get(), &a), std::pair(apart.get(), &b)}) {
      storage->set_now(1000 + 10 * static_cast<int64_t>(step));
      const StepBatch batch(step + 1000, 20, 40, 8);
      std::vector<float> out(batch.gradients.size());
      if (step % 2 == 0) (*tables)[1]->lookup(batch.keys, out.data(), true, false, std::nullopt);
    }
    const uint64_t before = together->stats().sequence;
    apply_together(a, step, 20, 40);
    CHECK(together->stats().sequence == before + 1);
    apply_in_turn(b, step, 20, 40);
  }
  CHECK(a[1]->size() > 0);
  for (size_t i = 0; i < a.size(); ++i) {
    CHECK(a[i]->size() == b[i]->size());
    CHECK(a[i]->step() == b[i]->step());
  }
  CHECK(rows_of(a) == rows_of(b));
  copy_as_killed(directory / "together", directory / "killed");
  const auto killed = open(directory / "killed");
  killed->set_now(together->now());
  CHECK(rows_of(three_tables(*killed)) == rows_of(a));
  CHECK(killed->stats().sequence == together->stats().sequence);
}

TEST_CASE("storage: of a call on several tables a log with a torn end has all, or nothing") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  const std::vector<Table*> tables = three_tables(*storage);
  storage->set_now(1000);
  apply_together(tables, 1, 20, 40);
  const auto before = rows_of(tables);
  copy_as_killed(directory / "s", directory / "before");
  fs::path log;  // the newest
  for (const auto& entry : fs::directory_iterator(directory / "before" / "generation-000001" / "log"))
    log = std::max(log, fs::relative(entry.path(), directory / "before"));
  const auto whole = fs::file_size(directory / "before" / log);
  apply_together(tables, 2, 20, 40);
  copy_as_killed(directory / "s", directory / "after");
  const auto longer = fs::file_size(directory / "after" / log);
  REQUIRE(longer > whole);
  std::vector<uintmax_t> sizes{longer};
  for (uintmax_t size = whole; size < longer; size += 97) sizes.push_back(size);
  for (const uintmax_t size : sizes) {
    fs::remove_all(directory / "torn");
    fs::copy(directory / "after", directory / "torn", fs::copy_options::recursive);
    fs::resize_file(directory / "torn" / log, size);
    const auto torn = open(directory / "torn");
    torn->set_now(1000);
    CHECK(rows_of(three_tables(*torn)) == (size == longer ? rows_of(tables) : before));
  }
}

TEST_CASE("storage: a call on several tables that fails has changed none of them") {
  const TemporaryDirectory directory;
  const std::vector<uint64_t> keys{5, 6};
  const std::vector<float> ones(8, 1.0f);
  {
    const auto storage = open(directory / "s");
    storage->table(spec_of(0, 4)).apply_gradients(keys, ones.data(), std::nullopt);
    storage->table(spec_of(1, 4)).apply_gradients(keys, ones.data(), std::nullopt);
  }
  {  // a damaged row of the second
    const auto store = open_rocksdb_store({.directory = directory / "s" / "generation-000001" / "rocksdb"});
    const auto writer = store->begin_write();
    writer->put(StoredKey::make(2, mix_key(6)), std::as_bytes(std::span(ones)));
    writer->commit();
  }
  const FaultScope faults;
  const auto storage = open(directory / "s");
  Table &first = storage->table(spec_of(0, 4)), &second = storage->table(spec_of(1, 4));
  const auto before = rows_of(first);
  const uint64_t sequence = storage->stats().sequence;
  const std::vector<uint64_t> sound{5, 9};
  const Batch batch(keys, std::nullopt), readable(sound, std::nullopt);
  const std::vector<Table::Update> damaged{{&first, {{&batch, ones.data()}}, std::nullopt},
                                           {&second, {{&batch, ones.data()}}, std::nullopt}},
      good{{&first, {{&batch, ones.data()}}, std::nullopt}, {&second, {{&readable, ones.data()}}, std::nullopt}};
  CHECK_THROWS_AS(Table::apply_gradients(damaged), CorruptionError);
  system_faults.pwritev_error = ENOSPC;
  CHECK_THROWS_AS(Table::apply_gradients(good), StorageError);
  system_faults.clear();
  CHECK(rows_of(first) == before);
  CHECK(first.step() == 1);
  CHECK(second.step() == 1);
  CHECK(second.size() == 2);
  CHECK(storage->stats().sequence == sequence);
  Table::apply_gradients(good);  // and nothing is left of those that failed
  CHECK(first.step() == 2);
  CHECK(second.step() == 2);
  CHECK(second.size() == 3);
  CHECK(storage->stats().sequence == sequence + 1);
}

TEST_CASE("storage: updates of several tables that memory does not hold together equal those with memory for all") {
  const TemporaryDirectory directory;
  StorageOptions roomy = small_options();
  roomy.memory_bytes = size_t{192} << 20;
  const auto small = open(directory / "small"), large = open(directory / "large", roomy);
  std::vector<std::vector<Rows>> rows;
  for (Storage* storage : {small.get(), large.get()}) {
    storage->set_now(1000);
    // Each fits; some need the room of others, in slabs of sizes of their own.
    std::vector<Table*> tables;
    for (uint32_t group = 0; group < 20; ++group) tables.push_back(&storage->table(spec_of(group, 60 + 8 * group)));
    for (uint64_t step = 0; step < 4; ++step) apply_together(tables, step, 800, 2000);
    if (storage == small.get()) copy_as_killed(directory / "small", directory / "killed");
    rows.push_back(rows_of(tables));
  }
  CHECK(rows[0] == rows[1]);
  CHECK(small->stats().tiers.evicted > 1000);
  const auto killed = open(directory / "killed");
  std::vector<Table*> tables;
  for (uint32_t group = 0; group < 20; ++group) tables.push_back(&killed->table(spec_of(group, 60 + 8 * group)));
  CHECK(rows_of(tables) == rows[1]);
}

// ------------------------------------------------------------------ errors

TEST_CASE("storage: a gradient that is not finite names its key, and no table of the call changes") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table &a = storage->table(spec_of(0, 2)), &b = storage->table(spec_of(1, 2));
  const std::vector<uint64_t> keys{5, 6, 5, 7};
  std::vector<float> good(8, 1.0f), bad = good;
  bad[6] = std::numeric_limits<float>::quiet_NaN();
  const Batch batch(keys, std::nullopt);
  const uint64_t before = storage->stats().sequence;
  const std::vector<Table::Update> updates{{&a, {{&batch, good.data()}}, std::nullopt},
                                           {&b, {{&batch, bad.data()}}, std::nullopt}};
  CHECK_THROWS_WITH_AS(Table::apply_gradients(updates), doctest::Contains("the gradient of key 7 of group 1"),
                       std::invalid_argument);
  bad[6] = 1.0f;
  bad[0] = bad[4] = std::numeric_limits<float>::max();  // finite, but not their sum
  CHECK_THROWS_WITH_AS(a.apply_gradients(keys, bad.data(), std::nullopt), doctest::Contains("key 5"),
                       std::invalid_argument);
  CHECK_THROWS_AS(a.apply_gradients(keys, good.data(), -1.0), std::invalid_argument);
  CHECK_THROWS_AS(a.apply_gradients(keys, good.data(), std::numeric_limits<double>::quiet_NaN()),
                  std::invalid_argument);
  CHECK(storage->stats().sequence == before);
  CHECK(a.size() == 0);
  CHECK(a.step() == 0);
  a.apply_gradients(std::span<const uint64_t>{}, nullptr, std::nullopt);
  lookup(a, {});
  CHECK(a.step() == 0);
}

TEST_CASE("storage: when the log cannot be written, the operation fails with nothing changed, and the next succeeds") {
  const TemporaryDirectory directory;
  const FaultScope faults;
  const auto storage = open(directory / "s");
  Table& table = storage->table(spec_of(0, 4));
  const std::vector<float> ones(12, 1.0f);
  const std::vector<uint64_t> keys{1, 2, 3};
  table.apply_gradients(keys, ones.data(), std::nullopt);
  storage->commit(1, "one");
  const std::vector<float> before = lookup(table, keys), fresh = lookup(table, {9, 10});
  system_faults.pwritev_error = ENOSPC;
  CHECK_THROWS_AS(table.apply_gradients(keys, ones.data(), std::nullopt), StorageError);
  CHECK_THROWS_AS(table.apply_gradients(std::vector<uint64_t>{1, 9, 10}, ones.data(), std::nullopt), StorageError);
  CHECK_THROWS_AS(lookup(table, {9, 10}, true), StorageError);
  CHECK_THROWS_AS(table.erase(keys), StorageError);
  CHECK_THROWS_AS(storage->commit(2, "two"), StorageError);
  CHECK(lookup(table, keys, true) == before);
  CHECK(lookup(table, {9, 10}) == fresh);
  CHECK(table.size() == 3);
  CHECK(table.step() == 1);
  CHECK(storage->last_commit()->step == 1);
  system_faults.clear();
  CHECK(lookup(table, {9, 10}, true) == fresh);
  table.apply_gradients(keys, ones.data(), std::nullopt);
  CHECK(table.step() == 2);
  CHECK(table.size() == 5);
  copy_as_killed(directory / "s", directory / "killed");
  const auto again = open(directory / "killed");
  Table& redone = again->table(spec_of(0, 4));
  CHECK(redone.size() == 5);
  CHECK(rows_of(redone) == rows_of(table));
}

TEST_CASE(
    "storage: when a log segment cannot be ended, operations fail and lookups go on; reopening has what returned") {
  const TemporaryDirectory directory;
  const FaultScope faults;
  uint64_t returned = 0;
  std::vector<float> last;
  const std::vector<uint64_t> some{0x9E3779B97F4A7C15ULL, 0};
  {
    const auto storage = open(directory / "s", small_options(8 << 20));
    Table& table = storage->table(spec_of(0, 16, "sgd"));
    system_faults.fdatasync_error = EIO;
    CHECK_THROWS_AS(
        [&] {
          for (; returned < 40; ++returned) {
            const StepBatch batch(returned, 4000, 6000, 16);
            table.apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
          }
        }(),
        StorageError);
    CHECK(returned > 0);
    last = lookup(table, some);
    CHECK(lookup(table, some, true) == last);
    CHECK(table.step() == returned);
    try {
      storage->close();
    } catch (const StorageError&) {
      // Its last sync failed, and it says so.
    }
  }
  system_faults.clear();
  const auto storage = open(directory / "s", small_options(8 << 20));
  Table& table = storage->table(spec_of(0, 16, "sgd"));
  CHECK(table.step() == returned);
  CHECK(lookup(table, some) == last);
}

TEST_CASE("storage: in mode durable an operation returns synced, in mode logged only a commit does") {
  const TemporaryDirectory directory;
  for (const Durability durability : {Durability::kLogged, Durability::kDurable}) {
    StorageOptions options = small_options();
    options.durability = durability;
    const auto storage = open(directory / (durability == Durability::kDurable ? "durable" : "logged"), options);
    Table& table = storage->table(spec_of(0, 4));
    const uint64_t synced = storage->stats().synced_sequence;
    lookup(table, {1, 2, 3}, true);
    StorageStats stats = storage->stats();
    CHECK(stats.sequence > synced);
    CHECK((stats.synced_sequence == stats.sequence) == (durability == Durability::kDurable));
    storage->commit(1, "");
    stats = storage->stats();
    CHECK(stats.synced_sequence == stats.sequence);
  }
}

TEST_CASE("storage: in mode commit each commit keeps one moment of a storage that other threads change") {
  const TemporaryDirectory directory;
  StorageOptions options = small_options();
  options.durability = Durability::kCommit;
  const auto storage = open(directory / "s", options);
  Table& a = storage->table(spec_of(1, 400));
  Table& b = storage->table(spec_of(2, 300, "adagrad"));
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (Table* table : {&a, &b}) {
    threads.emplace_back([&, table] {
      for (uint64_t step = 0; !stop; ++step) {
        const StepBatch batch(step, 300, 20'000, table->spec().dimension);
        table->apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
        if (step % 3 == 0) table->erase(std::span(batch.keys).first(50));
      }
    });
  }
  while (a.step() == 0 || b.step() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  for (int64_t number = 0; number < 6; ++number) {
    const uint64_t before = storage->stats().sequence;
    storage->commit(number, "x");
    const StorageStats stats = storage->stats();
    CHECK(stats.synced_sequence > before);
    CHECK(stats.log_bytes == 0);
    // As a crash would leave it.
    const fs::path copy = directory / ("copy" + std::to_string(number));
    fs::create_directory(copy);
    fs::copy(directory / "s" / "CURRENT", copy);
    const fs::path live = live_generation(directory / "s");
    fs::copy(live, copy / live.filename(), fs::copy_options::recursive);
    const auto found = open(copy);
    const StorageStats there = found->stats();
    CHECK(there.sequence == stats.synced_sequence);
    CHECK(there.redone_records == 0);
    REQUIRE(found->last_commit());
    CHECK(found->last_commit()->step == number);
    CHECK(there.groups.size() == 2);
    const VerifyReport report = found->verify();  // compares the counts with the rows
    CHECK(report.damages.empty());
    CHECK(report.rows > 0);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  CHECK(storage->stats().tiers.evicted > 0);
}

TEST_CASE("storage: in mode commit a failed commit leaves the recovery point, and a failed close says so") {
  const FaultScope faults;
  const TemporaryDirectory directory;
  StorageOptions options = small_options();
  options.durability = Durability::kCommit;
  const StepBatch batch(1, 100, 50, 8);
  {
    const auto storage = open(directory / "s", options);
    Table& table = storage->table(spec_of(1, 8));
    table.apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
    storage->commit(1, "");
    const fs::path live = live_generation(directory / "s");
    for (const bool changed : {false, true}) {
      if (changed) table.apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
      system_faults.fsync_directory_error = EIO;
      CHECK_THROWS_AS(storage->commit(2, ""), StorageError);
      CHECK(live_generation(directory / "s") == live);
      CHECK(storage->last_commit()->step == 1);
      system_faults.clear();
    }
    storage->commit(3, "");
    CHECK(live_generation(directory / "s") != live);
    table.apply_gradients(batch.keys, batch.gradients.data(), std::nullopt);
    system_faults.fsync_directory_error = EIO;
    CHECK_THROWS_AS(storage->close(), StorageError);
    CHECK(storage->closed());
  }
  system_faults.clear();
  const auto storage = open(directory / "s");
  CHECK(storage->last_commit()->step == 3);
  CHECK(storage->table(spec_of(1, 8)).step() == 2);
}

TEST_CASE("storage: after close every verb is ClosedError; closing again is nothing") {
  const TemporaryDirectory directory;
  const auto storage = open(directory / "s");
  Table& table = storage->table(spec_of(0, 4));
  lookup(table, {1}, true);
  storage->close();
  storage->close();
  CHECK(storage->closed());
  const std::vector<uint64_t> keys{1};
  std::vector<float> floats(4);
  bool there = false;
  const std::vector<std::function<void()>> verbs{
      [&] { storage->table(spec_of(0, 4)); },
      [&] { storage->commit(1, ""); },
      [&] { storage->last_commit(); },
      [&] { storage->checkpoint(directory / "c", 1, ""); },
      [&] { storage->dump(directory / "d", {}); },
      [&] { storage->now(); },
      [&] { storage->set_now(1); },
      [&] { storage->stats(); },
      [&] { table.lookup(keys, floats.data(), true, false, std::nullopt); },
      [&] { table.lookup(keys, floats.data(), false, false, std::nullopt); },
      [&] { table.apply_gradients(keys, floats.data(), std::nullopt); },
      [&] { table.erase(keys); },
      [&] { table.contains(keys, &there); },
      [&] { table.inspect(1); },
      [&] { table.prefetch(keys); },
      [&] { table.scan(); },
  };
  for (const auto& verb : verbs) CHECK_THROWS_AS(verb(), ClosedError);
  CHECK_FALSE(fs::exists(directory / "c"));
  CHECK(open(directory / "s")->table(spec_of(0, 4)).size() == 1);
}

TEST_CASE("storage: in a forked child every verb is ForkedHandleError, and letting the handle go ends at once") {
  const TemporaryDirectory directory;
  auto storage = open(directory / "s");
  Table& table = storage->table(spec_of(0, 4));
  lookup(table, {1}, true);
  auto scan = table.scan();
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::alarm(20);  // a child that hangs dies by it
    int refused = 0;
    const auto check = [&](const std::function<void()>& verb) {
      try {
        verb();
      } catch (const ForkedHandleError&) {
        ++refused;
      } catch (...) {
      }
    };
    std::vector<float> floats(100);
    uint64_t key = 1;
    uint32_t count = 0;
    int64_t time = 0;
    check([&] { table.lookup({&key, 1}, floats.data(), true, false, std::nullopt); });
    check([&] { table.apply_gradients({&key, 1}, floats.data(), std::nullopt); });
    check([&] { storage->commit(1, ""); });
    check([&] { storage->stats(); });
    check([&] { storage->close(); });
    check([&] { scan->next(1, &key, floats.data(), &count, &time); });
    scan.reset();
    storage.reset();
    ::_exit(refused);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 6);
  // The parent noticed nothing.
  lookup(table, {2}, true);
  CHECK(table.size() == 2);
  scan.reset();
  storage->close();
  CHECK(open(directory / "s")->table(spec_of(0, 4)).size() == 2);
}

}  // namespace
}  // namespace damo
