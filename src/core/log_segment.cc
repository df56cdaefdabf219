// SPDX-License-Identifier: Apache-2.0
#include "log_segment.h"

#include <fcntl.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <system_error>
#include <utility>

#include "error.h"
#include "planted.h"

namespace damo {
namespace {

constexpr std::string_view kMagic = "DAMO-LOG";
constexpr uint32_t kSegmentVersion = 1;
constexpr size_t kHeadFieldBytes = 56;  // before the head's checksum
constexpr size_t kMarksOffset = 64;
constexpr size_t kMarkBytes = 32;
constexpr size_t kHeadBytes = 128;  // before the state
constexpr size_t kRecordHeaderBytes = 32;
constexpr size_t kBufferBytes = 1 << 20;
constexpr size_t kNameDigits = 10;

Bytes as_bytes(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

bool all_zero(Bytes bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) { return byte == std::byte{0}; });
}

// checksum64 over several pieces, none of them copied.
class Checksum {
 public:
  explicit Checksum(uint64_t seed = 0) { XXH3_64bits_reset_withSeed(&state_, seed); }
  void add(Bytes bytes) { XXH3_64bits_update(&state_, bytes.data(), bytes.size()); }
  uint64_t value() const { return XXH3_64bits_digest(&state_); }

 private:
  XXH3_state_t state_{};  // reset reads the seed that was there before, so there must be one
};

uint64_t head_checksum(Bytes fields, Bytes state) {
  Checksum checksum;
  checksum.add(fields);
  checksum.add(state);
  return checksum.value();
}

std::optional<SyncMark> decode_sync_mark(Bytes bytes, uint64_t seed) {
  ByteReader reader(bytes, "sync mark");
  SyncMark mark;
  mark.offset = reader.get<uint64_t>();
  mark.sequence = reader.get<uint64_t>();
  if (!all_zero(reader.take(8))) return std::nullopt;
  if (reader.get<uint64_t>() != checksum64(bytes.first(kMarkBytes - 8), seed)) return std::nullopt;
  return mark;
}

}  // namespace

void throw_damaged(const std::filesystem::path& path, uint64_t offset, const std::string& what) {
  throw CorruptionError("[read] " + path.string() + " is damaged at offset " + std::to_string(offset) + ": " + what);
}

// ------------------------------------------------------------------- files

std::string segment_name(uint64_t number) {
  const std::string digits = std::to_string(number);
  return std::string(kNameDigits - std::min(kNameDigits, digits.size()), '0') + digits + ".log";
}

SegmentFiles list_segments(const std::filesystem::path& directory) {
  SegmentFiles files;
  for (const std::filesystem::path& path : list_directory("list the log", directory)) {
    const std::string name = path.filename().string();
    if (name.find_first_not_of("0123456789") != kNameDigits) continue;
    const std::string_view rest = std::string_view(name).substr(kNameDigits);
    if (rest == ".log") files.segments.emplace(std::stoull(name.substr(0, kNameDigits)), path);
    if (rest == ".log.tmp") files.leftovers.push_back(path);
  }
  return files;
}

// ----------------------------------------------------------------- writing

uint64_t segment_seed(const StorageId& storage_id, uint64_t number) {
  std::string bytes;
  ByteWriter writer(bytes);
  writer.put_bytes(storage_id.data(), storage_id.size());
  writer.put(number);
  return checksum64(as_bytes(bytes));
}

std::string encode_sync_mark(const SyncMark& mark, uint64_t seed) {
  std::string bytes;
  ByteWriter writer(bytes);
  writer.put(mark.offset);
  writer.put(mark.sequence);
  writer.put(uint64_t{0});
  writer.put(checksum64(as_bytes(bytes), seed));
  return bytes;
}

uint64_t sync_mark_offset(unsigned slot) { return kMarksOffset + slot * kMarkBytes; }

std::string encode_segment_head(const StorageId& storage_id, uint64_t number, uint64_t first_sequence,
                                std::string_view state) {
  std::string bytes;
  ByteWriter writer(bytes);
  writer.put_bytes(kMagic.data(), kMagic.size());
  writer.put(kSegmentVersion);
  writer.put(uint32_t{0});
  writer.put_bytes(storage_id.data(), storage_id.size());
  writer.put(number);
  writer.put(first_sequence);
  writer.put(static_cast<uint64_t>(state.size()));
  writer.put(head_checksum(as_bytes(bytes), as_bytes(state)));
  const uint64_t end = kHeadBytes + state.size() + record_padding(state.size());
  bytes += encode_sync_mark({end, first_sequence - 1}, segment_seed(storage_id, number));
  bytes.resize(kHeadBytes);
  bytes += state;
  bytes.resize(end);
  return bytes;
}

