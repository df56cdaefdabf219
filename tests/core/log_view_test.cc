// SPDX-License-Identifier: Apache-2.0
#include "log_view.h"

#include <doctest/doctest.h>
#include <fcntl.h>

#include <array>
#include <atomic>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "file.h"
#include "operation_log.h"
#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;
using testing::TemporaryDirectory;

Bytes as_bytes(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

LogOptions options_in(const TemporaryDirectory& directory) {
  LogOptions options;
  options.directory = directory.path();
  options.storage_id.fill(std::byte{0x41});
  return options;
}

uint64_t append(OperationLog& log, std::string_view body) {
  const std::array parts{as_bytes(body)};
  return log.append(RecordType::kApply, parts);
}

struct Contents {
  uint64_t first_sequence = 0;
  std::string state;
  std::vector<std::string> bodies;
};

Contents read(LogView& view, uint64_t dropped = 0) {
  Contents contents;
  view.read(
      [&](uint64_t first, std::string_view state) {
        contents.first_sequence = first;
        contents.state = state;
      },
      [&](const LogRecord& record) {
        CHECK(record.sequence == contents.first_sequence + contents.bodies.size());
        contents.bodies.emplace_back(reinterpret_cast<const char*>(record.body.data()), record.body.size());
      },
      dropped);
  return contents;
}

Contents look(const LogOptions& options, uint64_t dropped = 0) {
  LogView view(options.directory, options.storage_id);
  view.extend();
  return read(view, dropped);
}

std::map<std::string, std::string> files_in(const TemporaryDirectory& directory) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(directory.path()))
    files[entry.path().filename()] = read_file(entry.path(), 1 << 26);
  return files;
}

TEST_CASE("log view: reads what is there while the log is open, and changes no byte") {
  const TemporaryDirectory directory;
  const auto log = OperationLog::create(options_in(directory), 5, "state at 5");
  CHECK(look(options_in(directory)).first_sequence == 5);
  for (int i = 0; i < 10; ++i) append(*log, "body " + std::to_string(i));
  log->rotate("state at 15");
  append(*log, "body 10");
  const auto before = files_in(directory);
  const Contents contents = look(options_in(directory));
  CHECK(contents.first_sequence == 5);
  CHECK(contents.state == "state at 5");
  REQUIRE(contents.bodies.size() == 11);
  CHECK(contents.bodies[10] == "body 10");
  CHECK(files_in(directory) == before);
}

TEST_CASE("log view: a torn end is the end, and stays where it is") {
  const TemporaryDirectory directory;
  fs::path file;
  {
    const auto log = OperationLog::create(options_in(directory), 1, "");
    append(*log, "first");
    log->sync();
    append(*log, "second");
    file = directory / "0000000001.log";
  }
  const std::string whole = read_file(file, 1 << 20);
  const size_t synced = look(options_in(directory)).bodies.size();
  CHECK(synced == 2);
  for (size_t cut = 1; cut < 40; ++cut) {
    FileDescriptor out("tear", file, O_WRONLY);
    out.truncate(whole.size() - cut);
    const auto before = files_in(directory);
    CHECK(look(options_in(directory)).bodies == std::vector<std::string>{"first"});
    CHECK(files_in(directory) == before);
    out.write_at(as_bytes(whole), 0);
  }
  std::string damaged = whole;
  damaged[damaged.size() - 20] = static_cast<char>(damaged[damaged.size() - 20] ^ 1);
  FileDescriptor("damage", file, O_WRONLY).write_at(as_bytes(damaged), 0);
  CHECK(look(options_in(directory)).bodies.size() == 1);
  // Before the sync mark it is damage.
  damaged = whole;
  damaged[whole.find("first")] = 'F';
  FileDescriptor("damage", file, O_WRONLY).write_at(as_bytes(damaged), 0);
  CHECK_THROWS_AS(look(options_in(directory)), CorruptionError);
}

