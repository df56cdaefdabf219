// SPDX-License-Identifier: Apache-2.0
#include "operation_log.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "file.h"
#include "system_faults.h"
#include "temporary_directory.h"

namespace damo {
namespace {

using testing::FaultScope;
using testing::system_faults;
using testing::TemporaryDirectory;

constexpr uint64_t kFirst = 41;  // sequence number of the first record; not 0 or 1, so that an offset is seen

Bytes as_bytes(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

LogOptions options_in(const TemporaryDirectory& directory) {
  LogOptions options;
  options.directory = directory.path();
  for (size_t i = 0; i < options.storage_id.size(); ++i) options.storage_id[i] = static_cast<std::byte>(0x40 + i);
  return options;
}

uint64_t append(OperationLog& log, std::string_view body, RecordType type = RecordType::kApply) {
  const std::array parts{as_bytes(body)};
  return log.append(type, parts);
}

struct Record {
  uint64_t sequence = 0;
  RecordType type{};
  std::string body;
  bool operator==(const Record&) const = default;
};

struct Contents {
  uint64_t first_sequence = 0;
  std::string state;
  std::vector<Record> records;
};

std::unique_ptr<OperationLog> recover(const LogOptions& options, Contents& contents) {
  contents = {};
  return OperationLog::recover(
      options,
      [&](uint64_t first_sequence, std::string_view state) {
        contents.first_sequence = first_sequence;
        contents.state = state;
      },
      [&](const LogRecord& record) {
        contents.records.push_back(
            {record.sequence, record.type, {reinterpret_cast<const char*>(record.body.data()), record.body.size()}});
      });
}

Contents read_log(const LogOptions& options) {
  Contents contents;
  recover(options, contents);
  return contents;
}

// What recovery says of a log that it refuses; empty when it does not.
std::string refusal(const LogOptions& options) {
  try {
    read_log(options);
  } catch (const CorruptionError& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

std::filesystem::path segment(const TemporaryDirectory& directory, int number) {
  std::string digits = std::to_string(number);
  return directory / (std::string(10 - digits.size(), '0') + digits + ".log");
}

size_t segments_in(const TemporaryDirectory& directory) {
  return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(directory.path()), {}));
}

std::string read_bytes(const std::filesystem::path& path) { return read_file(path, 64 << 20); }

// In place: file systems flush a file that is emptied and written again, which hundreds of times takes seconds.
void write_bytes(const std::filesystem::path& path, std::string_view bytes) {
  const FileDescriptor file("write", path, O_WRONLY | O_CREAT);
  file.write_at(as_bytes(bytes), 0);
  if (file.bytes() != bytes.size()) file.truncate(bytes.size());
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const StorageError& error) {
    return error.what();
  }
  return "";
}

// A log with `synced` records before the last sync and `unsynced` after it. Returns where each record ends.
std::vector<uint64_t> make_log(const LogOptions& options, int synced, int unsynced, std::string_view state = "state") {
  auto log = OperationLog::create(options, kFirst, state);
  std::vector<uint64_t> ends;
  for (int i = 0; i < synced + unsynced; ++i) {
    append(*log, "record " + std::string(static_cast<size_t>(i) * 5, static_cast<char>('a' + i)), RecordType::kInsert);
    ends.push_back(log->bytes());
    if (i + 1 == synced) log->sync();
  }
  return ends;
}

// ------------------------------------------------------------- what is kept

TEST_CASE("operation log: one that is not written numbers its records and has no byte") {
  const std::unique_ptr<OperationLog> log = OperationLog::unwritten(kFirst);
  CHECK(log->last_sequence() == kFirst - 1);
  CHECK(log->synced_sequence() == kFirst - 1);
  CHECK(append(*log, std::string(1 << 20, 'x')) == kFirst);
  CHECK(append(*log, "y") == kFirst + 1);
  log->sync();
  log->sync_to(kFirst + 1);
  CHECK(log->last_sequence() == kFirst + 1);
  CHECK(log->synced_sequence() == kFirst - 1);
  log->note_synced(kFirst);
  CHECK(log->synced_sequence() == kFirst);
  CHECK(log->bytes() == 0);
  CHECK_FALSE(log->should_rotate());
  CHECK(log->newest_segment_is_empty());
  log->rotate("state");
  log->drop_through(UINT64_MAX);
  CHECK(log->bytes() == 0);
}

TEST_CASE("operation log: an empty one is replaced in one file, by the bytes that create writes") {
  const TemporaryDirectory directory, other;
  const LogOptions options = options_in(directory);
  OperationLog::create(options, kFirst, "before");
  OperationLog::replace_empty(options, kFirst + 5, "after");
  CHECK(segments_in(directory) == 1);
  const Contents contents = read_log(options);
  CHECK(contents.first_sequence == kFirst + 5);
  CHECK(contents.state == "after");
  CHECK(contents.records.empty());
  OperationLog::create(options_in(other), kFirst + 5, "after");
  CHECK(read_bytes(segment(directory, 1)) == read_bytes(segment(other, 1)));
  Contents again;
  CHECK(append(*recover(options, again), "x") == kFirst + 5);
}

TEST_CASE("log: records come back in order over rotations, whatever their length and number of parts") {
  TemporaryDirectory directory;
  auto options = options_in(directory);
  options.segment_bytes = 4096;
  std::vector<Record> expected;
  auto log = OperationLog::create(options, kFirst, "state at the start");
  CHECK(log->last_sequence() == kFirst - 1);
  CHECK(log->synced_sequence() == kFirst - 1);
  CHECK(log->directory() == directory.path());
  int rotations = 0;
  for (size_t i = 0; i < 200; ++i) {
    // Lengths 0, 1, ... in up to 5 parts, some of them empty; one in between is larger than a segment.
    const size_t size = i == 100 ? 3'000'000 : i;
    std::string body(size, '\0');
    for (size_t k = 0; k < size; ++k) body[k] = static_cast<char>(k * 31 + i);
    std::vector<Bytes> parts;
    for (size_t part = 0; part < i % 6; ++part) {
      const size_t from = size * part / (i % 6), to = size * (part + 1) / (i % 6);
      parts.push_back(as_bytes(body).subspan(from, to - from));
    }
    if (parts.empty()) body.clear();
    const auto type = static_cast<RecordType>(1 + i % 3);
    CHECK(log->append(type, parts) == kFirst + i);
    expected.push_back({kFirst + i, type, body});
    if (log->should_rotate()) {
      log->rotate("state " + std::to_string(log->last_sequence()));
      CHECK(log->synced_sequence() == log->last_sequence());
      ++rotations;
    }
  }
  REQUIRE(rotations > 2);
  CHECK(segments_in(directory) == static_cast<size_t>(rotations) + 1);
  const uint64_t bytes = log->bytes();
  log.reset();

  Contents contents;
  log = recover(options, contents);
  CHECK(contents.first_sequence == kFirst);
  CHECK(contents.state == "state at the start");
  CHECK(contents.records == expected);
  CHECK(log->bytes() == bytes);
  CHECK(log->last_sequence() == kFirst + 199);
  CHECK(log->synced_sequence() == kFirst + 199);
}

TEST_CASE("log: a record of more parts than one system call takes is whole") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  const std::string body(3000, 'x');
  std::vector<Bytes> parts;
  for (size_t i = 0; i < body.size(); ++i) parts.push_back(as_bytes(body).subspan(i, 1));
  OperationLog::create(options, kFirst, "")->append(RecordType::kErase, parts);
  CHECK(read_log(options).records == std::vector<Record>{{kFirst, RecordType::kErase, body}});
}

TEST_CASE("log: appends go on after a recovery with the next sequence number") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  make_log(options, 1, 1);
  for (uint64_t round = 0; round < 3; ++round) {
    Contents contents;
    auto log = recover(options, contents);
    CHECK(contents.records.size() == 2 + round);
    CHECK(append(*log, "more") == kFirst + 2 + round);
    if (round == 1) log->rotate("later");
  }
  const Contents contents = read_log(options);
  REQUIRE(contents.records.size() == 5);
  for (size_t i = 0; i < 5; ++i) CHECK(contents.records[i].sequence == kFirst + i);
}