std::string encode_record_header(RecordType type, uint64_t sequence, std::span<const Bytes> parts, uint64_t seed) {
  uint64_t body_bytes = 0;
  for (const Bytes part : parts) body_bytes += part.size();
  std::string header;
  header.reserve(kRecordHeaderBytes);
  ByteWriter writer(header);
  writer.put(body_bytes);
  writer.put(sequence);
  writer.put(static_cast<uint64_t>(type));  // one byte, then seven that are reserved
  Checksum checksum(seed);
  checksum.add(as_bytes(header));
  for (const Bytes part : parts) checksum.add(part);
  writer.put(checksum.value());
  return header;
}

// ----------------------------------------------------------------- reading

SegmentReader::SegmentReader(const FileDescriptor& file, const StorageId& storage_id)
    : file_(file), file_bytes_(file.bytes()), source_(file.path().string()) {
  ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
  read_head(storage_id);
  // After the marks were read: what they tell of is in the file by then.
  file_bytes_ = file.bytes();
}

void SegmentReader::expect(uint64_t number, std::optional<uint64_t> last) const {
  if (number_ != number) throw_damaged(source_, 32, "its head says that it is segment " + std::to_string(number_));
  if (last && first_sequence_ != *last + 1)
    throw_damaged(source_, 40,
                  "it starts with operation " + std::to_string(first_sequence_) + ", the segment before it ends with " +
                      std::to_string(*last));
}

void SegmentReader::read_head(const StorageId& storage_id) {
  if (file_bytes_ < kHeadBytes)
    throw_damaged(source_, file_bytes_,
                  "the file ends inside its head, which has " + std::to_string(kHeadBytes) + " bytes");
  std::array<std::byte, kHeadBytes> bytes;
  std::memcpy(bytes.data(), peek(kHeadBytes).data(), kHeadBytes);
  skip(kHeadBytes);
  ByteReader fields(bytes, source_);
  if (std::memcmp(fields.take(kMagic.size()).data(), kMagic.data(), kMagic.size()) != 0)
    throw_damaged(source_, 0, "not a segment of an operation log");
  // Before the checksum, for a newer version may have another one: so a flipped bit comes here, too.
  const auto version = fields.get<uint32_t>();
  if (version > kSegmentVersion)
    throw CorruptionError("[read] " + source_ + " has log format " + std::to_string(version) +
                          " at offset 8, this version reads up to " + std::to_string(kSegmentVersion) +
                          ": it was written by a newer version, then upgrade damo-embedding, or it is damaged");
  if (version == 0) throw_damaged(source_, 8, "log format 0");
  fields.take(4);  // reserved, under the checksum
  const Bytes id = fields.take(storage_id.size());
  number_ = fields.get<uint64_t>();
  first_sequence_ = fields.get<uint64_t>();
  const auto state_bytes = fields.get<uint64_t>();
  const uint64_t room = file_bytes_ - offset_;
  if (state_bytes > room || record_padding(state_bytes) > room - state_bytes)
    throw_damaged(source_, kHeadFieldBytes - 8,
                  "a state of " + std::to_string(state_bytes) + " bytes, " + std::to_string(room) + " are left");
  const Bytes padded = peek(state_bytes + record_padding(state_bytes));
  const Bytes state = padded.first(state_bytes);
  if (fields.get<uint64_t>() != head_checksum(Bytes(bytes).first(kHeadFieldBytes), state))
    throw_damaged(source_, kHeadFieldBytes, "the head's checksum does not match");
  if (!all_zero(padded.subspan(state_bytes))) throw_damaged(source_, offset_ + state_bytes, "padding that is not zero");
  // After the checksum, so that damage is not taken for another storage's file.
  if (std::memcmp(id.data(), storage_id.data(), id.size()) != 0)
    throw CorruptionError("[read] " + source_ + " belongs to another storage: its storage id is not this one's");
  state_.assign(reinterpret_cast<const char*>(state.data()), state.size());
  skip(padded.size());

  // Two slots, so that one torn by a power loss costs nothing: the other is as true, only older.
  seed_ = segment_seed(storage_id, number_);
  const auto slot = [&](unsigned i) { return Bytes(bytes).subspan(sync_mark_offset(i), kMarkBytes); };
  const auto first = decode_sync_mark(slot(0), seed_), second = decode_sync_mark(slot(1), seed_);
  if (!first && !second) throw_damaged(source_, kMarksOffset, "neither sync mark has the right checksum");
  mark_slot_ = !first || (second && second->offset > first->offset) ? 1 : 0;
  mark_ = mark_slot_ == 0 ? *first : *second;
}

