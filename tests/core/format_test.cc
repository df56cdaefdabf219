// SPDX-License-Identifier: Apache-2.0
#include "format.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "error.h"

namespace damo {
namespace {

Bytes bytes_of(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

std::string hex(Bytes bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::byte b : bytes) {
    text += kDigits[std::to_integer<int>(b) >> 4];
    text += kDigits[std::to_integer<int>(b) & 15];
  }
  return text;
}

// Bytes of exactly their length, so that a sanitizer sees a read behind them.
std::vector<std::byte> copy_of(std::string_view text) {
  const Bytes bytes = bytes_of(text);
  return {bytes.begin(), bytes.end()};
}

const StoredKey kKey = StoredKey::make(0x01020304, mix_key(1));
const RowHeader kHeader{
    .update_count = 3, .step = 7, .time = 1700000000, .sequence = 0x1122334455667788, .has_floats = true};
const std::vector<float> kFloats{1.0f, -2.5f, 0.1f};

std::string stored_row() {
  std::string row;
  encode_row(kKey, kHeader, kFloats, row);
  return row;
}

// -------------------------------------------------------------------- keys

TEST_CASE("format: the mix of a key can be undone and spreads neighbours") {
  std::mt19937_64 random(1);
  for (int i = 0; i < 10000; ++i) {
    const uint64_t key = random();
    REQUIRE(unmix_key(mix_key(key)) == key);
    REQUIRE(mix_key(unmix_key(key)) == key);
  }
  for (const uint64_t key : {uint64_t{0}, uint64_t{1}, ~uint64_t{0}, uint64_t{1} << 63})
    CHECK(unmix_key(mix_key(key)) == key);
  CHECK(mix_key(0) == 0);
  CHECK(mix_key(1) == 0xb456bcfc34c2cb2c);
  std::vector<int> buckets(256, 0);
  for (uint64_t key = 0; key < 256 * 100; ++key) ++buckets[mix_key(key) >> 56];
  CHECK(*std::min_element(buckets.begin(), buckets.end()) > 50);
  CHECK(*std::max_element(buckets.begin(), buckets.end()) < 160);
}

TEST_CASE("format: a stored key is the table and the mixed key, big-endian, and sorts as they do") {
  CHECK(hex(kKey.bytes) == "01020304b456bcfc34c2cb2c");
  CHECK(kKey.table_id() == 0x01020304);
  CHECK(kKey.mixed() == mix_key(1));
  CHECK(StoredKey::from_bytes(kKey.bytes) == kKey);
  std::mt19937_64 random(2);
  for (int i = 0; i < 1000; ++i) {
    const auto a = std::pair(static_cast<uint32_t>(random() % 3 << (random() % 30)), random() >> (random() % 64));
    const auto b = std::pair(static_cast<uint32_t>(random() % 3 << (random() % 30)), random() >> (random() % 64));
    CHECK((StoredKey::make(a.first, a.second) < StoredKey::make(b.first, b.second)) == (a < b));
  }
  std::vector<std::byte> wrong(13);
  for (size_t size = 0; size <= 13; ++size)
    if (size != StoredKey::kBytes) CHECK_THROWS_AS(StoredKey::from_bytes(Bytes(wrong).first(size)), CorruptionError);
}

// -------------------------------------------------------------------- rows

// Made again by: struct.pack('<BBHIIIqQ', 1, flags, 0, checksum, count, step, time, sequence) + floats, where checksum
// is xxhash.xxh3_64_intdigest(key + the row with checksum 0) & 0xffffffff.
TEST_CASE("format: a stored row has the documented bytes") {
  CHECK(hex(bytes_of(stored_row())) ==
        "01010000d24fb564030000000700000000f153650000000088776655443322110000803f000020c0cdcccc3d");
  std::string looked_up;
  encode_row(kKey, {.update_count = 0, .step = 0, .time = -1, .sequence = 9}, {}, looked_up);
  CHECK(hex(bytes_of(looked_up)) == "0100000069dcf4cd0000000000000000ffffffffffffffff0900000000000000");
}

TEST_CASE("format: rows come back as they were written, behind whatever the buffer holds, NaN bits included") {
  std::mt19937_64 random(3);
  std::string buffer = "before";
  for (size_t num_floats = 0; num_floats < 70; ++num_floats) {
    const StoredKey key = StoredKey::make(static_cast<uint32_t>(random()), random());
    const RowHeader header{.update_count = static_cast<uint32_t>(random()),
                           .step = static_cast<uint32_t>(random()),
                           .time = static_cast<int64_t>(random()),
                           .sequence = random()};
    std::vector<float> floats(num_floats);
    for (float& f : floats) f = std::bit_cast<float>(static_cast<uint32_t>(random()));
    const size_t begin = buffer.size();
    encode_row(key, header, floats, buffer);
    CHECK(buffer.size() == begin + kRowHeaderBytes + num_floats * 4);
    const DecodedRow row = decode_row(key, bytes_of(buffer).subspan(begin), num_floats);
    CHECK(row.header.update_count == header.update_count);
    CHECK(row.header.step == header.step);
    CHECK(row.header.time == header.time);
    CHECK(row.header.sequence == header.sequence);
    CHECK(row.header.has_floats == (num_floats > 0));
    REQUIRE(row.floats.size() == num_floats * 4);
    CHECK((num_floats == 0 || std::memcmp(row.floats.data(), floats.data(), row.floats.size()) == 0));
  }
}

TEST_CASE("format: every truncation, lengthening and flipped bit of a row is CorruptionError that names the key") {
  const std::string good = stored_row();
  const auto refused = [](std::string_view bytes) {
    const std::vector<std::byte> copy = copy_of(bytes);
    CHECK_THROWS_WITH_AS(decode_row(kKey, copy, 3), doctest::Contains("key 1 of table 16909060"), CorruptionError);
  };
  for (size_t size = 0; size < good.size(); ++size) refused(std::string_view(good).substr(0, size));
  refused(good + '\0');
  refused(good + std::string(4, '\0'));
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ 1 << bit % 8);
    refused(bad);
  }
}

