// SPDX-License-Identifier: Apache-2.0
//
// Every byte on disk of a row, a key and a log record body; docs/format.md is
// the specification. Fixed-width integers are little-endian; the one exception
// is the stored key, big-endian so that its bytes sort as its numbers do.
// No struct is cast onto bytes.
#pragma once

#include <array>
#include <bit>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lifetime.h"

namespace damo {

using Bytes = std::span<const std::byte>;

static_assert(std::endian::native == std::endian::little, "the core supports little-endian machines only");

// XXH3-64 of `bytes`; the one checksum of our own files (RocksDB's files carry
// crc32c, made and checked by RocksDB).
uint64_t checksum64(Bytes bytes, uint64_t seed = 0) noexcept;

// ---------------------------------------------------------------- numbers

// Appends fixed-width little-endian numbers and byte strings to a buffer.
class ByteWriter {
 public:
  explicit ByteWriter(std::string& out) : out_(out) {}
  template <class T>
  void put(T value) {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    out_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void put_bytes(const void* data, size_t size) { out_.append(static_cast<const char*>(data), size); }
  // u32 length, then the bytes.
  void put_string(std::string_view text);
  size_t size() const { return out_.size(); }

 private:
  std::string& out_;
};

// Reads what ByteWriter wrote. Every read checks what is left first and throws
// CorruptionError naming `source` and the offset.
class ByteReader {
 public:
  ByteReader(Bytes bytes, std::string source, uint64_t base_offset = 0)
      : bytes_(bytes), source_(std::move(source)), base_(base_offset) {}
  template <class T>
  T get() {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  Bytes take(size_t size);
  std::string get_string(size_t limit);
  // The next `size` bytes, read apart.
  ByteReader part(size_t size);
  size_t remaining() const { return bytes_.size() - at_; }
  uint64_t offset() const { return base_ + at_; }
  // Throws unless everything was read.
  void expect_end() const;
  [[noreturn]] void corrupt(const std::string& what) const;

 private:
  Bytes bytes_;
  std::string source_;
  uint64_t base_;
  size_t at_ = 0;
};

// -------------------------------------------------------------------- keys

// A bijection on 64 bits (the finalizer of MurmurHash3), so that keys spread
// evenly over shards and key ranges and can still be read back.
constexpr uint64_t mix_key(uint64_t key) noexcept {
  key ^= key >> 33;
  key *= 0xff51afd7ed558ccdULL;
  key ^= key >> 33;
  key *= 0xc4ceb9fe1a85ec53ULL;
  key ^= key >> 33;
  return key;
}
constexpr uint64_t unmix_key(uint64_t mixed) noexcept {
  mixed ^= mixed >> 33;
  mixed *= 0x9cb4b2f8129337dbULL;
  mixed ^= mixed >> 33;
  mixed *= 0x4f74430c22a54005ULL;
  mixed ^= mixed >> 33;
  return mixed;
}

// What the cold tier is sorted by: u32 table id, u64 mixed key, big-endian.
struct StoredKey {
  static constexpr size_t kBytes = 12;
  std::array<std::byte, kBytes> bytes;

