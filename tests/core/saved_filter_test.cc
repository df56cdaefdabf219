// SPDX-License-Identifier: Apache-2.0
#include "saved_filter.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>

#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "file.h"
#include "system_faults.h"
#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;
using testing::FaultScope;
using testing::system_faults;
using testing::TemporaryDirectory;

constexpr size_t kAnyBytes = size_t{1} << 30;
const FilterSettings kSmall{100, 3, 1e-2, 0};

SavedFilter saved_as(uint32_t table_id = 3, uint64_t sequence = 42, char storage = 7) {
  SavedFilter saved{.storage_id = {}, .table_id = table_id, .sequence = sequence};
  saved.storage_id[0] = static_cast<std::byte>(storage);
  return saved;
}

std::vector<uint64_t> random_keys(size_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint64_t> keys(n);
  for (uint64_t& key : keys) key = random();
  return keys;
}

std::string counters_of(const CountingBloomFilter& filter) {
  std::string all = std::to_string(filter.adds()) + ":";
  for (size_t i = 0; i < filter.num_chunks(); ++i)
    all.append(reinterpret_cast<const char*>(filter.chunk(i).data()), filter.chunk(i).size());
  return all;
}

std::shared_ptr<CountingBloomFilter> filter_of(const FilterSettings& settings, size_t keys = 0, uint64_t seed = 1) {
  auto filter = std::make_shared<CountingBloomFilter>(settings);
  filter->add(random_keys(keys, seed));
  return filter;
}

void save(const fs::path& directory, const SavedFilter& saved, const std::shared_ptr<CountingBloomFilter>& filter) {
  FilterSaver saver(directory, saved, filter);
  saver.save();
  saver.end();
}

// What reading it says; "" when it is read.
std::string error_of_read(const fs::path& directory, const FilterSettings& settings = kSmall,
                          const SavedFilter& saved = saved_as()) {
  CountingBloomFilter filter(settings);
  try {
    read_saved_filter(directory, saved, filter);
    return "";
  } catch (const CorruptionError& error) {
    return error.what();
  }
}