TEST_CASE("format: a row found under another key, or read with another number of floats, is CorruptionError") {
  const std::string good = stored_row();
  CHECK_THROWS_AS(decode_row(StoredKey::make(0x01020304, mix_key(2)), bytes_of(good), 3), CorruptionError);
  CHECK_THROWS_AS(decode_row(StoredKey::make(0x01020305, mix_key(1)), bytes_of(good), 3), CorruptionError);
  for (const size_t wrong : {0, 1, 2, 4, 1000})
    CHECK_THROWS_AS(decode_row(kKey, bytes_of(good), wrong), CorruptionError);
  CHECK_NOTHROW(decode_row(kKey, bytes_of(good), 3));
}

TEST_CASE("format: a whole row of a newer format, or with flags of one, is refused in words") {
  const auto sealed = [](size_t at, uint8_t value) {
    std::string row = stored_row();
    row[at] = static_cast<char>(value);
    std::fill_n(row.begin() + 4, 4, '\0');
    const std::string keyed = std::string(reinterpret_cast<const char*>(kKey.bytes.data()), 12) + row;
    const auto checksum = static_cast<uint32_t>(checksum64(bytes_of(keyed)));
    std::memcpy(row.data() + 4, &checksum, 4);
    return row;
  };
  CHECK_NOTHROW(decode_row(kKey, bytes_of(sealed(0, 1)), 3));  // the helper makes good rows
  CHECK_THROWS_WITH_AS(decode_row(kKey, bytes_of(sealed(0, 2)), 3), doctest::Contains("row format 2"), CorruptionError);
  CHECK_THROWS_WITH_AS(decode_row(kKey, bytes_of(sealed(0, 2)), 3), doctest::Contains("upgrade damo-embedding"),
                       CorruptionError);
  for (int bit = 1; bit < 8; ++bit)
    CHECK_THROWS_WITH_AS(decode_row(kKey, bytes_of(sealed(1, static_cast<uint8_t>(1 | 1 << bit))), 3),
                         doctest::Contains("newer version"), CorruptionError);
}

// ----------------------------------------------------------------- numbers

