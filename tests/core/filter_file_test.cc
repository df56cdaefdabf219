// SPDX-License-Identifier: Apache-2.0
#include "filter_file.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "error.h"
#include "standalone_filter.h"
#include "system_faults.h"
#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;
using testing::FaultScope;
using testing::system_faults;
using testing::TemporaryDirectory;
using Keys = std::vector<uint64_t>;

constexpr size_t kAnyBytes = size_t{1} << 30;
const FilterSettings kSettings{200, 3, 1e-2, 1000};

Keys keys_from(uint64_t first, size_t n) {
  Keys keys(n);
  for (size_t i = 0; i < n; ++i) keys[i] = first + i;
  return keys;
}

// Without a zero byte, so that bytes lost to zeros are lost.
Keys full_keys(uint64_t first, size_t n) {
  Keys keys = keys_from(first, n);
  for (uint64_t& key : keys) key = mix_key(key) | 0x0101010101010101;
  return keys;
}

std::string counters_of(const CountingBloomFilter& filter) {
  std::string all = std::to_string(filter.adds()) + ":";
  for (size_t i = 0; i < filter.num_chunks(); ++i)
    all.append(reinterpret_cast<const char*>(filter.chunk(i).data()), filter.chunk(i).size());
  return all;
}

// A filter with its file, as StandaloneFilter has them.
struct Opened {
  explicit Opened(const fs::path& path, const FilterSettings& settings = kSettings, bool reload = true)
      : filter(settings), file(path, filter, reload) {}
  void add(const Keys& keys, uint32_t num = 1) {
    file.append(keys, num);
    filter.add(keys, num);
    file.compact();
  }
  CountingBloomFilter filter;
  FilterFile file;
};

// What opening the file says, or "" and what it holds.
std::string error_of_open(const fs::path& path, const FilterSettings& settings = kSettings, bool reload = true) {
  try {
    Opened opened(path, settings, reload);
    return "";
  } catch (const CorruptionError& error) {
    return std::string("CorruptionError ") + error.what();
  } catch (const SchemaMismatchError& error) {
    return std::string("SchemaMismatchError ") + error.what();
  } catch (const StorageError& error) {
    return std::string("StorageError ") + error.what();
  }
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const StorageError& error) {
    return error.what();
  }
  return "";
}

// No file may grow beyond `bytes`: writes then fail, as they do on a full disk.
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

TEST_CASE("filter file: what was added is there again, after a close and without one") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  CountingBloomFilter expected(kSettings);
  for (int round = 0; round < 6; ++round) {
    Opened opened(path);
    REQUIRE(counters_of(opened.filter) == counters_of(expected));
    // Halvings lie within calls, between them, and in what is read again.
    for (int i = 0; i < 5; ++i) {
      const Keys keys = keys_from(static_cast<uint64_t>(round * 100 + i), 70);
      opened.add(keys, static_cast<uint32_t>(i));
      expected.add(keys, static_cast<uint32_t>(i));
    }
    opened.add({});
    CHECK(counters_of(opened.filter) == counters_of(expected));
    if (round % 2 == 0) opened.file.close();
    opened.file.close();
  }
  CHECK(fs::exists(directory / "seen.filter.lock"));
  CHECK_FALSE(fs::exists(directory / "seen.filter.tmp"));
  struct stat info {};
  REQUIRE(::stat(path.c_str(), &info) == 0);
  CHECK(info.st_blocks * 512 >= info.st_size);  // no holes, so nothing that a full disk could refuse later
}