TEST_CASE("log: drop_through removes the segments that are wholly old, and never the newest") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "state 0");
  for (int i = 0; i < 4; ++i) {  // two records in each of the segments 1 to 4, none in segment 5
    append(*log, "a");
    append(*log, "b");
    log->rotate("state " + std::to_string(log->last_sequence()));
  }
  const uint64_t all = log->bytes();
  log->drop_through(kFirst);  // segment 1 holds kFirst + 1 as well
  CHECK(segments_in(directory) == 5);
  log->drop_through(kFirst + 2);
  CHECK(segments_in(directory) == 4);
  CHECK(log->bytes() < all);
  CHECK_FALSE(std::filesystem::exists(segment(directory, 1)));
  log->drop_through(UINT64_MAX);
  CHECK(segments_in(directory) == 1);
  CHECK(append(*log, "c") == kFirst + 8);
  log.reset();

  const Contents contents = read_log(options);
  CHECK(contents.first_sequence == kFirst + 8);
  CHECK(contents.state == "state 48");
  CHECK(contents.records == std::vector<Record>{{kFirst + 8, RecordType::kApply, "c"}});
}

TEST_CASE("log: recovered segments can be dropped too") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "");
  append(*log, "a");
  log->rotate("");
  append(*log, "b");
  Contents contents;
  log = recover(options, contents);
  log->drop_through(kFirst);
  CHECK(segments_in(directory) == 1);
  CHECK(read_log(options).first_sequence == kFirst + 1);
}

