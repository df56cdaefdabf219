// SPDX-License-Identifier: Apache-2.0
//
// The operation log: append-only records in numbered segment files. What a
// record means is the storage's business; the log keeps order, checks bytes,
// and says what is synced.
//
// A segment file "NNNNNNNNNN.log" (docs/format.md has the bytes):
//   head   magic, version, storage id, segment number, first sequence number,
//          checksum; two alternating slots of a sync mark (offset, sequence,
//          checksum); then the caller's opaque state as of that first sequence
//   then   records: 32-byte header (body length, sequence, type, checksum over
//          header and body, seeded by storage id and segment number), body padded to 8 bytes
//
// Invariants: sequence numbers rise by one from record to record, over segments as well. A segment is
// synced whole before the next one is created, so only the last can have a torn end. A sync mark is
// written after the sync it tells of: a bad record before the mark is corruption, after it the end of the log.
//
// Thread safety: one appender at a time (the caller's order lock); sync, synced_sequence, bytes from any
// thread, beside the appender. Several threads in sync() share one fdatasync (group commit).
//
// Errors: a failed write is rolled back (the file truncated to where it was); when even that fails, or
// when a sync fails, the error is latched and every later append and sync throws it again.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "format.h"

namespace damo {

struct LogOptions {
  std::filesystem::path directory;         // exists
  std::array<std::byte, 16> storage_id{};  // a foreign segment is CorruptionError
  uint64_t segment_bytes = 64ull << 20;    // should_rotate() once the segment is larger
};

struct LogRecord {
  uint64_t sequence = 0;
  RecordType type{};
  Bytes body;           // valid during the callback only
  std::string source;   // file, for messages
  uint64_t offset = 0;  // of the record in its file
};

class OperationLog {
 public:
  // Starts a log in a directory without segments. The first record will carry `first_sequence` (1 or more).
  static std::unique_ptr<OperationLog> create(const LogOptions& options, uint64_t first_sequence,
                                              std::string_view state);

  // The same in one file that takes the place of the only segment of a log that nobody has open. Durable on return.
  static void replace_empty(const LogOptions& options, uint64_t first_sequence, std::string_view state);
  // A log that is not written: it numbers what is appended, and has no file, no byte, and nothing to sync.
  static std::unique_ptr<OperationLog> unwritten(uint64_t first_sequence);

  // Reads the heads alone, and gives the oldest segment's state to `on_state`: a foreign, newer or damaged head is
  // CorruptionError before anything is changed.
  static void check_heads(const LogOptions& options, const std::function<void(std::string_view state)>& on_state);

  // Reads an existing log in order: `on_state` once with the oldest segment's state and first sequence, then
  // `on_record` for each record. Truncates a torn end and syncs the truncation before returning; then
  // appends go on. CorruptionError with file and offset for damage before the sync mark, a gap between
  // segments, a foreign or newer file. No segments at all: CorruptionError. Truncates nothing on error.
  // `dropped`: drop_through() was called with that number, perhaps without end: segments up to it that are still
  // there are not read, but removed once all others were.
  static std::unique_ptr<OperationLog> recover(
      const LogOptions& options, const std::function<void(uint64_t first_sequence, std::string_view state)>& on_state,
      const std::function<void(const LogRecord&)>& on_record, uint64_t dropped = 0);
  ~OperationLog();  // closes files; syncs nothing
  OperationLog(const OperationLog&) = delete;
  OperationLog& operator=(const OperationLog&) = delete;

  // Appends one record, its body the concatenation of `parts`, and returns its sequence number. On return
  // the record is in the file (survives the death of the process). StorageError: nothing was appended.
  uint64_t append(RecordType type, std::span<const Bytes> parts);

  // Returns when everything appended before the call is on the disk.
  void sync();
  // Returns when everything up to `sequence` is on the disk; at once if it is already.
  void sync_to(uint64_t sequence);
  uint64_t synced_sequence() const noexcept;
  // Of a log that is not written: up to this one all is on the disk by other means.
  void note_synced(uint64_t sequence) noexcept;
  uint64_t last_sequence() const noexcept;  // of the last record appended (first_sequence - 1 if none)

  bool should_rotate() const noexcept;
  bool newest_segment_is_empty() const noexcept;  // it holds no record: a rotation would gain nothing
  // Syncs, then starts a new segment with the state as of last_sequence(). Called by the appender.
  void rotate(std::string_view state);
  // Deletes the segments whose records all have numbers <= sequence (never the newest segment).
  void drop_through(uint64_t sequence);

  uint64_t bytes() const noexcept;  // all segments
  std::filesystem::path directory() const;

 private:
  struct Impl;
  explicit OperationLog(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace damo