TEST_CASE("format: the reader names its source and the offset in the file, and takes nothing beyond the end") {
  std::string text;
  ByteWriter writer(text);
  writer.put(uint32_t{5});
  writer.put_string("abc");
  ByteReader reader(bytes_of(text), "some/file", 100);
  CHECK(reader.get<uint32_t>() == 5);
  CHECK(reader.offset() == 104);
  CHECK_THROWS_WITH_AS(reader.expect_end(), doctest::Contains("7 bytes too many"), CorruptionError);
  CHECK(reader.get_string(3) == "abc");
  CHECK_NOTHROW(reader.expect_end());
  CHECK_THROWS_WITH_AS(reader.get<uint8_t>(), doctest::Contains("some/file is damaged at offset 111"), CorruptionError);
  ByteReader limited(bytes_of(text), "file");
  limited.get<uint32_t>();
  CHECK_THROWS_AS(limited.get_string(2), CorruptionError);
}

// ------------------------------------------------------- log record bodies

using Decode = std::function<void(ByteReader&)>;

void decode_from(std::string_view body, const Decode& decode) {
  const std::vector<std::byte> copy = copy_of(body);
  ByteReader reader(copy, "log");
  decode(reader);
}

void every_other_length_is_refused(const std::string& good, const Decode& decode) {
  CHECK_NOTHROW(decode_from(good, decode));
  for (size_t size = 0; size < good.size(); ++size)
    CHECK_THROWS_AS(decode_from(std::string_view(good).substr(0, size), decode), CorruptionError);
  CHECK_THROWS_AS(decode_from(good + '\0', decode), CorruptionError);
}

// Numbers nobody meant: the checksum is the log's, so these bytes may be anything. Whatever comes out, no memory beyond
// the body's own size is taken (the sanitizer refuses huge allocations) and no other error than CorruptionError.
void wild_numbers_do_no_harm(const std::string& good, const Decode& decode) {
  for (size_t at = 0; at + 8 <= good.size(); at += 4) {
    for (const uint64_t wild :
         {uint64_t{0}, uint64_t{1}, uint64_t{0x7fffffff}, uint64_t{0xffffffff}, uint64_t{1} << 32, uint64_t{1} << 61,
          uint64_t{1} << 62, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} >> 2}) {
      for (const size_t size : {size_t{4}, size_t{8}}) {
        std::string bad = good;
        std::memcpy(bad.data() + at, &wild, size);
        try {
          decode_from(bad, decode);
        } catch (const CorruptionError&) {
        }
      }
    }
  }
}

const std::vector<uint64_t> kKeys{5, 0, ~uint64_t{0}};

std::string apply_body(uint32_t dimension, const std::vector<float>& gradients) {
  ApplyRecord record;
  record.table_id = 9;
  record.optimizer_id = 2;
  record.kernel_version = 1;
  record.dimension = dimension;
  record.group_step = uint64_t{1} << 40;
  record.time = -5;
  record.numbers.count = 2;
  record.numbers.value = {0.5, -1e300};
  record.ages = {AgeUnit::kSteps, -9, {{-4, -1}, {6, 3}}};
  record.keys = kKeys;
  std::string body = encode_apply_prefix(record);
  ByteWriter writer(body);
  writer.put_bytes(kKeys.data(), kKeys.size() * 8);
  writer.put_bytes(gradients.data(), gradients.size() * 4);
  return body;
}

const Decode kDecodeApply = [](ByteReader& reader) {
  std::vector<uint64_t> storage;
  decode_apply(reader, storage);
};