TEST_CASE("log: what the process did not sync is still there when it dies without closing") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  const auto log = OperationLog::create(options, kFirst, "");
  append(*log, "not synced");
  CHECK(log->synced_sequence() == kFirst - 1);
  CHECK(read_log(options).records.size() == 1);
}

TEST_CASE("log: sequence number 0 is refused, it has no number before it") {
  TemporaryDirectory directory;
  CHECK_THROWS_AS(OperationLog::create(options_in(directory), 0, ""), std::invalid_argument);
  CHECK(segments_in(directory) == 0);
}

TEST_CASE("log: a directory that holds a log already is not started over") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  make_log(options, 1, 0);
  CHECK_THROWS_AS(OperationLog::create(options, 1, ""), StorageError);
  CHECK(read_log(options).records.size() == 1);
}

TEST_CASE("log: the bytes of a segment are those of docs/format.md") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "state");
  append(*log, "hello body", RecordType::kErase);
  log->sync();
  const std::string bytes = read_bytes(segment(directory, 1));
  REQUIRE(bytes.size() == 128 + 8 + 32 + 16);
  const auto number = [&](size_t offset) {
    uint64_t value;
    std::memcpy(&value, bytes.data() + offset, 8);
    return value;
  };
  const std::string id(reinterpret_cast<const char*>(options.storage_id.data()), 16);
  CHECK(bytes.substr(0, 8) == "DAMO-LOG");
  CHECK(number(8) == 1);  // version, reserved
  CHECK(bytes.substr(16, 16) == id);
  CHECK(number(32) == 1);
  CHECK(number(40) == kFirst);
  CHECK(number(48) == 5);
  CHECK(number(56) == checksum64(as_bytes(bytes.substr(0, 56) + "state")));
  CHECK(bytes.substr(128, 8) == std::string("state\0\0\0", 8));

  const uint64_t seed = checksum64(as_bytes(id + bytes.substr(32, 8)));
  CHECK(number(64) == 136);  // slot 0: the mark of the creation
  CHECK(number(72) == kFirst - 1);
  CHECK(number(88) == checksum64(as_bytes(bytes).subspan(64, 24), seed));
  CHECK(number(96) == 184);  // slot 1: the mark of the sync
  CHECK(number(104) == kFirst);
  CHECK(number(112) == 0);
  CHECK(number(120) == checksum64(as_bytes(bytes).subspan(96, 24), seed));

  CHECK(number(136) == 10);
  CHECK(number(144) == kFirst);
  CHECK(number(152) == 3);  // type, reserved
  CHECK(number(160) == checksum64(as_bytes(bytes.substr(136, 24) + "hello body"), seed));
  CHECK(bytes.substr(168) == std::string("hello body\0\0\0\0\0\0", 16));
}