TEST_CASE("log view: segments that are dropped or come while it is read do not matter") {
  const TemporaryDirectory directory;
  const auto log = OperationLog::create(options_in(directory), 1, "one");
  append(*log, "1");
  log->rotate("two");
  append(*log, "2");
  LogView view(directory.path(), options_in(directory).storage_id);
  append(*log, "3");
  log->rotate("four");
  append(*log, "4");
  view.extend();
  append(*log, "5");
  log->rotate("six");
  append(*log, "6");
  log->drop_through(5);
  const Contents contents = read(view);
  CHECK(contents.state == "one");
  CHECK(contents.bodies == std::vector<std::string>{"1", "2", "3", "4"});
  CHECK(look(options_in(directory)).state == "six");
}

TEST_CASE("log view: a segment that came and went between two looks is told, not passed over") {
  const TemporaryDirectory directory;
  const auto log = OperationLog::create(options_in(directory), 1, "one");
  append(*log, "1");
  LogView view(directory.path(), options_in(directory).storage_id);
  for (int i = 0; i < 3; ++i) {
    log->rotate("");
    append(*log, "more");
  }
  log->drop_through(3);
  CHECK_THROWS_AS(view.extend(), CorruptionError);
}

TEST_CASE("log view: what the log was cut below is passed over, as recovery does") {
  const TemporaryDirectory directory;
  const auto log = OperationLog::create(options_in(directory), 1, "one");
  append(*log, "1");
  append(*log, "2");
  log->rotate("three");
  append(*log, "3");
  CHECK(look(options_in(directory), 2).state == "three");
  CHECK(look(options_in(directory), 2).bodies == std::vector<std::string>{"3"});
  CHECK_THROWS_AS(look(options_in(directory), 1), CorruptionError);
  log->drop_through(2);
  CHECK(look(options_in(directory), 0).state == "three");
  CHECK(look(options_in(directory), 1).state == "three");  // it was cut further since, and no filter had counted
}

TEST_CASE("log view: no segment, or another storage's, is CorruptionError") {
  const TemporaryDirectory directory;
  CHECK_THROWS_AS(look(options_in(directory)), CorruptionError);
  OperationLog::create(options_in(directory), 1, "");
  LogOptions other = options_in(directory);
  other.storage_id.fill(std::byte{0x42});
  CHECK_THROWS_AS(look(other), CorruptionError);
}

TEST_CASE("log view: beside a writer each look sees a prefix that has all that was logged before it") {
  const TemporaryDirectory directory;
  LogOptions options = options_in(directory);
  options.segment_bytes = 64 << 10;
  const auto log = OperationLog::create(options, 1, "");
  std::atomic<uint64_t> logged{0};
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    std::mt19937_64 random(3);
    while (!stop) {
      if (log->should_rotate()) log->rotate("");
      const uint64_t sequence = log->last_sequence() + 1;
      append(*log, std::to_string(sequence) + std::string(random() % 5000, 'x'));
      logged = sequence;
      if (random() % 20 == 0) log->sync();
      if (random() % 100 == 0) log->drop_through(sequence > 200 ? sequence - 200 : 0);
    }
  });
  int looks = 0, vanished = 0;
  while (looks < 150) {
    try {
      LogView view(directory.path(), options.storage_id);
      const uint64_t before = logged;
      view.extend();
      const Contents contents = read(view);
      REQUIRE(contents.first_sequence + contents.bodies.size() > before);
      for (size_t i = 0; i < contents.bodies.size(); ++i) {
        const std::string number = std::to_string(contents.first_sequence + i);
        REQUIRE(contents.bodies[i].substr(0, number.size()) == number);
      }
      ++looks;
    } catch (const Error&) {
      REQUIRE(++vanished < 10'000);  // a segment that went between the list and the opening, say
    }
  }
  stop = true;
  writer.join();
}

}  // namespace
}  // namespace damo
