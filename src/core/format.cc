// SPDX-License-Identifier: Apache-2.0
#include "format.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "error.h"
#include "planted.h"

namespace damo {
namespace {

constexpr uint8_t kFlagFloats = 1;

void store_big_endian(uint64_t value, size_t size, std::byte* out) noexcept {
  for (size_t i = 0; i < size; ++i) out[i] = static_cast<std::byte>(value >> (8 * (size - 1 - i)));
}

uint64_t load_big_endian(const std::byte* in, size_t size) noexcept {
  uint64_t value = 0;
  for (size_t i = 0; i < size; ++i) value = value << 8 | static_cast<uint64_t>(in[i]);
  return value;
}

// The row's bytes with the checksum field taken as zero, after the stored key,
// so that a row found under another row's key is damage as well.
uint32_t row_checksum(const StoredKey& key, Bytes row) noexcept {
  static constexpr std::array<std::byte, 4> zero{};
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, key.bytes.data(), key.bytes.size());
  XXH3_64bits_update(&state, row.data(), 4);
  XXH3_64bits_update(&state, zero.data(), zero.size());
  XXH3_64bits_update(&state, row.data() + 8, row.size() - 8);
  return static_cast<uint32_t>(XXH3_64bits_digest(&state));
}

std::string describe(const StoredKey& key) {
  return "key " + std::to_string(unmix_key(key.mixed())) + " of table " + std::to_string(key.table_id());
}

}  // namespace

uint64_t checksum64(Bytes bytes, uint64_t seed) noexcept {
  return XXH3_64bits_withSeed(bytes.data(), bytes.size(), seed);
}

void ByteWriter::put_string(std::string_view text) {
  put(static_cast<uint32_t>(text.size()));
  put_bytes(text.data(), text.size());
}

Bytes ByteReader::take(size_t size) {
  if (size > remaining())
    corrupt("needs " + std::to_string(size) + " more bytes, " + std::to_string(remaining()) + " are left");
  const Bytes taken = bytes_.subspan(at_, size);
  at_ += size;
  return taken;
}

ByteReader ByteReader::part(size_t size) {
  const uint64_t begin = offset();
  return {take(size), source_, begin};
}

std::string ByteReader::get_string(size_t limit) {
  const auto size = get<uint32_t>();
  if (size > limit) corrupt("a text of " + std::to_string(size) + " bytes, at most " + std::to_string(limit));
  const Bytes text = take(size);
  return {reinterpret_cast<const char*>(text.data()), text.size()};
}

void ByteReader::expect_end() const {
  if (remaining() != 0) corrupt(std::to_string(remaining()) + " bytes too many");
}

void ByteReader::corrupt(const std::string& what) const {
  throw CorruptionError("[read] " + source_ + " is damaged at offset " + std::to_string(offset()) + ": " + what);
}

StoredKey StoredKey::make(uint32_t table_id, uint64_t mixed) noexcept {
  StoredKey key;
  store_big_endian(table_id, 4, key.bytes.data());
  store_big_endian(mixed, 8, key.bytes.data() + 4);
  return key;
}

StoredKey StoredKey::from_bytes(Bytes bytes) {
  if (bytes.size() != kBytes)
    throw CorruptionError("[read] a stored key has " + std::to_string(bytes.size()) + " bytes, expected 12");
  StoredKey key;
  std::memcpy(key.bytes.data(), bytes.data(), kBytes);
  return key;
}

uint32_t StoredKey::table_id() const noexcept { return static_cast<uint32_t>(load_big_endian(bytes.data(), 4)); }
uint64_t StoredKey::mixed() const noexcept { return load_big_endian(bytes.data() + 4, 8); }

void encode_row(const StoredKey& key, const RowHeader& header, std::span<const float> floats, std::string& out) {
  const size_t start = out.size();
  ByteWriter writer(out);
  writer.put(kRowFormat);
  writer.put(static_cast<uint8_t>(floats.empty() ? 0 : kFlagFloats));
  writer.put(uint16_t{0});
  writer.put(uint32_t{0});
  writer.put(header.update_count);
  writer.put(header.step);
  writer.put(header.time);
  writer.put(header.sequence);
  writer.put_bytes(floats.data(), floats.size_bytes());
  const Bytes row = std::as_bytes(std::span(out)).subspan(start);
  const uint32_t checksum = row_checksum(key, row);
  std::memcpy(out.data() + start + 4, &checksum, sizeof checksum);
}

