// SPDX-License-Identifier: Apache-2.0
#include "parsers.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <utility>

#include "directory.h"
#include "error.h"
#include "file.h"
#include "filter_file.h"
#include "filter_format.h"
#include "log_segment.h"
#include "manifest.h"
#include "presence_filter.h"
#include "saved_filter.h"
#include "store.h"
#include "stores/commit_mark.h"
#include "stores/table_tail.h"

namespace damo {
namespace {

Bytes bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

void put_u64(std::string& text, size_t at, uint64_t number) {
  if (at + sizeof number <= text.size()) std::memcpy(text.data() + at, &number, sizeof number);
}
uint64_t get_u64(const std::string& text, size_t at) {
  uint64_t number = 0;
  if (at + sizeof number <= text.size()) std::memcpy(&number, text.data() + at, sizeof number);
  return number;
}

// What ends with the checksum of all before it.
void repair_tail(std::string& text) {
  if (text.size() >= 8) put_u64(text, text.size() - 8, checksum64(bytes_of(text).first(text.size() - 8)));
}

// A file without a disk.
class MemoryFile {
 public:
  MemoryFile() : fd_(::memfd_create("damo_fuzz", MFD_CLOEXEC)), path_("/proc/self/fd/" + std::to_string(fd_)) {}
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  const std::string& hold(Bytes bytes) const {
    if (::ftruncate(fd_, 0) != 0 || ::pwrite(fd_, bytes.data(), bytes.size(), 0) < 0) std::abort();
    return path_;
  }

 private:
  int fd_;
  std::string path_;
};

// Where a parser wants a name; in memory where there is such a place.
class ScratchDirectory {
 public:
  ScratchDirectory() {
    std::string name = ::access("/dev/shm", W_OK) == 0 ? "/dev/shm/damo-fuzz-XXXXXX" : "/tmp/damo-fuzz-XXXXXX";
    if (::mkdtemp(name.data()) == nullptr) std::abort();
    path_ = name;
  }
  ~ScratchDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path hold(const std::string& name, Bytes bytes) const {
    const std::filesystem::path path = path_ / name;
    FileDescriptor("fuzz", path, O_WRONLY | O_CREAT | O_TRUNC).write(bytes);
    return path;
  }