TEST_CASE("format: an apply record comes back whole, from an aligned body and from any other") {
  const std::vector<float> gradients{1, 2, 3, 4, 5, 6};
  const std::string body = apply_body(2, gradients);
  CHECK(body.size() == 56 + 16 + 8 + 32 + 24 + 24);
  for (size_t shift = 0; shift < 8; ++shift) {
    std::vector<std::byte> memory(body.size() + 16);
    std::byte* at = memory.data() + (8 - reinterpret_cast<uintptr_t>(memory.data()) % 8) % 8 + shift;
    std::memcpy(at, body.data(), body.size());
    ByteReader reader({at, body.size()}, "log");
    std::vector<uint64_t> storage;
    const ApplyRecord record = decode_apply(reader, storage);
    CHECK(record.table_id == 9);
    CHECK(record.optimizer_id == 2);
    CHECK(record.kernel_version == 1);
    CHECK(record.dimension == 2);
    CHECK(record.group_step == uint64_t{1} << 40);
    CHECK(record.time == -5);
    REQUIRE(record.numbers.count == 2);
    CHECK(record.numbers.value[0] == 0.5);
    CHECK(record.numbers.value[1] == -1e300);
    CHECK(record.ages.unit == AgeUnit::kSteps);
    CHECK(record.ages.alive_since == -9);
    CHECK(record.ages.changes == AgeChanges{{-4, -1}, {6, 3}});
    CHECK(std::equal(record.keys.begin(), record.keys.end(), kKeys.begin(), kKeys.end()));
    CHECK(storage.empty() == (shift == 0));
    REQUIRE(record.gradients.size() == 24);
    CHECK(std::memcmp(record.gradients.data(), gradients.data(), 24) == 0);
  }
}

TEST_CASE("format: an apply record of another length, or with counts that do not fit, is CorruptionError") {
  const std::string body = apply_body(2, {1, 2, 3, 4, 5, 6});
  every_other_length_is_refused(body, kDecodeApply);
  wild_numbers_do_no_harm(body, kDecodeApply);
  const auto with = [&](size_t at, auto value) {
    std::string bad = body;
    std::memcpy(bad.data() + at, &value, sizeof value);
    return bad;
  };
  CHECK_THROWS_AS(decode_from(with(12, uint32_t{0}), kDecodeApply), CorruptionError);        // no dimension
  CHECK_THROWS_AS(decode_from(with(12, uint32_t{3}), kDecodeApply), CorruptionError);        // too large a dimension
  CHECK_THROWS_AS(decode_from(with(40, uint64_t{1} << 61), kDecodeApply), CorruptionError);  // keys: times 8 is 0
  CHECK_THROWS_AS(decode_from(with(48, uint32_t{StepNumbers::kMax + 1}), kDecodeApply), CorruptionError);
  CHECK_THROWS_AS(decode_from(with(52, uint32_t{3}), kDecodeApply), CorruptionError);        // no such unit of age
  CHECK_THROWS_AS(decode_from(with(72, uint64_t{1} << 60), kDecodeApply), CorruptionError);  // changes: times 16 is 0
}

TEST_CASE("format: a record of no dimension is CorruptionError, not a division by zero") {
  CHECK_THROWS_AS(decode_from(apply_body(0, {}), kDecodeApply), CorruptionError);
}

TEST_CASE("format: a record of keys comes back whole; other lengths and counts are CorruptionError") {
  const AgeEffect ages{AgeUnit::kSeconds, 12, {{17, 2}}};
  std::string body = encode_keys_prefix({.table_id = 3, .time = 17, .ages = ages, .keys = kKeys});
  ByteWriter(body).put_bytes(kKeys.data(), kKeys.size() * 8);
  const Decode decode = [](ByteReader& reader) {
    std::vector<uint64_t> storage;
    decode_keys(reader, storage);
  };
  ByteReader reader(bytes_of(body), "log");
  std::vector<uint64_t> storage;
  const KeysRecord record = decode_keys(reader, storage);
  CHECK(record.table_id == 3);
  CHECK(record.time == 17);
  CHECK(record.ages.unit == AgeUnit::kSeconds);
  CHECK(record.ages.alive_since == 12);
  CHECK(record.ages.changes == AgeChanges{{17, 2}});
  CHECK(std::equal(record.keys.begin(), record.keys.end(), kKeys.begin(), kKeys.end()));
  every_other_length_is_refused(body, decode);
  wild_numbers_do_no_harm(body, decode);
}