// ------------------------------------------------------------------ damage

TEST_CASE("log: a last record cut at any byte is cut off, and appends go on after the one before it") {
  FaultScope faults;
  system_faults.skip_syncs = true;
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  const auto ends = make_log(options, 1, 2);
  const auto path = segment(directory, 1);
  const std::string whole = read_bytes(path);
  REQUIRE(whole.size() == ends[2]);
  const auto expected = read_log(options).records;
  for (const bool zeros : {false, true}) {  // the file is shorter, or its length is there and the bytes are not
    for (uint64_t length = ends[1]; length < ends[2]; ++length) {
      CAPTURE(length);
      std::string torn = whole.substr(0, length);
      if (zeros) torn.resize(whole.size());
      if (torn == whole) continue;  // cut within the zeros that pad the record
      write_bytes(path, torn);
      Contents contents;
      auto log = recover(options, contents);
      CHECK(contents.records == std::vector(expected.begin(), expected.begin() + 2));
      CHECK(std::filesystem::file_size(path) == ends[1]);
      CHECK(append(*log, "after") == kFirst + 2);
      log.reset();
      CHECK(read_log(options).records.back() == Record{kFirst + 2, RecordType::kApply, "after"});
    }
  }
}

TEST_CASE("log: a file shorter than its sync mark is corruption") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  const auto ends = make_log(options, 2, 0);
  std::filesystem::resize_file(segment(directory, 1), ends[0]);
  CHECK(contains(refusal(options), "sync mark"));
  CHECK(std::filesystem::file_size(segment(directory, 1)) == ends[0]);
}

TEST_CASE("log: any changed byte is found: corruption before the sync mark, the end of the log after it") {
  FaultScope faults;
  system_faults.skip_syncs = true;
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  const auto ends = make_log(options, 3, 3);
  const auto path = segment(directory, 1);
  const std::string whole = read_bytes(path);
  const auto expected = read_log(options).records;
  write_bytes(path, whole);  // with the mark of three records
  for (const int flip : {0x01, 0xff}) {
    for (size_t offset = 0; offset < whole.size(); ++offset) {
      CAPTURE(offset);
      CAPTURE(flip);
      std::string changed = whole;
      changed[offset] = static_cast<char>(changed[offset] ^ flip);
      write_bytes(path, changed);
      std::optional<Contents> contents;
      try {
        contents = read_log(options);
      } catch (const CorruptionError& error) {
        CHECK(contains(error.what(), path.string()));
        CHECK(read_bytes(path) == changed);  // nothing was cut
      }
      if (offset >= 64 && offset < 128) {  // one of two slots: the other one is as true
        REQUIRE(contents);
        CHECK(contents->records == expected);
      } else if (offset < ends[2]) {
        CHECK_FALSE(contents);
      } else {
        REQUIRE(contents);
        const size_t kept = offset < ends[3] ? 3 : offset < ends[4] ? 4 : 5;
        CHECK(contents->records == std::vector(expected.begin(), expected.begin() + static_cast<long>(kept)));
      }
    }
  }
}

TEST_CASE("log: a new sync mark never overwrites the newer of the two, before or after a recovery") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "");
  const auto slots = [&] {
    const std::string head = read_bytes(segment(directory, 1)).substr(0, 128);
    return std::array{head.substr(64, 32), head.substr(96, 32)};
  };
  auto before = slots();
  for (size_t i = 0; i < 5; ++i) {
    CAPTURE(i);
    append(*log, "a");
    if (i == 1 || i == 4) {
      Contents contents;
      log = recover(options, contents);
    } else {
      log->sync();
    }
    const auto after = slots();
    CHECK(after[i % 2] == before[i % 2]);
    CHECK(after[1 - i % 2] != before[1 - i % 2]);
    before = after;
  }
}