TEST_CASE("filter file: a long log gives way to the counters, and a call longer than a record is one call") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  const FilterSettings settings{20000, 3, 1e-2, 0};
  CountingBloomFilter expected(settings);
  {
    Opened opened(path, settings);
    const uint64_t empty = opened.file.bytes();
    uint64_t longest = empty;
    ::chmod(path.c_str(), 0600);
    for (uint64_t i = 0; i < 12; ++i) {
      const Keys keys = keys_from(i * 1000, 100000);
      opened.add(keys, 1);
      expected.add(keys, 1);
      longest = std::max(longest, opened.file.bytes());
      CHECK(opened.file.bytes() == fs::file_size(path));
    }
    CHECK(longest < empty + (6 << 20));
    CHECK(longest > empty + (3 << 20));
    CHECK(fs::status(path).permissions() ==
          (fs::perms::owner_read | fs::perms::owner_write));  // as the user has set it
  }
  Opened again(path, settings);
  CHECK(counters_of(again.filter) == counters_of(expected));
}

TEST_CASE("filter file: cut at any length it is refused and left as it is") {
  const FaultScope faults;
  system_faults.skip_syncs = true;
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  {
    Opened opened(path);
    for (uint64_t i = 0; i < 3; ++i) opened.add(keys_from(i, 10));
    opened.file.close();
  }
  const std::string whole = read_file(path, kAnyBytes);
  REQUIRE(whole.size() == 4096 + 4096 + 8 + 3 * (24 + 80));
  for (size_t size = 0; size < whole.size(); ++size) {
    const std::string part = whole.substr(0, size);
    write_file_atomically(path, part);
    const std::string error = error_of_open(path);
    CAPTURE(size);
    REQUIRE(error.starts_with("CorruptionError [read] " + path.string() + " is damaged at offset "));
    REQUIRE(read_file(path, kAnyBytes) == part);
    size += (size > 600 && size < 4000) || (size > 4200 && size < 8100) ? 6 : 0;
  }
  write_file_atomically(path, whole);
  CHECK(error_of_open(path) == "");
}

TEST_CASE("filter file: a changed bit anywhere is found and named by its offset") {
  const FaultScope faults;
  system_faults.skip_syncs = true;
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  {
    Opened opened(path);
    for (uint64_t i = 0; i < 3; ++i) opened.add(keys_from(i, 10));
    opened.file.close();
  }
  const std::string whole = read_file(path, kAnyBytes);
  for (size_t at = 0; at<whole.size(); at += at> 700 && at < 8000 ? 5 : 1) {
    std::string changed = whole;
    changed[at] = static_cast<char>(changed[at] ^ (1 << at % 8));
    write_file_atomically(path, changed);
    const std::string error = error_of_open(path);
    CAPTURE(at);
    CAPTURE(error);
    REQUIRE(error.starts_with("CorruptionError "));
    // A higher version is no damage; all else says where it is.
    if (at < 8 || at > 11) REQUIRE(error.find("is damaged at offset ") != std::string::npos);
    REQUIRE(read_file(path, kAnyBytes) == changed);
  }
}

TEST_CASE("filter file: a call that was cut short is there whole or not at all") {
  // As kill -9 would leave it: bytes behind the mark that no call has returned for.
  const FaultScope faults;
  system_faults.skip_syncs = true;
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  std::string before, after;
  {
    Opened opened(path);
    opened.add(keys_from(0, 10));
    opened.file.sync();
    before = read_file(path, kAnyBytes);
    opened.add(keys_from(100, 10));
    after = read_file(path, kAnyBytes);
  }
  CountingBloomFilter ten(kSettings);
  ten.add(keys_from(0, 10));
  for (size_t size = before.size(); size <= after.size(); ++size) {
    write_file_atomically(path, before + after.substr(before.size(), size - before.size()));
    Opened opened(path);
    REQUIRE(counters_of(opened.filter) == counters_of(ten));
    REQUIRE(fs::file_size(path) == before.size());
  }
  write_file_atomically(path, after);
  ten.add(keys_from(100, 10));
  CHECK(counters_of(Opened(path).filter) == counters_of(ten));
  // What has returned is under the mark, though nothing was synced: that it is gone is damage.
  for (size_t size = before.size(); size < after.size(); ++size) {
    write_file_atomically(path, after.substr(0, size));
    REQUIRE(error_of_open(path).starts_with("CorruptionError"));
  }
}