DecodedRow decode_row(const StoredKey& key, Bytes value, size_t num_floats) {
  const auto damaged = [&](const std::string& what) {
    throw CorruptionError("[read] the stored row of " + describe(key) + " is damaged: " + what);
  };
  if (value.size() < kRowHeaderBytes)
    damaged(std::to_string(value.size()) + " bytes, a row has at least " + std::to_string(kRowHeaderBytes));
  const auto at = [&](size_t offset, auto& field) { std::memcpy(&field, value.data() + offset, sizeof field); };
  uint8_t format = 0, flags = 0;
  uint32_t checksum = 0;
  at(0, format);
  at(1, flags);
  at(4, checksum);
  if (checksum != row_checksum(key, value) && !planted("row's checksum not looked at"))
    damaged("its checksum does not agree");
  // The checksum is right, so it is not damage.
  const auto newer = [&](const std::string& what) {
    throw NewerVersionError("[read] the stored row of " + describe(key) + " has " + what +
                            ", written by a newer version: upgrade damo-embedding");
  };
  if (format != kRowFormat) newer("row format " + std::to_string(format) + ", this one reads 1");
  if ((flags & ~kFlagFloats) != 0) newer("flags " + std::to_string(flags));
  DecodedRow row;
  row.header.has_floats = (flags & kFlagFloats) != 0;
  at(8, row.header.update_count);
  at(12, row.header.step);
  at(16, row.header.time);
  at(24, row.header.sequence);
  row.floats = value.subspan(kRowHeaderBytes);
  const size_t expected = row.header.has_floats ? num_floats * sizeof(float) : 0;
  if (row.floats.size() != expected)
    damaged(std::to_string(row.floats.size()) + " bytes of floats, expected " + std::to_string(expected));
  return row;
}