TEST_CASE("log: with both sync marks damaged nothing is guessed") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  make_log(options, 1, 1);
  std::string bytes = read_bytes(segment(directory, 1));
  bytes[64] ^= 1;
  bytes[96] ^= 1;
  write_bytes(segment(directory, 1), bytes);
  CHECK(contains(refusal(options), "neither sync mark"));
}

TEST_CASE("log: only the newest segment may have a torn end, synced mark or not") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "");
  append(*log, "a");
  const uint64_t end = log->bytes();
  append(*log, "b");
  std::string stale_head = read_bytes(segment(directory, 1)).substr(0, 128);  // its mark is before both records
  log->rotate("");
  append(*log, "c");
  log.reset();
  const std::string whole = read_bytes(segment(directory, 1));
  write_bytes(segment(directory, 1), stale_head + whole.substr(128));
  CHECK(read_log(options).records.size() == 3);  // the mark may be older than the sync that the rotation made

  write_bytes(segment(directory, 1), stale_head + whole.substr(128, whole.size() - 129));
  CHECK(contains(refusal(options), segment(directory, 1).string() + " is damaged at offset " + std::to_string(end)));
  write_bytes(segment(directory, 1), stale_head + whole.substr(128, end - 128));
  CHECK(contains(refusal(options), "the segment before it ends with " + std::to_string(kFirst)));
}

TEST_CASE("log: a missing segment is a gap, and no segment at all is no log") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  CHECK(contains(refusal(options), "has no segment, expected at least one"));
  auto log = OperationLog::create(options, kFirst, "");
  for (int i = 0; i < 3; ++i) {
    append(*log, "a");
    log->rotate("");
  }
  log.reset();
  std::filesystem::remove(segment(directory, 2));
  CHECK(contains(refusal(options), "has no segment 0000000002.log, but later ones"));
  std::filesystem::rename(segment(directory, 3), segment(directory, 2));
  CHECK(contains(refusal(options), "its head says that it is segment 3"));
}

TEST_CASE("log: a segment of another storage, a newer version or another kind of file is refused by name") {
  TemporaryDirectory directory;
  auto options = options_in(directory);
  make_log(options, 1, 0);
  const std::string whole = read_bytes(segment(directory, 1));
  auto other = options;
  other.storage_id[3] = std::byte{0xee};
  CHECK(contains(refusal(other), "belongs to another storage"));

  std::string newer = whole;
  newer[8] = 2;
  write_bytes(segment(directory, 1), newer);
  CHECK(contains(refusal(options), "has log format 2 at offset 8"));
  CHECK(contains(refusal(options), "upgrade damo-embedding"));

  write_bytes(segment(directory, 1), "#!/bin/sh\n" + whole);
  CHECK(contains(refusal(options), "not a segment of an operation log"));

  for (const size_t length : {0, 1, 127}) {  // creation renames a whole head, so this is damage, not a crash
    write_bytes(segment(directory, 1), whole.substr(0, length));
    CHECK(contains(refusal(options), "ends inside its head"));
  }
}

TEST_CASE("log: a length beyond the file is not believed") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  const auto ends = make_log(options, 1, 1);
  const std::string whole = read_bytes(segment(directory, 1));
  for (const uint64_t length : {uint64_t{1} << 40, UINT64_MAX, UINT64_MAX - 7, UINT64_MAX - 40}) {
    CAPTURE(length);
    std::string changed = whole;
    std::memcpy(changed.data() + 48, &length, 8);  // of the state
    write_bytes(segment(directory, 1), changed);
    CHECK(contains(refusal(options), "a state of "));
    changed = whole;
    std::memcpy(changed.data() + 136, &length, 8);  // of the first record
    write_bytes(segment(directory, 1), changed);
    CHECK(contains(refusal(options), "a record of "));
    changed = whole;
    std::memcpy(changed.data() + ends[0], &length, 8);  // of the one after the mark
    write_bytes(segment(directory, 1), changed);
    CHECK(read_log(options).records.size() == 1);
  }
}

