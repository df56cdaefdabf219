// SPDX-License-Identifier: Apache-2.0
#include "manifest.h"

#include <doctest/doctest.h>

#include <functional>
#include <string>
#include <vector>

#include "error.h"

namespace damo {
namespace {

Bytes bytes_of(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

std::array<std::byte, 16> some_id() {
  std::array<std::byte, 16> id;
  for (size_t i = 0; i < id.size(); ++i) id[i] = static_cast<std::byte>(0xa0 + i);
  return id;
}

Manifest some_manifest() {
  Manifest manifest;
  manifest.storage_id = some_id();
  manifest.next_table_id = 8;
  manifest.lifetime = {AgeUnit::kSeconds, 86'400};
  TableSpec user;
  user.group = 0;
  user.table_id = 7;
  user.dimension = 16;
  user.optimizer = "adam";
  user.optimizer_settings = {{"beta1", 0.9}, {"lr", 1e-3}};
  user.state = {{"exp_avg", true, 0.0f}, {"exp_avg_sq", true, 0.5f}};
  user.initializer = "uniform";
  user.initializer_settings = {{"high", 0.01}, {"low", -0.01}};
  user.seed = 1234567890123456789;
  user.stream = ~uint64_t{0};
  user.lifetime = {AgeUnit::kSteps, 1000};
  user.own_lifetime = true;
  TableSpec named = user;
  named.group = 255;
  named.table_id = 3;
  named.name = "item, \"quoted\" \xc3\xa9";
  named.dimension = kMaxDimension;
  named.optimizer = "sgd";
  named.optimizer_settings = {};
  named.state = {};
  named.lifetime = manifest.lifetime;
  named.own_lifetime = false;
  named.initializer_settings = {};
  manifest.tables = {user, named};
  return manifest;
}

CheckpointManifest some_checkpoint() {
  CheckpointManifest manifest;
  manifest.storage_id = some_id();
  TableCounters seven{.table_id = 7, .group_step = 20, .lifetime = {}, .rows = {}};
  seven.rows.add(0, 10);
  manifest.counters = {.sequence = 99, .clock = 1700000000, .last_commit = CommitRecord{5, "x"}, .tables = {seven}};
  manifest.step = 1000;
  manifest.extra = std::string("\0json", 5);
  manifest.created = 1700000001;
  manifest.files = {{"rocksdb/000012.sst", uint64_t{1} << 40, 0xdeadbeef}, {"MANIFEST", 321, 7}};
  return manifest;
}

bool same(const TableSpec& a, const TableSpec& b) {
  return a.group == b.group && a.name == b.name && a.table_id == b.table_id && a.dimension == b.dimension &&
         a.optimizer == b.optimizer && a.optimizer_settings == b.optimizer_settings && a.state == b.state &&
         a.initializer == b.initializer && a.initializer_settings == b.initializer_settings && a.seed == b.seed &&
         a.stream == b.stream && a.lifetime == b.lifetime && a.own_lifetime == b.own_lifetime;
}

// `text` with another body and a checksum that agrees with it.
std::string sealed_again(std::string text, const std::function<void(std::string&)>& change) {
  text.resize(text.size() - 8);
  change(text);
  ByteWriter writer(text);
  writer.put(checksum64(bytes_of(text)));
  return text;
}

template <class Decode>
void damage_is_refused(const std::string& good, Decode&& decode) {
  CHECK_NOTHROW(decode(good));
  for (size_t size = 0; size < good.size(); ++size)
    CHECK_THROWS_WITH_AS(decode(good.substr(0, size)), doctest::Contains("the/file"), CorruptionError);
  CHECK_THROWS_AS(decode(good + '\0'), CorruptionError);
  for (size_t at = 0; at < good.size(); ++at) {
    for (const int flip : {0x01, 0x80, 0xff}) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ flip);
      CHECK_THROWS_WITH_AS(decode(bad), doctest::Contains("offset"), CorruptionError);
    }
  }
  // Not the checksum alone guards the counts: every number replaced, under a checksum that agrees.
  for (size_t at = 12; at + 4 <= good.size() - 8; ++at) {
    for (const uint32_t wild : {0u, 0x7fffffffu, 0xffffffffu}) {
      try {
        decode(sealed_again(good, [&](std::string& text) { std::memcpy(text.data() + at, &wild, 4); }));
      } catch (const CorruptionError&) {
      }
    }
  }
  const std::string newer = sealed_again(good, [](std::string& text) { text[8] = 9; });
  CHECK_THROWS_WITH_AS(decode(newer), doctest::Contains("format 9"), CorruptionError);
  CHECK_THROWS_WITH_AS(decode(newer), doctest::Contains("upgrade"), CorruptionError);
  CHECK_THROWS_AS(decode(sealed_again(good, [](std::string& text) { text += "more"; })), CorruptionError);
}

const auto kManifest = [](const std::string& text) { return decode_manifest(bytes_of(text), "the/file"); };
const auto kCheckpoint = [](const std::string& text) { return decode_checkpoint(bytes_of(text), "the/file"); };

TEST_CASE("manifest: comes back as it was written") {
  const Manifest manifest = some_manifest();
  const Manifest back = kManifest(encode_manifest(manifest));
  CHECK(back.storage_id == manifest.storage_id);
  CHECK(back.next_table_id == 8);
  REQUIRE(back.tables.size() == 2);
  CHECK(same(back.tables[0], manifest.tables[0]));
  CHECK(same(back.tables[1], manifest.tables[1]));
  CHECK(kManifest(encode_manifest({})).tables.empty());
}

TEST_CASE("manifest: every truncation and flipped byte is CorruptionError; a newer version is named") {
  damage_is_refused(encode_manifest(some_manifest()), kManifest);
}

TEST_CASE("manifest: with filters it is of version 2, without of version 1, and both are read") {
  Manifest manifest = some_manifest();
  CHECK(encode_manifest(manifest)[8] == 1);
  manifest.tables[1].admission = AdmissionSpec{{1000, 3, 1e-3, 77}, 42};
  manifest.cut = 50;
  const std::string text = encode_manifest(manifest);
  CHECK(text[8] == 2);
  damage_is_refused(text, kManifest);
  const Manifest back = kManifest(text);
  CHECK(back.cut == 50);
  CHECK_FALSE(back.tables[0].admission);
  REQUIRE(back.tables[1].admission);
  CHECK(back.tables[1].admission->filter == FilterSettings{1000, 3, 1e-3, 77});
  CHECK(back.tables[1].admission->saved == 42);
  CHECK(same(back.tables[1], manifest.tables[1]));
  manifest.tables[1].admission.reset();
  CHECK(kManifest(encode_manifest(manifest)).cut == 50);  // the filter is gone, what was cut stays cut
  for (const FilterSettings& bad :
       {FilterSettings{0, 3, 1e-3, 0}, FilterSettings{9, 16, 1e-3, 0}, FilterSettings{9, 3, 0.7, 0}}) {
    manifest.tables[1].admission = AdmissionSpec{bad, 0};
    CHECK_THROWS_AS(kManifest(encode_manifest(manifest)), CorruptionError);
  }
}

TEST_CASE("manifest: settings of a group out of range, and two groups of one number, are CorruptionError") {
  const auto refused = [](const std::function<void(Manifest&)>& change) {
    Manifest manifest = some_manifest();
    change(manifest);
    CHECK_THROWS_AS(kManifest(encode_manifest(manifest)), CorruptionError);
  };
  refused([](Manifest& m) { m.tables[0].group = 256; });
  refused([](Manifest& m) { m.tables[0].dimension = 0; });
  refused([](Manifest& m) { m.tables[0].dimension = kMaxDimension + 1; });
  refused([](Manifest& m) { m.tables[0].table_id = m.next_table_id; });
  refused([](Manifest& m) { m.tables[1].name = std::string(kMaxGroupName + 1, 'x'); });
  refused([](Manifest& m) { m.tables[1].group = m.tables[0].group; });
  refused([](Manifest& m) { m.tables[1].table_id = m.tables[0].table_id; });
}

TEST_CASE("manifest: ids of storages differ") { CHECK(make_storage_id() != make_storage_id()); }

TEST_CASE("checkpoint manifest: comes back as it was written") {
  const CheckpointManifest manifest = some_checkpoint();
  const CheckpointManifest back = kCheckpoint(encode_checkpoint(manifest));
  CHECK(back.storage_id == manifest.storage_id);
  CHECK(back.counters.sequence == 99);
  CHECK(back.counters.clock == 1700000000);
  REQUIRE(back.counters.last_commit);
  CHECK(back.counters.last_commit->extra == "x");
  REQUIRE(back.counters.tables.size() == 1);
  CHECK(back.counters.tables[0].group_step == 20);
  CHECK(back.step == 1000);
  CHECK(back.extra == manifest.extra);
  CHECK(back.created == 1700000001);
  REQUIRE(back.files.size() == 2);
  CHECK(back.files[0].name == "rocksdb/000012.sst");
  CHECK(back.files[0].bytes == uint64_t{1} << 40);
  CHECK(back.files[0].crc32c == 0xdeadbeef);
}

TEST_CASE("checkpoint manifest: every truncation and flipped byte is CorruptionError; a newer version is named") {
  damage_is_refused(encode_checkpoint(some_checkpoint()), kCheckpoint);
}

TEST_CASE("checkpoint manifest: a file name that leads outside the checkpoint is refused") {
  for (const std::string name : {"", "/etc/passwd", "..", "../x", "rocksdb/../../x", "rocksdb/..", "a/../b"}) {
    CheckpointManifest manifest = some_checkpoint();
    manifest.files[1].name = name;
    CAPTURE(name);
    CHECK_THROWS_WITH_AS(kCheckpoint(encode_checkpoint(manifest)), doctest::Contains("not allowed"), CorruptionError);
  }
  for (const std::string name : {"..x", "x..", "rocksdb/a..b", "...", "a/.../b"}) {
    CheckpointManifest manifest = some_checkpoint();
    manifest.files[1].name = name;
    CHECK_NOTHROW(kCheckpoint(encode_checkpoint(manifest)));
  }
}

TEST_CASE("manifest and checkpoint manifest are not taken for each other") {
  CHECK_THROWS_AS(kManifest(encode_checkpoint(some_checkpoint())), CorruptionError);
  CHECK_THROWS_AS(kCheckpoint(encode_manifest(some_manifest())), CorruptionError);
}

}  // namespace
}  // namespace damo