  static StoredKey make(uint32_t table_id, uint64_t mixed) noexcept;
  static StoredKey from_bytes(Bytes bytes);  // CorruptionError unless 12 bytes
  uint32_t table_id() const noexcept;
  uint64_t mixed() const noexcept;
  auto operator<=>(const StoredKey& other) const noexcept {
    return std::memcmp(bytes.data(), other.bytes.data(), kBytes) <=> 0;
  }
  bool operator==(const StoredKey& other) const noexcept = default;
};

// -------------------------------------------------------------------- rows

// The stored row, version 1:
//   0  u8  format version (1)
//   1  u8  flags: bit 0 floats follow; bits 1-3 weight dtype, 4-6 state dtype (0 = float32);
//          bit 7 catch-up pending. All but bit 0 must be 0 in version 1.
//   2  u16 reserved, 0
//   4  u32 checksum: low half of XXH3-64 over the stored key, then the row with this field 0
//   8  u32 update count
//  12  u32 group step of the last update (low 32 bits)
//  16  i64 last-update time, seconds since 1970 (creation time until the first update)
//  24  u64 sequence number of the last operation applied
//  32  float32 weights, then float32 state (absent for a row that was only looked up)
inline constexpr size_t kRowHeaderBytes = 32;
inline constexpr uint8_t kRowFormat = 1;

struct RowHeader {
  uint32_t update_count = 0;
  uint32_t step = 0;
  int64_t time = 0;
  uint64_t sequence = 0;
  bool has_floats = false;
};

// Appends one stored row. `floats` is empty for a row that was only looked up.
void encode_row(const StoredKey& key, const RowHeader& header, std::span<const float> floats, std::string& out);

// Checks length, version, flags and checksum; CorruptionError names the key.
// `floats` of the result points into `value` (unaligned: copy it with memcpy).
struct DecodedRow {
  RowHeader header;
  Bytes floats;  // empty, or exactly num_floats * 4 bytes
};
DecodedRow decode_row(const StoredKey& key, Bytes value, size_t num_floats);
// The header of a row of any size; nothing when the row is damaged.
std::optional<RowHeader> peek_row(const StoredKey& key, Bytes value) noexcept;

// ------------------------------------------------------- log record bodies

// Part of the persistent format.
enum class RecordType : uint8_t {
  kApply = 1,
  kInsert = 2,
  kErase = 3,
  kCount = 4,
  kExpire = 5,
  kImport = 7,
  // Reserved for what later versions log: 6 drop group, 8 max-norm, 9 catch-up,
  // 10 filter.
  kCommit = 11,
  kApplyTogether = 12,
};

// Every number one optimizer step uses, in the optimizer's documented order,
// so that redo needs neither the user's objects nor the clock.
struct StepNumbers {
  static constexpr size_t kMax = 12;
  uint32_t count = 0;
  std::array<double, kMax> value{};
};

// What an operation took for expired, and what it did to its group's number of
// rows of each age: redo needs neither the clock nor the rows for that.
struct AgeEffect {
  AgeUnit unit = AgeUnit::kNone;
  int64_t alive_since = kBeforeAllTime;
  AgeChanges changes;  // each bucket once
};

struct ApplyRecord {
  uint32_t table_id = 0;
  uint32_t optimizer_id = 0;
  uint32_t kernel_version = 0;
  uint32_t dimension = 0;
  uint64_t group_step = 0;  // after this update
  int64_t time = 0;
  StepNumbers numbers;
  AgeEffect ages;
  std::span<const uint64_t> keys;  // distinct, in order of appearance
  Bytes gradients;                 // float32 [keys, dimension], summed
};
// The record's bytes before the keys; keys and gradients follow it directly,
// so that the caller can hand the log three spans and copy nothing.
std::string encode_apply_prefix(const ApplyRecord& record);
// `keys` and `gradients` point into `body`; `keys` is copied into `storage` when misaligned.
ApplyRecord decode_apply(ByteReader& body, std::vector<uint64_t>& key_storage);
// Updates of several tables, which happen together or not at all: how many, then each, its length first.
std::string encode_together(uint64_t updates);
std::vector<ByteReader> decode_together(ByteReader& body);

struct KeysRecord {  // insert and erase
  uint32_t table_id = 0;
  int64_t time = 0;
  AgeEffect ages;
  std::span<const uint64_t> keys;
};
std::string encode_keys_prefix(const KeysRecord& record);
KeysRecord decode_keys(ByteReader& body, std::vector<uint64_t>& key_storage);

// Keys without a row, seen by a training lookup of a group that has a filter. Those that come to the filter's count by
// it get a row: which, only the filter says.
struct CountRecord {
  uint32_t table_id = 0;
  int64_t time = 0;
  AgeUnit unit = AgeUnit::kNone;
  int64_t alive_since = kBeforeAllTime;
  int64_t bucket = 0;              // of the ages: where the rows that are made count
  std::span<const uint64_t> keys;  // distinct, in the order in which they are counted
  Bytes times;                     // u32 [keys] how often each was seen, at least once
};
// The record's bytes before the keys; the times follow them.
std::string encode_count_prefix(const CountRecord& record);
CountRecord decode_count(ByteReader& body, std::vector<uint64_t>& key_storage);

// Rows given by the user, whole.
struct ImportRecord {
  uint32_t table_id = 0;
  uint32_t num_floats = 0;  // weights and state of a row
  int64_t time = 0;
  AgeEffect ages;
  std::span<const uint64_t> keys;  // distinct
  Bytes update_counts;             // u32 [keys]
  Bytes floats;                    // float32 [keys, num_floats]
};
// The record's bytes before the keys; update counts and floats follow them.
std::string encode_import_prefix(const ImportRecord& record);
ImportRecord decode_import(ByteReader& body, std::vector<uint64_t>& key_storage);

// The clock was set, and what is expired by it is confirmed.
struct ExpireRecord {
  int64_t time = 0;
};
std::string encode_expire(const ExpireRecord& record);
ExpireRecord decode_expire(ByteReader& body);

struct CommitRecord {
  int64_t step = 0;
  std::string extra;  // the user's bytes
};
std::string encode_commit(const CommitRecord& record);
CommitRecord decode_commit(ByteReader& body);

// What a storage is at one sequence number, beside its rows: written at the
// head of every log segment and into every checkpoint, so that the log can be
// cut anywhere without losing a count.
struct TableCounters {
  uint32_t table_id = 0;
  uint64_t group_step = 0;
  Lifetime lifetime;  // what the buckets are buckets of
  AgeCounts rows;
};
struct StorageCounters {
  uint64_t sequence = 0;
  int64_t clock = 0;
  std::optional<CommitRecord> last_commit;
  std::vector<TableCounters> tables;
};
std::string encode_counters(const StorageCounters& counters);
StorageCounters decode_counters(Bytes bytes, const std::string& source);

}  // namespace damo