TEST_CASE("format: a record of imported rows comes back whole; other lengths and counts are CorruptionError") {
  const std::vector<uint32_t> counts{1, 2, 3};
  const std::vector<float> floats{1, 2, 3, 4, 5, 6};
  const AgeEffect ages{AgeUnit::kNone, kBeforeAllTime, {{0, 3}}};
  std::string body = encode_import_prefix(
      {.table_id = 3, .num_floats = 2, .time = 17, .ages = ages, .keys = kKeys, .update_counts = {}, .floats = {}});
  ByteWriter writer(body);
  writer.put_bytes(kKeys.data(), kKeys.size() * 8);
  writer.put_bytes(counts.data(), counts.size() * 4);
  writer.put_bytes(floats.data(), floats.size() * 4);
  const Decode decode = [](ByteReader& reader) {
    std::vector<uint64_t> storage;
    decode_import(reader, storage);
  };
  ByteReader reader(bytes_of(body), "log");
  std::vector<uint64_t> storage;
  const ImportRecord record = decode_import(reader, storage);
  CHECK(record.table_id == 3);
  CHECK(record.num_floats == 2);
  CHECK(record.time == 17);
  CHECK(record.ages.changes == AgeChanges{{0, 3}});
  CHECK(std::equal(record.keys.begin(), record.keys.end(), kKeys.begin(), kKeys.end()));
  CHECK(std::memcmp(record.update_counts.data(), counts.data(), 12) == 0);
  CHECK(std::memcmp(record.floats.data(), floats.data(), 24) == 0);
  every_other_length_is_refused(body, decode);
  wild_numbers_do_no_harm(body, decode);
}

TEST_CASE("format: a record of the clock comes back whole; other lengths are CorruptionError") {
  const std::string body = encode_expire({.time = -7});
  const Decode decode = [](ByteReader& reader) { decode_expire(reader); };
  ByteReader reader(bytes_of(body), "log");
  CHECK(decode_expire(reader).time == -7);
  every_other_length_is_refused(body, decode);
}

TEST_CASE("format: a commit record comes back whole; other lengths are CorruptionError") {
  const std::string body = encode_commit({.step = -7, .extra = std::string("a\0b", 3)});
  const Decode decode = [](ByteReader& reader) { decode_commit(reader); };
  ByteReader reader(bytes_of(body), "log");
  const CommitRecord record = decode_commit(reader);
  CHECK(record.step == -7);
  CHECK(record.extra == std::string("a\0b", 3));
  every_other_length_is_refused(body, decode);
  wild_numbers_do_no_harm(body, decode);
}

TEST_CASE("format: counters come back whole, with and without a commit; damage is CorruptionError") {
  TableCounters one{.table_id = 1, .group_step = 100, .lifetime = {}, .rows = {}};
  one.rows.add(0, 10);
  TableCounters seven{.table_id = 7, .group_step = 700, .lifetime = {AgeUnit::kSeconds, 60}, .rows = {}};
  seven.rows.add(-8, 60);
  seven.rows.add(9, 10);
  StorageCounters counters{.sequence = 12, .clock = -3, .last_commit = {}, .tables = {one, seven}};
  const Decode decode = [](ByteReader& reader) { decode_counters(reader.take(reader.remaining()), "state"); };
  for (const bool committed : {false, true}) {
    if (committed) counters.last_commit = CommitRecord{4, "extra"};
    const std::string body = encode_counters(counters);
    const StorageCounters back = decode_counters(bytes_of(body), "state");
    CHECK(back.sequence == 12);
    CHECK(back.clock == -3);
    REQUIRE(back.last_commit.has_value() == committed);
    if (committed) CHECK(back.last_commit->extra == "extra");
    REQUIRE(back.tables.size() == 2);
    CHECK(back.tables[1].table_id == 7);
    CHECK(back.tables[0].rows.since(0) == 10);
    CHECK(back.tables[1].lifetime == Lifetime{AgeUnit::kSeconds, 60});
    CHECK(back.tables[1].rows.buckets() == seven.rows.buckets());
    CHECK(back.tables[1].group_step == 700);
    every_other_length_is_refused(body, decode);
    wild_numbers_do_no_harm(body, decode);
  }
  std::string newer = encode_counters(counters);
  newer[0] = 2;
  CHECK_THROWS_WITH_AS(decode_counters(bytes_of(newer), "state"), doctest::Contains("format 2"), CorruptionError);
}

}  // namespace
}  // namespace damo
