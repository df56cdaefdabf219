// SPDX-License-Identifier: Apache-2.0
//
// The bytes of one segment file of the operation log: its name, head, sync
// marks and records, and the reader that checks them. docs/format.md is the
// specification; what follows from the bytes is operation_log.cc's business.
//
// Errors: CorruptionError with the file and the offset, StorageError when the system refuses to read.
// Thread safety: none; a reader belongs to one thread.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "file.h"
#include "format.h"
#include "operation_log.h"

namespace damo {

using StorageId = std::array<std::byte, 16>;

[[noreturn]] void throw_damaged(const std::filesystem::path& path, uint64_t offset, const std::string& what);

// ------------------------------------------------------------------- files

std::string segment_name(uint64_t number);  // "0000000001.log"

struct SegmentFiles {
  std::map<uint64_t, std::filesystem::path> segments;  // by number
  std::vector<std::filesystem::path> leftovers;        // of creations that did not end
};
SegmentFiles list_segments(const std::filesystem::path& directory);

// ----------------------------------------------------------------- writing

// Seeds the checksums of records and marks: bytes of another storage or another segment are never taken for this one's.
uint64_t segment_seed(const StorageId& storage_id, uint64_t number);

// How far a segment is known to be on the disk.
struct SyncMark {
  uint64_t offset = 0;    // the end of the last synced record, or of the head
  uint64_t sequence = 0;  // of that record, or the first sequence number less one
};
std::string encode_sync_mark(const SyncMark& mark, uint64_t seed);
uint64_t sync_mark_offset(unsigned slot);  // of slot 0 or 1

// The head with the caller's state, padded; the first mark is in slot 0.
std::string encode_segment_head(const StorageId& storage_id, uint64_t number, uint64_t first_sequence,
                                std::string_view state);

// The header of the record whose body is the concatenation of `parts`. After the body come record_padding(its bytes)
// zeros.
std::string encode_record_header(RecordType type, uint64_t sequence, std::span<const Bytes> parts, uint64_t seed);
constexpr uint64_t record_padding(uint64_t bytes) { return (8 - bytes % 8) % 8; }

// ----------------------------------------------------------------- reading

// Reads a segment from its start to its end through one buffer. The buffer grows to the largest record, and only after
// the record's length was checked against the file's.
class SegmentReader {
 public:
  // Reads and checks the head. `file` outlives the reader. Somebody may be appending to it: what comes after this is
  // not read.
  SegmentReader(const FileDescriptor& file, const StorageId& storage_id);

  // CorruptionError when this is not segment `number`, or does not go on from operation `last`. No `last`: none is
  // before.
  void expect(uint64_t number, std::optional<uint64_t> last) const;

  uint64_t number() const { return number_; }
  uint64_t first_sequence() const { return first_sequence_; }
  const std::string& state() const { return state_; }
  const SyncMark& mark() const { return mark_; }     // the newer one
  unsigned mark_slot() const { return mark_slot_; }  // where it is

  uint64_t offset() const { return offset_; }  // of the next record
  uint64_t file_bytes() const { return file_bytes_; }
  bool at_end() const { return offset_ == file_bytes_; }

  // Reads the record at offset() without moving on, and says what is wrong with it, if anything. Its body is valid
  // until the next read().
  std::optional<std::string> read(LogRecord& record);
  void next();  // past the record just read

 private:
  void read_head(const StorageId& storage_id);
  Bytes peek(uint64_t size);  // the next bytes, at a multiple of 8 in memory as in the file; valid until the next fetch
  bool fetch(uint64_t size);  // so that peek has them; false when the file has them no more
  void skip(uint64_t size);

  const FileDescriptor& file_;
  uint64_t file_bytes_;
  const std::string source_;
  uint64_t number_ = 0;
  uint64_t first_sequence_ = 0;
  std::string state_;
  SyncMark mark_;
  unsigned mark_slot_ = 0;
  uint64_t seed_ = 0;
  uint64_t record_bytes_ = 0;  // of the record just read, with header and padding

  uint64_t offset_ = 0;  // in the file, of buffer_[begin_]
  std::unique_ptr<std::byte[]> buffer_;
  size_t capacity_ = 0, begin_ = 0, end_ = 0;
};

// Reads records up to the end, which in the newest segment may be torn: a bad record behind the sync mark is the end
// there. Leaves the reader at the end of the last record, and its number in `last`, where the number of the one before
// the first is at the start. CorruptionError: damage, or a number that does not follow.
void read_records(SegmentReader& reader, const std::filesystem::path& path, bool is_newest, uint64_t& last,
                  const std::function<void(const LogRecord&)>& on_record);

}  // namespace damo