TEST_CASE("log: a whole record with the wrong sequence number is corruption even after the sync mark") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  const auto ends = make_log(options, 1, 2);
  const std::string whole = read_bytes(segment(directory, 1));
  write_bytes(segment(directory, 1), whole.substr(0, ends[0]) + whole.substr(ends[1]));
  CHECK(contains(refusal(options), "operation 43 where 42 was expected"));
}

TEST_CASE("log: records of another segment are not taken for this one's") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "");
  log->rotate("");
  append(*log, "a");
  log.reset();
  const std::string record = read_bytes(segment(directory, 2)).substr(128);
  std::filesystem::remove(segment(directory, 2));
  write_bytes(segment(directory, 1), read_bytes(segment(directory, 1)) + record);
  CHECK(read_log(options).records.empty());
}

TEST_CASE("log: the leftover of a creation that died is removed") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  make_log(options, 1, 0);
  write_bytes(directory / "0000000002.log.tmp", "half a head");
  write_bytes(directory / "notes.log", "not ours");
  CHECK(read_log(options).records.size() == 1);
  CHECK_FALSE(std::filesystem::exists(directory / "0000000002.log.tmp"));
  CHECK(std::filesystem::exists(directory / "notes.log"));
}

TEST_CASE("log: an exception of the callback leaves the files as they were") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  make_log(options, 1, 1);
  const std::string torn = read_bytes(segment(directory, 1)) + "torn";
  write_bytes(segment(directory, 1), torn);
  const auto stop = [](const LogRecord&) { throw std::invalid_argument("stop"); };
  CHECK_THROWS_AS(OperationLog::recover(
                      options, [](uint64_t, std::string_view) {}, stop),
                  std::invalid_argument);
  CHECK(read_bytes(segment(directory, 1)) == torn);
}

// ---------------------------------------------- what the system may refuse

TEST_CASE("log: short and interrupted writes are completed") {
  FaultScope faults;
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "");
  for (const size_t limit : {1, 7, 32, 33, 41}) {
    system_faults.pwritev_limit = limit;
    system_faults.pwritev_interruptions = 3;
    const std::string first(limit, 'a'), second(100, 'b');
    const std::array parts{as_bytes(first), Bytes(), as_bytes(second)};
    log->append(RecordType::kApply, parts);
  }
  const Contents contents = read_log(options);
  REQUIRE(contents.records.size() == 5);
  CHECK(contents.records[2].body == std::string(32, 'a') + std::string(100, 'b'));
}

TEST_CASE("log: a write that fails appends nothing, and later ones work") {
  FaultScope faults;
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "");
  append(*log, "before");
  const uint64_t bytes = log->bytes();
  for (const int error : {ENOSPC, EIO, EDQUOT}) {
    system_faults.pwritev_limit = 50;  // part of the record gets there
    system_faults.pwritev_error_after = error;
    const std::string message = error_of([&] { append(*log, std::string(1000, 'x')); });
    CHECK(contains(message, "[append to the log]"));
    CHECK(contains(message, segment(directory, 1).string()));
    system_faults.clear();
    CHECK(log->bytes() == bytes);
    CHECK(log->last_sequence() == kFirst);
    CHECK(std::filesystem::file_size(segment(directory, 1)) == bytes);
  }
  CHECK(append(*log, "after") == kFirst + 1);
  log->sync();
  CHECK(read_log(options).records ==
        std::vector<Record>{{kFirst, RecordType::kApply, "before"}, {kFirst + 1, RecordType::kApply, "after"}});
}