TEST_CASE("filter file: after a power loss everything synced is there, and a prefix of what followed") {
  // A mark of another boot of the machine: what was not synced may have been lost.
  const FaultScope faults;
  system_faults.skip_syncs = true;
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  size_t synced = 0, head = 4096 + 4096 + 8;
  {
    Opened opened(path);
    opened.add(full_keys(0, 10));
    opened.file.sync();
    synced = fs::file_size(path);
    opened.add(full_keys(100, 10));
    opened.add(full_keys(200, 10));
  }
  std::string whole = read_file(path, kAnyBytes);
  const auto mark = std::span(whole).subspan(512, 24);
  mark[16] = static_cast<char>(mark[16] ^ 1);
  const uint64_t checksum = checksum64(std::as_bytes(mark));
  std::memcpy(whole.data() + 536, &checksum, 8);
  std::vector<std::string> states;
  CountingBloomFilter model(kSettings);
  for (uint64_t i = 0; i < 3; ++i) {
    model.add(full_keys(i * 100, 10));
    states.push_back(counters_of(model));
  }
  const size_t record = synced - head;
  for (size_t size = head; size <= whole.size(); ++size) {
    for (const bool zeros : {false, true}) {  // a file system may give the length back, but not the bytes
      std::string left = whole.substr(0, size);
      if (zeros) left.resize(whole.size());
      write_file_atomically(path, left);
      CAPTURE(size);
      if (size < synced) {
        REQUIRE(error_of_open(path).starts_with("CorruptionError"));
        continue;
      }
      {
        Opened opened(path);
        REQUIRE(counters_of(opened.filter) == states[(size - head) / record - 1]);
        opened.add(full_keys(5, 1));
      }
      // And from here on it is as any other: of this boot, so to be whole.
      Opened again(path);
      REQUIRE(again.filter.adds() == (size - head) / record * 10 + 1);
    }
  }
}

TEST_CASE("filter file: one of other settings is refused with both, and left as it is") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  {
    Opened opened(path);
    opened.add(keys_from(0, 10));
  }
  const std::string bytes = read_file(path, kAnyBytes);
  for (const FilterSettings& other : {FilterSettings{201, 3, 1e-2, 1000}, FilterSettings{200, 4, 1e-2, 1000},
                                      FilterSettings{200, 3, 2e-2, 1000}, FilterSettings{200, 3, 1e-2, 0}}) {
    const std::string error = error_of_open(path, other);
    CHECK(error.starts_with("SchemaMismatchError [open] " + path.string() +
                            " is a filter with capacity=200, count=3, fpr=0.01, halve_every=1000; asked for "));
    CHECK(read_file(path, kAnyBytes) == bytes);
  }
}

TEST_CASE("filter file: without reload a filter of any state is replaced, but no other file is, nor is it locked") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  {
    Opened opened(path);
    opened.add(keys_from(0, 10));
    opened.file.close();
  }
  const FilterSettings other{500, 2, 1e-3, 0};
  CHECK(error_of_open(path, other, false) == "");
  CHECK(Opened(path, other).filter.adds() == 0);
  write_file_atomically(path, read_file(path, kAnyBytes).substr(0, 50));  // damaged
  CHECK(error_of_open(path, other).starts_with("CorruptionError"));
  CHECK(error_of_open(path, kSettings, false) == "");
  CHECK(Opened(path).filter.adds() == 0);

  const fs::path letter = directory / "letter.txt";
  for (const std::string text : {"", "Dear", "Dear reader, this is not a filter"}) {
    write_file_atomically(letter, text);
    for (const bool reload : {false, true}) {
      CHECK(error_of_open(letter, kSettings, reload).starts_with("CorruptionError"));
      CHECK(read_file(letter, 100) == text);
      CHECK_FALSE(fs::exists(directory / "letter.txt.lock"));
    }
  }
  for (const bool reload : {false, true}) {
    CHECK(error_of_open(directory.path(), kSettings, reload).starts_with("StorageError"));
    CHECK(error_of_open("/dev/null", kSettings, reload).starts_with("StorageError [open] /dev/null is not a file"));
    CHECK(error_of_open(directory / "no" / "filter", kSettings, reload).starts_with("StorageError"));
  }
  REQUIRE(::mkfifo((directory / "pipe").c_str(), 0600) == 0);
  CHECK(error_of_open(directory / "pipe").starts_with("StorageError"));  // and does not wait for a writer
}