TEST_CASE("saved filter: the file has the filter of one moment, whatever is added while it is written") {
  const TemporaryDirectory directory;
  for (const uint64_t halve_every : {uint64_t{0}, uint64_t{30'000}}) {
    const FilterSettings settings{200'000, 5, 1e-3, halve_every};
    const auto filter = filter_of(settings, 20'000);
    const std::string at_cut = counters_of(*filter);
    std::mutex order;
    auto saver = std::make_unique<FilterSaver>(directory.path(), saved_as(), filter);
    filter->add(random_keys(50, 2));  // some chunks before anybody saves
    std::thread adder([&] {
      for (uint64_t i = 0; i < 20; ++i) {
        const std::lock_guard lock(order);
        filter->add(random_keys(1'000, 10 + i));
      }
    });
    saver->save();
    {
      const std::lock_guard lock(order);
      saver->end();
    }
    adder.join();
    saver.reset();
    CountingBloomFilter back(settings);
    read_saved_filter(directory.path(), saved_as(), back);
    CHECK(counters_of(back) == at_cut);
    CHECK(counters_of(*filter) != at_cut);
    CHECK_FALSE(fs::exists(directory / (saved_as().name() + ".tmp")));
  }
}

TEST_CASE("saved filter: cut off at any length it is refused, and says where") {
  const FaultScope faults;
  system_faults.skip_syncs = true;
  const TemporaryDirectory directory;
  save(directory.path(), saved_as(), filter_of(kSmall, 100));
  const fs::path file = directory / saved_as().name();
  const std::string whole = read_file(file, kAnyBytes);
  REQUIRE(whole.size() == 4096 + 4096 + 8);
  for (size_t size = whole.size(); size-- > 0;) {
    fs::resize_file(file, size);
    const std::string said = error_of_read(directory.path());
    CAPTURE(size);
    REQUIRE(said.find(file.string() + " is damaged at offset " + std::to_string(size)) != std::string::npos);
  }
  write_file_atomically(file, whole + "x");
  CHECK(error_of_read(directory.path()).find("8201 bytes, expected 8200") != std::string::npos);
  write_file_atomically(file, whole);
  CHECK(error_of_read(directory.path()).empty());
}

TEST_CASE("saved filter: of ten thousand random flips, and one in each byte, all are refused") {
  const FaultScope faults;
  system_faults.skip_syncs = true;
  const TemporaryDirectory directory;
  save(directory.path(), saved_as(), filter_of(kSmall, 100));
  const fs::path file = directory / saved_as().name();
  const std::string whole = read_file(file, kAnyBytes);
  const FileDescriptor out("change", file, O_RDWR);
  std::mt19937_64 random(5);
  for (size_t i = 0; i < whole.size() + 10'000; ++i) {
    const size_t at = i < whole.size() ? i : random() % whole.size();
    const std::string bad(1, static_cast<char>(whole[at] ^ (1 << random() % 8)));
    out.write_at(std::as_bytes(std::span(bad)), at);
    CAPTURE(at);
    const std::string said = error_of_read(directory.path());
    REQUIRE(said.find(file.string()) != std::string::npos);
    REQUIRE(said.find("offset") != std::string::npos);
    out.write_at(std::as_bytes(std::span(whole)).subspan(at, 1), at);
  }
  CHECK(error_of_read(directory.path()).empty());
}

TEST_CASE("saved filter: that of another storage, table, moment or of other settings is refused, and so is none") {
  const TemporaryDirectory directory;
  save(directory.path(), saved_as(), filter_of(kSmall, 50));
  const fs::path file = directory / saved_as().name();
  for (const SavedFilter& other : {saved_as(4), saved_as(3, 43), saved_as(3, 42, 8)}) {
    if (!fs::exists(directory / other.name())) fs::copy_file(file, directory / other.name());
    CHECK(error_of_read(directory.path(), kSmall, other).find("checksum does not match") != std::string::npos);
  }
  const std::string said = error_of_read(directory.path(), {100, 4, 1e-2, 0});
  CHECK(said.find("capacity=100, count=3") != std::string::npos);
  fs::remove(file);
  CHECK(error_of_read(directory.path()).find(file.string()) != std::string::npos);
  CHECK(error_of_read(directory.path()).find("is missing") != std::string::npos);
}

TEST_CASE("saved filter: sealed again for another storage it is the same filter, and damage does not come along") {
  const TemporaryDirectory directory;
  fs::create_directory(directory / "to");
  const auto filter = filter_of(kSmall, 80);
  save(directory.path(), saved_as(), filter);
  reseal_saved_filter(directory.path(), saved_as(), kSmall, directory / "to", saved_as(3, 42, 9));
  CountingBloomFilter back(kSmall);
  read_saved_filter(directory / "to", saved_as(3, 42, 9), back);
  CHECK(counters_of(back) == counters_of(*filter));
  CHECK(error_of_read(directory / "to") != "");
  fs::resize_file(directory / saved_as().name(), 5000);
  CHECK_THROWS_AS(reseal_saved_filter(directory.path(), saved_as(), kSmall, directory / "to", saved_as(4)),
                  CorruptionError);
  CHECK_FALSE(fs::exists(directory / "to" / saved_as(4).name()));
}

// No file may grow beyond `bytes`, as on a full disk.
struct SizeLimit {
  explicit SizeLimit(rlim_t bytes) : handler(::signal(SIGXFSZ, SIG_IGN)) {
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
    const struct rlimit small { bytes, before.rlim_max };
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  }
  ~SizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before);
    ::signal(SIGXFSZ, handler);
  }
  struct rlimit before {};
  sighandler_t handler;
};

TEST_CASE("saved filter: on a full disk the save fails and leaves no file; adds go on, and the next save succeeds") {
  const TemporaryDirectory directory;
  const FilterSettings settings{100'000, 5, 1e-3, 0};
  const auto filter = filter_of(settings, 1'000);
  for (const bool met_by_an_add : {false, true}) {
    {
      const SizeLimit full(200'000);
      FilterSaver saver(directory.path(), saved_as(), filter);
      if (met_by_an_add) CHECK_NOTHROW(filter->add(random_keys(2'000, 3)));
      CHECK_THROWS_AS(saver.save(), StorageError);
      saver.end();
    }
    CHECK(fs::is_empty(directory.path()));
  }
  save(directory.path(), saved_as(), filter);
  CountingBloomFilter back(settings);
  read_saved_filter(directory.path(), saved_as(), back);
  CHECK(counters_of(back) == counters_of(*filter));
}

}  // namespace
}  // namespace damo