TEST_CASE("log: a file that may not grow is a failed append, and space coming back heals it") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "");
  struct rlimit before {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small { 10'000, before.rlim_max };
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  size_t appended = 0;
  const std::string message = error_of([&] {
    for (; appended < 100; ++appended) append(*log, std::string(700, 'x'));
  });
  const uint64_t bytes_on_disk = std::filesystem::file_size(segment(directory, 1));
  log->sync();
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  ::signal(SIGXFSZ, old_handler);
  CHECK(contains(message, "File too large"));
  CHECK(appended == 13);
  CHECK(bytes_on_disk == log->bytes());
  append(*log, "after");
  CHECK(read_log(options).records.size() == 14);
}

TEST_CASE("log: a failed write that cannot be taken back is final") {
  FaultScope faults;
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "");
  append(*log, "before");
  system_faults.pwritev_limit = 50;
  system_faults.pwritev_error_after = EIO;
  system_faults.ftruncate_error = EIO;
  const std::string first = error_of([&] { append(*log, std::string(1000, 'x')); });
  CHECK(contains(first, "the log takes nothing more"));
  system_faults.clear();
  CHECK(error_of([&] { append(*log, "after"); }) == first);
  CHECK(error_of([&] { log->sync(); }) == first);
  CHECK(error_of([&] { log->rotate(""); }) == first);
  log.reset();
  CHECK(read_log(options).records == std::vector<Record>{{kFirst, RecordType::kApply, "before"}});
}

TEST_CASE("log: a failed sync is final, for every thread that waited for it and for all that come later") {
  FaultScope faults;
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "");
  append(*log, "before");
  log->sync();
  append(*log, "lost perhaps");
  system_faults.fdatasync_error = EIO;
  std::atomic<int> failed{0};
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i)
      threads.emplace_back([&] { failed += contains(error_of([&] { log->sync(); }), "[sync the log]"); });
  }
  CHECK(failed == 4);
  CHECK(system_faults.fdatasync_calls == 2);
  system_faults.clear();
  const std::string message = error_of([&] { log->sync(); });
  CHECK(contains(message, "the log takes nothing more"));
  CHECK(error_of([&] { append(*log, "x"); }) == message);
  CHECK(error_of([&] { log->sync_to(kFirst); }) == message);
  CHECK(log->synced_sequence() == kFirst);
  CHECK(system_faults.fdatasync_calls == 0);
  log.reset();
  Contents contents;
  log = recover(options, contents);  // what the page cache still has is written and synced anew
  CHECK(contents.records.size() == 2);
  CHECK(system_faults.fdatasync_calls == 1);
}

TEST_CASE("log: a rotation that cannot create its file leaves the old segment in use") {
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "");
  append(*log, "a");
  const auto in_the_way = directory / "0000000002.log.tmp";
  std::filesystem::create_directory(in_the_way);
  CHECK(contains(error_of([&] { log->rotate(""); }), "[create a log segment]"));
  CHECK(append(*log, "b") == kFirst + 1);
  std::filesystem::remove(in_the_way);
  log->rotate("");
  CHECK(append(*log, "c") == kFirst + 2);
  CHECK(segments_in(directory) == 2);
  CHECK(read_log(options).records.size() == 3);
}

TEST_CASE("log: a rotation whose new name may not be durable is final") {
  FaultScope faults;
  TemporaryDirectory directory;
  const auto options = options_in(directory);
  auto log = OperationLog::create(options, kFirst, "");
  append(*log, "a");
  system_faults.fsync_directory_error = EIO;
  const std::string message = error_of([&] { log->rotate(""); });
  CHECK(contains(message, "the log takes nothing more"));
  system_faults.clear();
  CHECK(error_of([&] { append(*log, "b"); }) == message);
  log.reset();
  CHECK(read_log(options).records.size() == 1);
}

// ----------------------------------------------------------------- threads

TEST_CASE("log: threads that sync at the same time share the system's sync") {
  FaultScope faults;
  TemporaryDirectory directory;
  auto log = OperationLog::create(options_in(directory), kFirst, "");
  append(*log, "a");
  system_faults.fdatasync_milliseconds = 20;
  constexpr int kThreads = 8;
  std::barrier start(kThreads);
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < kThreads; ++i)
      threads.emplace_back([&] {
        start.arrive_and_wait();
        log->sync();
      });
  }
  CHECK(system_faults.fdatasync_calls == 1);
  log->sync_to(kFirst);
  log->sync();
  CHECK(system_faults.fdatasync_calls == 1);  // nothing new
}