std::optional<RowHeader> peek_row(const StoredKey& key, Bytes value) noexcept {
  if (value.size() < kRowHeaderBytes) return std::nullopt;
  const size_t floats = (value.size() - kRowHeaderBytes) / sizeof(float);
  try {
    return decode_row(key, value, floats).header;
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

// ------------------------------------------------------- log record bodies

namespace {

std::span<const uint64_t> aligned_keys(Bytes bytes, size_t count, std::vector<uint64_t>& storage) {
  if (reinterpret_cast<uintptr_t>(bytes.data()) % alignof(uint64_t) == 0)
    return {reinterpret_cast<const uint64_t*>(bytes.data()), count};
  if (count == 0) return {};
  storage.resize(count);
  std::memcpy(storage.data(), bytes.data(), bytes.size());
  return storage;
}

Bytes take_array(ByteReader& body, uint64_t count, uint64_t item_bytes) {
  if (count > body.remaining() / item_bytes)
    body.corrupt(std::to_string(count) + " items of " + std::to_string(item_bytes) + " bytes do not fit");
  return body.take(static_cast<size_t>(count * item_bytes));
}

AgeUnit get_unit(ByteReader& body) {
  const auto unit = body.get<uint32_t>();
  if (unit > static_cast<uint32_t>(AgeUnit::kSteps)) body.corrupt("ages of unit " + std::to_string(unit));
  return static_cast<AgeUnit>(unit);
}

void put_changes(ByteWriter& writer, const AgeChanges& changes) {
  writer.put(static_cast<uint64_t>(changes.size()));
  for (const auto& [bucket, change] : changes) {
    writer.put(bucket);
    writer.put(change);
  }
}

AgeChanges get_changes(ByteReader& body) {
  const auto count = body.get<uint64_t>();
  if (count > body.remaining() / 16) body.corrupt(std::to_string(count) + " changes of ages do not fit");
  AgeChanges changes(static_cast<size_t>(count));
  for (auto& [bucket, change] : changes) {
    bucket = body.get<int64_t>();
    change = body.get<int64_t>();
  }
  return changes;
}

}  // namespace

std::string encode_apply_prefix(const ApplyRecord& record) {
  std::string out;
  ByteWriter writer(out);
  writer.put(record.table_id);
  writer.put(record.optimizer_id);
  writer.put(record.kernel_version);
  writer.put(record.dimension);
  writer.put(record.group_step);
  writer.put(record.time);
  writer.put(record.ages.alive_since);
  writer.put(static_cast<uint64_t>(record.keys.size()));
  writer.put(record.numbers.count);
  writer.put(record.ages.unit);
  for (uint32_t i = 0; i < record.numbers.count; ++i) writer.put(record.numbers.value[i]);
  put_changes(writer, record.ages.changes);
  return out;
}

ApplyRecord decode_apply(ByteReader& body, std::vector<uint64_t>& key_storage) {
  ApplyRecord record;
  record.table_id = body.get<uint32_t>();
  record.optimizer_id = body.get<uint32_t>();
  record.kernel_version = body.get<uint32_t>();
  record.dimension = body.get<uint32_t>();
  record.group_step = body.get<uint64_t>();
  record.time = body.get<int64_t>();
  record.ages.alive_since = body.get<int64_t>();
  const auto num_keys = body.get<uint64_t>();
  record.numbers.count = body.get<uint32_t>();
  record.ages.unit = get_unit(body);
  if (record.numbers.count > StepNumbers::kMax)
    body.corrupt(std::to_string(record.numbers.count) + " optimizer numbers, at most " +
                 std::to_string(StepNumbers::kMax));
  for (uint32_t i = 0; i < record.numbers.count; ++i) record.numbers.value[i] = body.get<double>();
  if (record.dimension == 0) body.corrupt("an update of dimension 0");
  record.ages.changes = get_changes(body);
  record.keys = aligned_keys(take_array(body, num_keys, sizeof(uint64_t)), num_keys, key_storage);
  record.gradients = take_array(body, num_keys, uint64_t{record.dimension} * sizeof(float));
  body.expect_end();
  return record;
}

std::string encode_together(uint64_t updates) {
  std::string out;
  ByteWriter(out).put(updates);
  return out;
}

std::vector<ByteReader> decode_together(ByteReader& body) {
  const auto updates = body.get<uint64_t>();
  if (updates > body.remaining() / sizeof(uint64_t))
    body.corrupt(std::to_string(updates) + " updates in " + std::to_string(body.remaining()) + " bytes");
  std::vector<ByteReader> parts;
  for (uint64_t i = 0; i < updates; ++i) parts.push_back(body.part(body.get<uint64_t>()));
  body.expect_end();
  return parts;
}

std::string encode_keys_prefix(const KeysRecord& record) {
  std::string out;
  ByteWriter writer(out);
  writer.put(record.table_id);
  writer.put(record.ages.unit);
  writer.put(record.time);
  writer.put(record.ages.alive_since);
  writer.put(static_cast<uint64_t>(record.keys.size()));
  put_changes(writer, record.ages.changes);
  return out;
}

KeysRecord decode_keys(ByteReader& body, std::vector<uint64_t>& key_storage) {
  KeysRecord record;
  record.table_id = body.get<uint32_t>();
  record.ages.unit = get_unit(body);
  record.time = body.get<int64_t>();
  record.ages.alive_since = body.get<int64_t>();
  const auto num_keys = body.get<uint64_t>();
  record.ages.changes = get_changes(body);
  record.keys = aligned_keys(take_array(body, num_keys, sizeof(uint64_t)), num_keys, key_storage);
  body.expect_end();
  return record;
}

std::string encode_count_prefix(const CountRecord& record) {
  std::string out;
  ByteWriter writer(out);
  writer.put(record.table_id);
  writer.put(record.unit);
  writer.put(record.time);
  writer.put(record.alive_since);
  writer.put(record.bucket);
  writer.put(static_cast<uint64_t>(record.keys.size()));
  return out;
}

CountRecord decode_count(ByteReader& body, std::vector<uint64_t>& key_storage) {
  CountRecord record;
  record.table_id = body.get<uint32_t>();
  record.unit = get_unit(body);
  record.time = body.get<int64_t>();
  record.alive_since = body.get<int64_t>();
  record.bucket = body.get<int64_t>();
  const auto num_keys = body.get<uint64_t>();
  record.keys = aligned_keys(take_array(body, num_keys, sizeof(uint64_t)), num_keys, key_storage);
  record.times = take_array(body, num_keys, sizeof(uint32_t));
  body.expect_end();
  return record;
}

std::string encode_import_prefix(const ImportRecord& record) {
  std::string out;
  ByteWriter writer(out);
  writer.put(record.table_id);
  writer.put(record.ages.unit);
  writer.put(record.time);
  writer.put(record.ages.alive_since);
  writer.put(static_cast<uint64_t>(record.keys.size()));
  writer.put(record.num_floats);
  writer.put(uint32_t{0});
  put_changes(writer, record.ages.changes);
  return out;
}

ImportRecord decode_import(ByteReader& body, std::vector<uint64_t>& key_storage) {
  ImportRecord record;
  record.table_id = body.get<uint32_t>();
  record.ages.unit = get_unit(body);
  record.time = body.get<int64_t>();
  record.ages.alive_since = body.get<int64_t>();
  const auto num_keys = body.get<uint64_t>();
  record.num_floats = body.get<uint32_t>();
  body.get<uint32_t>();
  record.ages.changes = get_changes(body);
  if (record.num_floats == 0) body.corrupt("rows without floats");
  record.keys = aligned_keys(take_array(body, num_keys, sizeof(uint64_t)), num_keys, key_storage);
  record.update_counts = take_array(body, num_keys, sizeof(uint32_t));
  record.floats = take_array(body, num_keys, uint64_t{record.num_floats} * sizeof(float));
  body.expect_end();
  return record;
}

std::string encode_expire(const ExpireRecord& record) {
  std::string out;
  ByteWriter(out).put(record.time);
  return out;
}

ExpireRecord decode_expire(ByteReader& body) {
  const ExpireRecord record{body.get<int64_t>()};
  body.expect_end();
  return record;
}

std::string encode_commit(const CommitRecord& record) {
  std::string out;
  ByteWriter writer(out);
  writer.put(record.step);
  writer.put_string(record.extra);
  return out;
}

CommitRecord decode_commit(ByteReader& body) {
  CommitRecord record;
  record.step = body.get<int64_t>();
  record.extra = body.get_string(body.remaining());
  body.expect_end();
  return record;
}

std::string encode_counters(const StorageCounters& counters) {
  std::string out;
  ByteWriter writer(out);
  writer.put(uint32_t{1});  // format version of this block
  writer.put(static_cast<uint32_t>(counters.tables.size()));
  writer.put(counters.sequence);
  writer.put(counters.clock);
  for (const TableCounters& table : counters.tables) {
    writer.put(table.table_id);
    writer.put(table.lifetime.unit);
    writer.put(table.lifetime.ttl);
    writer.put(table.group_step);
    writer.put(static_cast<uint64_t>(table.rows.buckets().size()));
    for (const auto& [bucket, rows] : table.rows.buckets()) {
      writer.put(bucket);
      writer.put(rows);
    }
  }
  writer.put(static_cast<uint8_t>(counters.last_commit.has_value()));
  if (counters.last_commit) {
    writer.put(counters.last_commit->step);
    writer.put_string(counters.last_commit->extra);
  }
  return out;
}

StorageCounters decode_counters(Bytes bytes, const std::string& source) {
  ByteReader reader(bytes, source);
  if (const auto version = reader.get<uint32_t>(); version != 1)
    throw NewerVersionError("[read] " + source + " has counters of format " + std::to_string(version) +
                            ", written by a newer version; this one reads 1: upgrade damo-embedding");
  StorageCounters counters;
  const auto num_tables = reader.get<uint32_t>();
  counters.sequence = reader.get<uint64_t>();
  counters.clock = reader.get<int64_t>();
  if (num_tables > reader.remaining() / 32) reader.corrupt(std::to_string(num_tables) + " tables do not fit");
  for (uint32_t i = 0; i < num_tables; ++i) {
    TableCounters table;
    table.table_id = reader.get<uint32_t>();
    table.lifetime.unit = get_unit(reader);
    table.lifetime.ttl = reader.get<uint64_t>();
    table.group_step = reader.get<uint64_t>();
    const auto buckets = reader.get<uint64_t>();
    if (buckets > reader.remaining() / 16) reader.corrupt(std::to_string(buckets) + " ages do not fit");
    for (uint64_t b = 0; b < buckets; ++b) {
      const auto bucket = reader.get<int64_t>();
      table.rows.add(bucket, reader.get<uint64_t>());
    }
    counters.tables.push_back(std::move(table));
  }
  if (reader.get<uint8_t>() != 0) {
    CommitRecord commit;
    commit.step = reader.get<int64_t>();
    commit.extra = reader.get_string(reader.remaining());
    counters.last_commit = std::move(commit);
  }
  reader.expect_end();
  return counters;
}

}  // namespace damo