TEST_CASE("filter file: through a symbolic link the file it leads to is used") {
  const TemporaryDirectory directory;
  fs::create_directory(directory / "data");
  { Opened made(directory / "data" / "f"); }
  fs::create_symlink(directory / "data" / "f", directory / "link");
  const FilterSettings settings{20000, 3, 1e-2, 0};
  {
    Opened opened(directory / "link", settings, false);  // replaces the file, not the link
  }
  CHECK(fs::is_symlink(directory / "link"));
  CHECK(Opened(directory / "data" / "f", settings).filter.adds() == 0);
}

TEST_CASE("filter file: on a full disk an add fails and nothing was added; with room again the next one succeeds") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  CountingBloomFilter expected(kSettings);
  {
    Opened opened(path);
    opened.add(keys_from(0, 10));
    expected.add(keys_from(0, 10));
    const uint64_t bytes = fs::file_size(path);
    {
      const SizeLimit full(bytes + 50);
      const std::string error = message_of([&] { opened.add(keys_from(100, 10)); });
      CHECK(error == "[write] " + path.string() + ": File too large; nothing was added");
      CHECK(counters_of(opened.filter) == counters_of(expected));
      CHECK(fs::file_size(path) == bytes);
      opened.add(keys_from(100, 1));  // this one fits
      expected.add(keys_from(100, 1));
    }
    opened.add(keys_from(200, 10));
    expected.add(keys_from(200, 10));
  }
  CHECK(counters_of(Opened(path).filter) == counters_of(expected));
  const SizeLimit full(5000);
  CHECK(error_of_open(directory / "another").starts_with("StorageError [write]"));
  CHECK_FALSE(fs::exists(directory / "another"));
  CHECK_FALSE(fs::exists(directory / "another.tmp"));
}

TEST_CASE("filter file: when the log cannot give way to the counters it grows on, and nothing is lost") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  const FilterSettings settings{20000, 3, 1e-2, 0};
  CountingBloomFilter expected(settings);
  {
    Opened opened(path, settings);
    fs::create_directories(directory / "seen.filter.tmp" / "in the way");
    const uint64_t empty = opened.file.bytes();
    for (uint64_t i = 0; i < 8; ++i) {
      opened.add(keys_from(i, 100000));
      expected.add(keys_from(i, 100000));
    }
    CHECK(opened.file.bytes() > empty + 8 * 800000);
    fs::remove_all(directory / "seen.filter.tmp");
    for (uint64_t i = 0; i < 8; ++i) {
      opened.add(keys_from(i, 100000));
      expected.add(keys_from(i, 100000));
    }
    CHECK(opened.file.bytes() < empty + 8 * 800000);
  }
  CHECK(counters_of(Opened(path, settings).filter) == counters_of(expected));
}

TEST_CASE("filter file: a sync that failed is said by every later call") {
  const FaultScope faults;
  const TemporaryDirectory directory;
  Opened opened(directory / "seen.filter");
  opened.add(keys_from(0, 10));
  system_faults.fdatasync_error = EIO;
  const std::string first = message_of([&] { opened.file.sync(); });
  CHECK(first.starts_with("[sync] " + opened.file.path().string() + ": Input/output error"));
  system_faults.clear();
  CHECK(message_of([&] { opened.file.sync(); }) == first);
  CHECK(message_of([&] { opened.add(keys_from(1, 1)); }) == first);
  CHECK(message_of([&] { opened.file.close(); }) == first);
  opened.file.close();
  CHECK(error_of_open(directory / "seen.filter") == "");  // the lock was given up all the same
}