TEST_CASE("log: syncs beside the appender return when their record is synced, over rotations and drops") {
  FaultScope faults;
  system_faults.skip_syncs = true;
  system_faults.fdatasync_milliseconds = 1;
  TemporaryDirectory directory;
  auto options = options_in(directory);
  options.segment_bytes = 20'000;
  auto log = OperationLog::create(options, kFirst, "");
  constexpr int kRecords = 1500;
  std::atomic<bool> done{false};
  std::atomic<int> syncs{0}, wrong{0};
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 3; ++i)
      threads.emplace_back([&, i] {
        while (!done) {
          const uint64_t target = log->last_sequence();
          i == 0 ? log->sync() : log->sync_to(target);
          wrong += log->synced_sequence() < target;
          if (i == 2) log->drop_through(kFirst + 300);
          wrong += log->bytes() == 0;
          ++syncs;
          std::this_thread::yield();
        }
      });
    for (int i = 0; i < kRecords; ++i) {
      append(*log, std::string(static_cast<size_t>(i) % 200, 'x'));
      if (log->should_rotate()) log->rotate("");
      if (i % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    done = true;
  }
  CHECK(wrong == 0);
  CHECK(syncs > 0);
  log->drop_through(kFirst + 300);
  log.reset();
  const Contents contents = read_log(options);
  REQUIRE_FALSE(contents.records.empty());
  CHECK(contents.first_sequence > kFirst);
  CHECK(contents.first_sequence <= kFirst + 301);
  CHECK(contents.records.back().sequence == kFirst + kRecords - 1);
}

// -------------------------------------------------------------------- kill

std::string body_of(uint64_t sequence) {
  std::string body(sequence * 37 % 3000, '\0');
  for (size_t i = 0; i < body.size(); ++i) body[i] = static_cast<char>(sequence * 7 + i * i);
  return body;
}

TEST_CASE("log: no acknowledged record is lost when the process is killed while appending") {
  FaultScope faults;
  system_faults.skip_syncs = true;  // the page cache survives a process
  TemporaryDirectory directory;
  auto options = options_in(directory);
  options.segment_bytes = 100'000;
  OperationLog::create(options, kFirst, "");
  uint64_t acknowledged = kFirst - 1;
  for (int cycle = 0; cycle < 8; ++cycle) {
    CAPTURE(cycle);
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      try {
        Contents contents;
        auto log = recover(options, contents);
        for (;;) {
          const uint64_t sequence = append(*log, body_of(log->last_sequence() + 1));
          if (::write(ends[1], &sequence, sizeof sequence) != sizeof sequence) ::_exit(2);
          if (sequence % 16 == 0) log->sync();
          if (log->should_rotate()) log->rotate("state");
        }
      } catch (...) {
        ::_exit(1);
      }
    }
    ::close(ends[1]);
    uint64_t sequence = 0;
    const auto stop_at = acknowledged + 50 + static_cast<uint64_t>(cycle) * 13;
    bool killed = false;
    while (::read(ends[0], &sequence, sizeof sequence) == sizeof sequence) {
      acknowledged = sequence;
      if (!killed && acknowledged >= stop_at) killed = ::kill(child, SIGKILL) == 0;
    }
    ::close(ends[0]);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status));

    const Contents contents = read_log(options);
    REQUIRE_FALSE(contents.records.empty());
    CHECK(contents.records.back().sequence >= acknowledged);
    uint64_t expected = kFirst;
    bool equal = true;
    for (const Record& record : contents.records) {
      equal = equal && record.sequence == expected && record.body == body_of(expected);
      ++expected;
    }
    CHECK(equal);
    acknowledged = contents.records.back().sequence;
  }
}

}  // namespace
}  // namespace damo