 private:
  std::filesystem::path path_;
};

const StoredKey kKey = StoredKey::make(3, 77);
const StorageId kId{std::byte{1}, std::byte{2}};

Parser row_parser() {
  std::string whole, empty;
  const std::vector<float> floats(24, 1.5f);
  encode_row(kKey, {.update_count = 3, .step = 2, .time = 1, .sequence = 9, .has_floats = true}, floats, whole);
  encode_row(kKey, {.update_count = 0, .step = 0, .time = 1, .sequence = 9, .has_floats = false}, {}, empty);
  return {"row",
          {whole, empty},
          [](std::string& text) {
            if (text.size() < 8) return;
            std::memset(text.data() + 4, 0, 4);
            std::string covered(reinterpret_cast<const char*>(kKey.bytes.data()), StoredKey::kBytes);
            covered += text;
            const auto checksum = static_cast<uint32_t>(checksum64(bytes_of(covered)));
            std::memcpy(text.data() + 4, &checksum, sizeof checksum);
          },
          [](Bytes bytes) {
            const DecodedRow read = decode_row(kKey, bytes, 24);
            if (read.header.has_floats && read.floats.size() != 96) std::abort();
          }};
}

Parser manifest_parser() {
  Manifest manifest;
  TableSpec spec;
  spec.group = 7;
  spec.table_id = 1;
  spec.name = "user";
  spec.dimension = 16;
  spec.optimizer = "adam";
  spec.optimizer_settings = {{"lr", 0.1}, {"beta1", 0.9}};
  spec.state = {{"exp_avg", true, 0.0f}, {"exp_avg_sq", true, 0.0f}};
  spec.initializer = "uniform";
  spec.initializer_settings = {{"low", -1.0}, {"high", 1.0}};
  manifest.next_table_id = 3;
  manifest.tables = {spec};
  spec.group = 9;
  spec.table_id = 2;
  spec.name.clear();
  manifest.tables.push_back(spec);
  return {"manifest", {encode_manifest(manifest), encode_manifest({})}, repair_tail, [](Bytes bytes) {
            decode_manifest(bytes, "manifest");
          }};
}

TableCounters aged_table(uint32_t table_id) {
  TableCounters table;
  table.table_id = table_id;
  table.group_step = 3;
  table.lifetime = {AgeUnit::kSeconds, 1000};
  table.rows.add(5, 10);
  table.rows.add(7, 1);
  return table;
}

Parser checkpoint_parser() {
  CheckpointManifest manifest;
  manifest.step = 5;
  manifest.extra = "extra";
  manifest.counters.sequence = 9;
  manifest.counters.tables = {aged_table(1)};
  manifest.counters.last_commit = CommitRecord{4, "bytes"};
  manifest.files = {{"rocksdb/000001.sst", 100, 7}, {"MANIFEST", 10, 8}};
  return {"checkpoint", {encode_checkpoint(manifest), encode_checkpoint({})}, repair_tail, [](Bytes bytes) {
            decode_checkpoint(bytes, "checkpoint");
          }};
}

Parser counters_parser() {
  StorageCounters counters;
  counters.sequence = 9;
  counters.tables = {aged_table(1), aged_table(2)};
  counters.last_commit = CommitRecord{4, "bytes"};
  return {"counters", {encode_counters(counters), encode_counters({})}, nullptr, [](Bytes bytes) {
            decode_counters(bytes, "counters");
          }};
}

std::string apply_body() {
  const std::vector<uint64_t> keys{1, 2, 3};
  const std::vector<float> gradients(12, 0.5f);
  ApplyRecord record;
  record.table_id = 1;
  record.optimizer_id = 3;
  record.dimension = 4;
  record.group_step = 2;
  record.numbers = {3, {0.1, 0.9, 0.999}};
  record.ages = {AgeUnit::kSeconds, 100, {{5, 3}, {4, -1}}};
  record.keys = keys;
  std::string body = encode_apply_prefix(record);
  body.append(reinterpret_cast<const char*>(keys.data()), keys.size() * sizeof(uint64_t));
  body.append(reinterpret_cast<const char*>(gradients.data()), gradients.size() * sizeof(float));
  return body;
}

std::string together_body() {
  std::string body = encode_together(2);
  for (int i = 0; i < 2; ++i) {
    const std::string part = apply_body();
    ByteWriter(body).put(uint64_t{part.size()});
    body += part;
  }
  return body;
}

std::string keys_body() {
  const std::vector<uint64_t> keys{1, 2, 3};
  std::string body = encode_keys_prefix({.table_id = 1, .time = 5, .ages = {}, .keys = keys});
  body.append(reinterpret_cast<const char*>(keys.data()), keys.size() * sizeof(uint64_t));
  return body;
}

std::string import_body() {
  const std::vector<uint64_t> keys{1, 2, 3};
  const std::vector<uint32_t> counts{0, 1, 7};
  const std::vector<float> floats(12, 0.5f);
  std::string body = encode_import_prefix(
      {.table_id = 1, .num_floats = 4, .time = 5, .ages = {}, .keys = keys, .update_counts = {}, .floats = {}});
  body.append(reinterpret_cast<const char*>(keys.data()), keys.size() * sizeof(uint64_t));
  body.append(reinterpret_cast<const char*>(counts.data()), counts.size() * sizeof(uint32_t));
  body.append(reinterpret_cast<const char*>(floats.data()), floats.size() * sizeof(float));
  return body;
}

std::string count_body() {
  const std::vector<uint64_t> keys{1, 2, 3};
  const std::vector<uint32_t> times{1, 2, 1};
  CountRecord record;
  record.table_id = 1;
  record.time = 5;
  record.keys = keys;
  std::string body = encode_count_prefix(record);
  body.append(reinterpret_cast<const char*>(keys.data()), keys.size() * sizeof(uint64_t));
  body.append(reinterpret_cast<const char*>(times.data()), times.size() * sizeof(uint32_t));
  return body;
}

// The first byte says which kind of record it is.
Parser record_parser() {
  return {"record",
          {"\1" + apply_body(), "\2" + keys_body(), "\3" + encode_commit({4, "extra"}), "\4" + import_body(),
           "\5" + count_body(), "\6" + encode_expire({5}), "\7" + together_body()},
          nullptr,
          [](Bytes bytes) {
            if (bytes.empty()) return;
            std::vector<uint64_t> keys;
            const auto kind = std::to_integer<int>(bytes[0]);
            ByteReader body(bytes.subspan(1), "record");
            if (kind == 1) {
              const ApplyRecord record = decode_apply(body, keys);
              if (record.gradients.size() != record.keys.size() * record.dimension * sizeof(float)) std::abort();
            } else if (kind == 2) {
              decode_keys(body, keys);
            } else if (kind == 3) {
              decode_commit(body);
            } else if (kind == 4) {
              const ImportRecord record = decode_import(body, keys);
              if (record.floats.size() != record.keys.size() * record.num_floats * sizeof(float)) std::abort();
            } else if (kind == 5) {
              const CountRecord record = decode_count(body, keys);
              if (record.times.size() != record.keys.size() * sizeof(uint32_t)) std::abort();
            } else if (kind == 7) {
              for (ByteReader& part : decode_together(body)) decode_apply(part, keys);
            } else {
              decode_expire(body);
            }
          }};
}

constexpr uint64_t kSegment = 4;

std::string segment() {
  StorageCounters counters;
  counters.sequence = 9;
  std::string text = encode_segment_head(kId, kSegment, 10, encode_counters(counters));
  uint64_t sequence = 10;
  for (const auto& [type, body] :
       {std::pair(RecordType::kApply, apply_body()), std::pair(RecordType::kErase, keys_body()),
        std::pair(RecordType::kCommit, encode_commit({4, "extra"}))}) {
    const std::array<Bytes, 1> parts{bytes_of(body)};
    text += encode_record_header(type, sequence++, parts, segment_seed(kId, kSegment));
    text += body;
    text.resize(text.size() + record_padding(text.size()));
  }
  return text;
}

void repair_segment(std::string& text) {
  if (text.size() < 128) return;
  const uint64_t seed = segment_seed(kId, get_u64(text, 32));
  const uint64_t state = std::min<uint64_t>(get_u64(text, 48), text.size() - 128);
  std::string covered = text.substr(0, 56);
  covered += text.substr(128, state);
  put_u64(text, 56, checksum64(bytes_of(covered)));
  for (const size_t slot : {size_t{64}, size_t{96}})
    put_u64(text, slot + 24, checksum64(bytes_of(text).subspan(slot, 24), seed));
  for (size_t at = 128 + state + record_padding(state); at + 32 <= text.size();) {
    const uint64_t body = get_u64(text, at);
    if (body > text.size() - at - 32) return;
    covered = text.substr(at, 24) + text.substr(at + 32, body);
    put_u64(text, at + 24, checksum64(bytes_of(covered), seed));
    at += 32 + body + record_padding(body);
  }
}

Parser segment_parser() {
  return {"segment",
          {segment(), encode_segment_head(kId, kSegment, 1, {})},
          repair_segment,
          [file = std::make_shared<MemoryFile>()](Bytes bytes) {
            const FileDescriptor opened("fuzz", file->hold(bytes), O_RDONLY);
            SegmentReader reader(opened, kId);
            LogRecord record;
            while (!reader.at_end() && !reader.read(record)) {
              uint64_t sum = 0;
              for (const std::byte byte : record.body) sum += std::to_integer<uint64_t>(byte);
              if (sum > record.body.size() * 255) std::abort();  // so that each byte is read
              reader.next();
            }
          }};
}

Parser commit_mark_parser() {
  return {"commit-mark",
          {CommitMark::contents(7), CommitMark::contents(0)},
          [](std::string& text) {
            for (const size_t slot : {size_t{0}, size_t{512}}) {
              put_u64(text, slot, 0x316b72616d6d6164);
              const uint64_t number = get_u64(text, slot + 8);
              put_u64(text, slot + 16, checksum64(std::as_bytes(std::span(&number, 1)), 0x316b72616d6d6164));
            }
          },
          [file = std::make_shared<MemoryFile>()](Bytes bytes) { CommitMark::read(file->hold(bytes)); }};
}

Parser presence_parser() {
  constexpr size_t kBytes = 4096;
  std::string text = "DAMOPRES";
  ByteWriter writer(text);
  writer.put(uint32_t{1});
  writer.put(uint32_t{0});
  writer.put(uint64_t{9});
  writer.put(uint64_t{kBytes / 64});
  text.resize(text.size() + kBytes, '\5');
  text.resize(text.size() + 8);
  repair_tail(text);
  return {"presence", {text}, repair_tail, [file = std::make_shared<MemoryFile>()](Bytes bytes) {
            PresenceFilter filter(kBytes);
            filter.load(file->hold(bytes), 1);
          }};
}

Parser current_parser() {
  const auto scratch = std::make_shared<ScratchDirectory>();
  StorageDirectory(scratch->path(), OpenMode::kCreate).replace_generation([](const auto&) {});
  const auto repair = [](std::string& text) {
    const std::string name = text.substr(0, text.find(' '));
    std::array<char, 20> checksum;
    std::snprintf(checksum.data(), checksum.size(), " %016" PRIx64 "\n", checksum64(bytes_of(name)));
    text = name + checksum.data();
  };
  return {"current", {read_file(scratch->path() / "CURRENT", 256)}, repair, [scratch](Bytes bytes) {
            scratch->hold("CURRENT", bytes);
            live_generation(scratch->path());
          }};
}

Parser table_tail_parser() {
  const ScratchDirectory scratch;
  StoreOptions options;
  options.directory = scratch.path() / "store";
  {
    const auto store = open_rocksdb_store(options);
    const auto writer = store->begin_write();
    writer->put(kKey, bytes_of(std::string(100, 'v')));
    writer->commit();
  }
  std::string table;
  for (const auto& entry : std::filesystem::directory_iterator(options.directory))
    if (entry.path().extension() == ".sst") table = read_file(entry.path(), 1 << 20);
  // The metaindex block begins with three lengths and this name, and ends before its trailer and the footer.
  const auto repair = [](std::string& text) {
    const size_t name = text.rfind("partitionedfilter.");
    if (name == text.npos || name < 3 || text.size() < name + 58) return;
    const size_t end = text.size() - 53 - 5;
    const auto checksum = static_cast<uint32_t>(checksum64(bytes_of(text).subspan(name - 3, end - (name - 3))));
    std::memcpy(text.data() + end + 1, &checksum, sizeof checksum);
  };
  return {"table-tail", {table}, repair, [](Bytes bytes) {
            check_table_tail("table", bytes.size(), [&](uint64_t offset, size_t size, std::string& into) {
              const Bytes part = bytes.subspan(std::min<uint64_t>(offset, bytes.size()));
              into.assign(reinterpret_cast<const char*>(part.data()), std::min(size, part.size()));
            });
          }};
}

// ----------------------------------------------------------------- filters

const FilterSettings kFilter{.capacity = 500, .count = 3, .fpr = 0.01, .halve_every = 400};
const SavedFilter kSaved{kId, 3, 42};

// Head, mark and counters, of a file whose checksums have this seed.
void repair_filter(std::string& text, uint64_t seed) {
  constexpr size_t kFields = 64, kMark = 24;
  const CountingBloomFilter filter(kFilter);
  const uint64_t end = filter_counters_end(filter);
  if (text.size() < end) return;
  put_u64(text, kFields, checksum64(bytes_of(text).first(kFields), seed));
  put_u64(text, kFilterMarkOffset + kMark, checksum64(bytes_of(text).subspan(kFilterMarkOffset, kMark), seed));
  for (size_t i = 0; i < filter.num_chunks(); ++i) {
    const Bytes chunk = bytes_of(text).subspan(filter_chunk_offset(i), filter.chunk_bytes(i));
    put_u64(text, end - (filter.num_chunks() - i) * 8, filter_chunk_checksum(chunk, i, seed));
  }
}

Parser saved_filter_parser() {
  const ScratchDirectory scratch;
  const auto filter = std::make_shared<CountingBloomFilter>(kFilter);
  filter->add(std::vector<uint64_t>{1, 2, 3, ~uint64_t{0}}, 2);
  FilterSaver saver(scratch.path(), kSaved, filter);
  saver.save();
  saver.end();
  return {"saved-filter",
          {read_file(scratch.path() / kSaved.name(), 1 << 20)},
          [](std::string& text) { repair_filter(text, kSaved.seed()); },
          [file = std::make_shared<MemoryFile>()](Bytes bytes) {
            CountingBloomFilter read(kFilter);
            read_saved_filter(FileDescriptor("fuzz", file->hold(bytes), O_RDONLY), kSaved, read);
          }};
}

Parser filter_file_parser() {
  const auto scratch = std::make_shared<ScratchDirectory>();
  {
    CountingBloomFilter filter(kFilter);
    FilterFile file(scratch->path() / "filter", filter, true);
    file.append(std::vector<uint64_t>{1, 2, 3}, 1);
    file.sync();
    file.append(std::vector<uint64_t>{4, ~uint64_t{0}}, 2);
  }
  const auto repair = [](std::string& text) {
    repair_filter(text, 0);
    for (size_t at = filter_counters_end(CountingBloomFilter(kFilter)); at + 24 <= text.size();) {
      const uint64_t keys = get_u64(text, at);
      if (keys > (text.size() - at - 24) / 8) return;
      const std::string covered = text.substr(at, 16) + text.substr(at + 24, keys * 8);
      put_u64(text, at + 16, checksum64(bytes_of(covered), at));
      at += 24 + keys * 8;
    }
  };
  return {"filter-file", {read_file(scratch->path() / "filter", 1 << 20)}, repair, [scratch](Bytes bytes) {
            const std::filesystem::path path = scratch->hold("filter", bytes);
            CountingBloomFilter filter(kFilter);
            try {
              const FilterFile file(path, filter, true);
            } catch (const SchemaMismatchError& refused) {  // a filter, of other settings
              throw CorruptionError(refused.what());
            }
          }};
}

}  // namespace

std::vector<Parser> parsers() {
  return {row_parser(),        record_parser(),       segment_parser(),     manifest_parser(),
          checkpoint_parser(), counters_parser(),     commit_mark_parser(), presence_parser(),
          current_parser(),    saved_filter_parser(), filter_file_parser(), table_tail_parser()};
}

}  // namespace damo
