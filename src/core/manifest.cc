// SPDX-License-Identifier: Apache-2.0
#include "manifest.h"

#include <sys/random.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "error.h"

namespace damo {
namespace {

constexpr std::string_view kManifestMagic = "DAMOMANI";
constexpr std::string_view kCheckpointMagic = "DAMOCKPT";
constexpr uint32_t kManifestVersion = 1;
constexpr uint32_t kFilterVersion = 2;  // of a manifest that tells of filters
constexpr size_t kMaxText = size_t{1} << 20;

void put_settings(ByteWriter& writer, const Settings& settings) {
  writer.put(static_cast<uint32_t>(settings.size()));
  for (const auto& [name, value] : settings) {
    writer.put_string(name);
    writer.put(value);
  }
}

Settings get_settings(ByteReader& reader) {
  Settings settings;
  const auto count = reader.get<uint32_t>();
  if (count > 64) reader.corrupt(std::to_string(count) + " settings");
  for (uint32_t i = 0; i < count; ++i) {
    std::string name = reader.get_string(kMaxText);
    settings[std::move(name)] = reader.get<double>();
  }
  return settings;
}

// magic, version, then the body, then the checksum of all before it.
std::string seal(std::string_view magic, const std::string& body, uint32_t version = kManifestVersion) {
  std::string out(magic);
  ByteWriter writer(out);
  writer.put(version);
  writer.put_bytes(body.data(), body.size());
  writer.put(checksum64(std::as_bytes(std::span(out))));
  return out;
}

void put_lifetime(ByteWriter& writer, const Lifetime& lifetime) {
  writer.put(lifetime.unit);
  writer.put(lifetime.ttl);
}

Lifetime get_lifetime(ByteReader& reader) {
  const auto unit = reader.get<uint32_t>();
  const auto ttl = reader.get<uint64_t>();
  if (unit > static_cast<uint32_t>(AgeUnit::kSteps) || ttl > kMaxTtl || (unit == 0) != (ttl == 0))
    reader.corrupt("a ttl of " + std::to_string(ttl) + " in unit " + std::to_string(unit));
  return {static_cast<AgeUnit>(unit), ttl};
}

// The body; `version`: the highest that is known, then the one that it has.
ByteReader unseal(std::string_view magic, Bytes bytes, const std::string& source, uint32_t& version) {
  ByteReader reader(bytes, source);
  if (bytes.size() < magic.size() + 12) reader.corrupt(std::to_string(bytes.size()) + " bytes are too few");
  if (std::memcmp(reader.take(magic.size()).data(), magic.data(), magic.size()) != 0)
    reader.corrupt("it does not start as a file of ours does");
  const auto known = std::exchange(version, reader.get<uint32_t>());
  uint64_t checksum = 0;
  std::memcpy(&checksum, bytes.data() + bytes.size() - 8, 8);
  if (checksum != checksum64(bytes.first(bytes.size() - 8))) reader.corrupt("its checksum does not agree");
  if (version == 0 || version > known)
    throw NewerVersionError("[open] " + source + " has format " + std::to_string(version) +
                            ", written by a newer version; this one reads up to " + std::to_string(known) +
                            ": upgrade damo-embedding");
  return {bytes.subspan(magic.size() + 4, bytes.size() - magic.size() - 12), source, magic.size() + 4};
}

void get_id(ByteReader& reader, std::array<std::byte, 16>& id) { std::memcpy(id.data(), reader.take(16).data(), 16); }

}  // namespace

std::string encode_manifest(const Manifest& manifest) {
  // Without filters as ever: versions that know none of them read it.
  const bool filters = manifest.cut != 0 || std::any_of(manifest.tables.begin(), manifest.tables.end(),
                                                        [](const auto& table) { return table.admission.has_value(); });
  std::string body;
  ByteWriter writer(body);
  writer.put_bytes(manifest.storage_id.data(), 16);
  writer.put(manifest.next_table_id);
  put_lifetime(writer, manifest.lifetime);
  writer.put(static_cast<uint32_t>(manifest.tables.size()));
  for (const TableSpec& table : manifest.tables) {
    writer.put(table.group);
    writer.put(table.table_id);
    writer.put_string(table.name);
    writer.put(table.dimension);
    writer.put_string(table.optimizer);
    put_settings(writer, table.optimizer_settings);
    writer.put(static_cast<uint32_t>(table.state.size()));
    for (const StateEntry& entry : table.state) {
      writer.put_string(entry.name);
      writer.put(static_cast<uint8_t>(entry.per_weight));
      writer.put(entry.initial);
    }
    writer.put_string(table.initializer);
    put_settings(writer, table.initializer_settings);
    writer.put(table.seed);
    writer.put(table.stream);
    put_lifetime(writer, table.lifetime);
    writer.put(static_cast<uint8_t>(table.own_lifetime));
    if (!filters) continue;
    writer.put(static_cast<uint8_t>(table.admission.has_value()));
    if (!table.admission) continue;
    writer.put(table.admission->filter.capacity);
    writer.put(table.admission->filter.count);
    writer.put(table.admission->filter.fpr);
    writer.put(table.admission->filter.halve_every);
    writer.put(table.admission->saved);
  }
  if (filters) writer.put(manifest.cut);
  return seal(kManifestMagic, body, filters ? kFilterVersion : kManifestVersion);
}

Manifest decode_manifest(Bytes bytes, const std::string& source) {
  uint32_t version = kFilterVersion;
  ByteReader reader = unseal(kManifestMagic, bytes, source, version);
  Manifest manifest;
  get_id(reader, manifest.storage_id);
  manifest.next_table_id = reader.get<uint32_t>();
  manifest.lifetime = get_lifetime(reader);
  const auto num_tables = reader.get<uint32_t>();
  if (num_tables > kNumGroups) reader.corrupt(std::to_string(num_tables) + " groups");
  for (uint32_t i = 0; i < num_tables; ++i) {
    TableSpec table;
    table.group = reader.get<uint32_t>();
    table.table_id = reader.get<uint32_t>();
    table.name = reader.get_string(kMaxGroupName);
    table.dimension = reader.get<uint32_t>();
    table.optimizer = reader.get_string(kMaxText);
    table.optimizer_settings = get_settings(reader);
    const auto num_entries = reader.get<uint32_t>();
    if (num_entries > 16) reader.corrupt(std::to_string(num_entries) + " state entries");
    for (uint32_t e = 0; e < num_entries; ++e) {
      StateEntry entry;
      entry.name = reader.get_string(kMaxText);
      entry.per_weight = reader.get<uint8_t>() != 0;
      entry.initial = reader.get<float>();
      table.state.push_back(std::move(entry));
    }
    table.initializer = reader.get_string(kMaxText);
    table.initializer_settings = get_settings(reader);
    table.seed = reader.get<uint64_t>();
    table.stream = reader.get<uint64_t>();
    table.lifetime = get_lifetime(reader);
    table.own_lifetime = reader.get<uint8_t>() != 0;
    if (version == kFilterVersion && reader.get<uint8_t>() != 0) {
      AdmissionSpec admission;
      admission.filter.capacity = reader.get<uint64_t>();
      admission.filter.count = reader.get<uint32_t>();
      admission.filter.fpr = reader.get<double>();
      admission.filter.halve_every = reader.get<uint64_t>();
      admission.saved = reader.get<uint64_t>();
      try {
        CountingBloomFilter::check(admission.filter);
      } catch (const std::invalid_argument& wrong) {
        reader.corrupt("the filter of group " + std::to_string(table.group) + ": " + wrong.what());
      }
      table.admission = admission;
    }
    if (table.group >= kNumGroups || table.dimension < 1 || table.dimension > kMaxDimension ||
        table.table_id >= manifest.next_table_id)
      reader.corrupt("the settings of group " + std::to_string(table.group) + " are out of range");
    for (const TableSpec& other : manifest.tables)
      if (other.group == table.group || other.table_id == table.table_id)
        reader.corrupt("group " + std::to_string(table.group) + " or its table id is there twice");
    manifest.tables.push_back(std::move(table));
  }
  if (version == kFilterVersion) manifest.cut = reader.get<uint64_t>();
  reader.expect_end();
  return manifest;
}

void check_settings_are_known(const Manifest& manifest, const std::string& source) {
  for (const TableSpec& table : manifest.tables) {
    try {
      const TableShape known(table);
    } catch (const std::invalid_argument& unknown) {
      throw NewerVersionError("[open] " + source + ": " + table.label() +
                              " has settings that this version does not know (" + unknown.what() +
                              "): upgrade damo-embedding");
    }
  }
}

std::array<std::byte, 16> make_storage_id() {
  std::array<std::byte, 16> id;
  if (getrandom(id.data(), id.size(), 0) != static_cast<ssize_t>(id.size()))
    throw StorageError("[create] the system gave no random bytes for the storage's id");
  return id;
}

std::array<std::byte, 16> make_restored_id(const std::array<std::byte, 16>& checkpoint) {
  std::array<std::byte, 16> id = make_storage_id();
  std::memcpy(id.data(), checkpoint.data(), id.size() / 2);
  return id;
}

bool is_same_lineage(const std::array<std::byte, 16>& one, const std::array<std::byte, 16>& other) noexcept {
  return std::memcmp(one.data(), other.data(), one.size() / 2) == 0;
}

StorageCounters restored_counters(const CheckpointManifest& manifest) {
  StorageCounters counters = manifest.counters;
  if (manifest.step >= 0 || !manifest.extra.empty()) counters.last_commit = CommitRecord{manifest.step, manifest.extra};
  return counters;
}

std::string encode_checkpoint(const CheckpointManifest& manifest) {
  std::string body;
  ByteWriter writer(body);
  writer.put_bytes(manifest.storage_id.data(), 16);
  writer.put(manifest.step);
  writer.put(manifest.created);
  writer.put_string(manifest.extra);
  writer.put_string(encode_counters(manifest.counters));
  writer.put(static_cast<uint32_t>(manifest.files.size()));
  for (const CheckpointFile& file : manifest.files) {
    writer.put_string(file.name);
    writer.put(file.bytes);
    writer.put(file.crc32c);
  }
  return seal(kCheckpointMagic, body);
}

CheckpointManifest decode_checkpoint(Bytes bytes, const std::string& source) {
  uint32_t version = kManifestVersion;
  ByteReader reader = unseal(kCheckpointMagic, bytes, source, version);
  CheckpointManifest manifest;
  get_id(reader, manifest.storage_id);
  manifest.step = reader.get<int64_t>();
  manifest.created = reader.get<int64_t>();
  manifest.extra = reader.get_string(reader.remaining());
  const std::string counters = reader.get_string(reader.remaining());
  manifest.counters = decode_counters(std::as_bytes(std::span(counters)), source);
  const auto num_files = reader.get<uint32_t>();
  for (uint32_t i = 0; i < num_files; ++i) {
    CheckpointFile file;
    file.name = reader.get_string(4096);
    // A name leads nowhere outside the checkpoint, whoever wrote it.
    if (file.name.empty() || file.name.front() == '/' || ("/" + file.name + "/").find("/../") != std::string::npos)
      reader.corrupt("the file name \"" + file.name + "\" is not allowed");
    file.bytes = reader.get<uint64_t>();
    file.crc32c = reader.get<uint32_t>();
    manifest.files.push_back(std::move(file));
  }
  reader.expect_end();
  return manifest;
}

}  // namespace damo