std::optional<std::string> SegmentReader::read(LogRecord& record) {
  constexpr const char* kShorter = "the file became shorter while it was read";
  const uint64_t left = file_bytes_ - offset_;
  if (left < kRecordHeaderBytes) return "the file ends inside a record's header";
  if (!fetch(kRecordHeaderBytes)) return kShorter;
  ByteReader header(peek(kRecordHeaderBytes), source_, offset_);
  const auto body_bytes = header.get<uint64_t>();
  record.sequence = header.get<uint64_t>();
  record.type = header.get<RecordType>();
  record.offset = offset_;
  if (!all_zero(header.take(7))) return "reserved bytes that are not zero";
  const auto stored = header.get<uint64_t>();
  const uint64_t room = left - kRecordHeaderBytes;
  if (body_bytes > room || record_padding(body_bytes) > room - body_bytes)
    return "a record of " + std::to_string(body_bytes) + " bytes, " + std::to_string(room) + " are left";
  record_bytes_ = kRecordHeaderBytes + body_bytes + record_padding(body_bytes);
  if (!fetch(record_bytes_)) return kShorter;
  const Bytes whole = peek(record_bytes_);
  record.body = whole.subspan(kRecordHeaderBytes, body_bytes);
  Checksum checksum(seed_);
  checksum.add(whole.first(kRecordHeaderBytes - 8));
  checksum.add(record.body);
  if (checksum.value() != stored && !planted("record's checksum not looked at"))
    return "a record whose checksum does not match";
  if (!all_zero(whole.subspan(kRecordHeaderBytes + body_bytes))) return "padding that is not zero";
  return std::nullopt;
}

void SegmentReader::next() { skip(std::exchange(record_bytes_, 0)); }

void SegmentReader::skip(uint64_t size) {
  begin_ += size;
  offset_ += size;
}

Bytes SegmentReader::peek(uint64_t size) {
  if (!fetch(size)) throw_damaged(source_, offset_ + end_ - begin_, "the file became shorter while it was read");
  return {buffer_.get() + begin_, size};
}

bool SegmentReader::fetch(uint64_t size) {
  const size_t have = end_ - begin_;
  if (have >= size) return true;
  if (size > capacity_) {
    const size_t capacity = std::max<uint64_t>(size, std::min<uint64_t>(kBufferBytes, file_bytes_));
    std::unique_ptr<std::byte[]> larger;
    try {
      larger = std::make_unique_for_overwrite<std::byte[]>(capacity);
    } catch (const std::bad_alloc&) {
      throw StorageError("[read] " + source_ + ": not enough memory for the " + std::to_string(size) +
                         " bytes at offset " + std::to_string(offset_));
    }
    if (have != 0) std::memcpy(larger.get(), buffer_.get() + begin_, have);
    buffer_ = std::move(larger);
    capacity_ = capacity;
  } else if (have != 0) {
    std::memmove(buffer_.get(), buffer_.get() + begin_, have);
  }
  begin_ = 0;
  end_ = have + file_.read_at({buffer_.get() + have, capacity_ - have}, offset_ + have);
  return end_ >= size;
}

void read_records(SegmentReader& reader, const std::filesystem::path& path, bool is_newest, uint64_t& last,
                  const std::function<void(const LogRecord&)>& on_record) {
  const SyncMark mark = reader.mark();
  LogRecord record;
  record.source = path.string();
  bool mark_met = false;
  for (;; reader.next()) {
    if (reader.offset() == mark.offset) mark_met = mark.sequence == last;
    if (reader.at_end()) break;
    if (const auto bad = reader.read(record)) {
      // The next segment was created only after this one was synced, so only the newest may have a torn end.
      if (!is_newest || reader.offset() < mark.offset) throw_damaged(path, reader.offset(), *bad);
      break;
    }
    // Its checksum is right: no torn write explains it.
    if (record.sequence != last + 1)
      throw_damaged(
          path, reader.offset(),
          "operation " + std::to_string(record.sequence) + " where " + std::to_string(last + 1) + " was expected");
    on_record(record);
    last = record.sequence;
  }
  if (!mark_met)
    throw_damaged(path, reader.offset(),
                  "the records do not reach, or do not fit, the sync mark at offset " + std::to_string(mark.offset) +
                      " (operation " + std::to_string(mark.sequence) + ")");
}

}  // namespace damo