TEST_CASE("filter file: another program that cuts, removes or replaces the file is found out, and no signal comes") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  const auto damage = std::vector<std::pair<std::string, std::function<void()>>>{
      {"was cut from", [&] { REQUIRE(::truncate(path.c_str(), 100) == 0); }},
      {"was cut from", [&] { REQUIRE(::truncate(path.c_str(), 0) == 0); }},
      {"was removed or replaced", [&] { fs::remove(path); }},
      {"was removed or replaced", [&] { write_file_atomically(path, "something else"); }}};
  for (const auto& [text, harm] : damage) {
    fs::remove(path);
    Opened opened(path);
    opened.add(keys_from(0, 10));
    const std::string before = counters_of(opened.filter);
    harm();
    CAPTURE(text);
    const std::string error = message_of([&] { opened.add(keys_from(100, 1)); });
    CHECK(error.find(text) != std::string::npos);
    CHECK(error.find("by another program") != std::string::npos);
    CHECK(message_of([&] { opened.file.sync(); }) == error);
    CHECK(counters_of(opened.filter) == before);  // which is still there to be asked
    CHECK(message_of([&] { opened.file.close(); }) == error);
  }
}

TEST_CASE("filter file: one process has it at a time") {
  const TemporaryDirectory directory;
  const fs::path path = directory / "seen.filter";
  Opened opened(path);
  CHECK_THROWS_WITH_AS(Opened{path}, doctest::Contains("is open in this process already"), AlreadyOpenError);
  CHECK_THROWS_AS(Opened(path, kSettings, false), AlreadyOpenError);
  opened.file.close();
  CHECK(error_of_open(path) == "");
}

TEST_CASE("stand-alone filter: in memory it is nothing but its settings until the first add") {
  StandaloneFilter filter({uint64_t{1} << 40, 3, 1e-9, 0}, std::nullopt, true);  // terabytes
  bool seen = true;
  uint8_t estimate = 9;
  const Keys key{7};
  filter.check(key, &seen);
  filter.estimate(key, &estimate);
  CHECK_FALSE(seen);
  CHECK(estimate == 0);
  CHECK(filter.fill() + filter.distinct_keys() + filter.estimated_fpr() + static_cast<double>(filter.adds()) == 0.0);
  filter.sync();
  filter.add({}, 1);
  filter.add(key, 0);
  CHECK_FALSE(filter.used());
  filter.close();
  filter.close();
  CHECK(filter.closed());
  CHECK_THROWS_AS(filter.add(key, 1), ClosedError);
  CHECK_THROWS_AS(filter.check(key, &seen), ClosedError);
  CHECK_THROWS_AS(filter.sync(), ClosedError);
}

TEST_CASE("stand-alone filter: a forked child may use one that the parent has not, and no other") {
  const TemporaryDirectory directory;
  const Keys keys{1, 2, 3};
  StandaloneFilter fresh(kSettings, std::nullopt, true), in_memory(kSettings, std::nullopt, true);
  auto in_file = std::make_unique<StandaloneFilter>(kSettings, directory / "f", true);
  in_memory.add(keys, 3);
  in_file->add(keys, 3);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    int wrong = 0;
    bool seen[3];
    fresh.add(keys, 3);
    fresh.check(keys, seen);
    wrong += !seen[0] + !seen[1] + !seen[2];
    for (StandaloneFilter* filter : {&in_memory, in_file.get()}) {
      for (const auto& call : std::vector<std::function<void()>>{
               [&] { filter->add(keys, 1); }, [&] { filter->check(keys, seen); }, [&] { filter->fill(); },
               [&] { filter->sync(); }, [&] { filter->close(); }}) {
        try {
          call();
          ++wrong;
        } catch (const ForkedHandleError&) {
        }
      }
    }
    in_file.reset();  // takes nothing from the parent
    ::_exit(wrong);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  CHECK(status == 0);
  bool seen[3];
  in_file->add(keys, 1);
  in_file->check(keys, seen);
  CHECK((seen[0] && seen[1] && seen[2]));
  in_file->close();
  in_memory.add(keys, 1);
}

}  // namespace
}  // namespace damo
