// SPDX-License-Identifier: Apache-2.0
#include "filter_format.h"

#include <algorithm>
#include <span>
#include <vector>

#include "error.h"
#include "format.h"
#include "log_segment.h"
#include "settings.h"

namespace damo {
namespace {

constexpr uint32_t kFilterFileVersion = 1;
constexpr size_t kFieldBytes = 64;  // of the head, before its checksum
constexpr size_t kMarkBytes = 32;   // with its checksum

bool all_zero(Bytes bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) { return byte == std::byte{0}; });
}

}  // namespace

std::string encode_filter_mark(const FilterMark& mark, uint64_t seed) {
  std::string bytes;
  ByteWriter writer(bytes);
  writer.put(mark.end);
  writer.put(mark.synced);
  writer.put(mark.boot);
  writer.put(checksum64(std::as_bytes(std::span(bytes)), seed));
  return bytes;
}

std::string encode_filter_head(const CountingBloomFilter& filter, uint64_t adds, const FilterMark& mark,
                               uint64_t seed) {
  std::string bytes(kFilterMagic);
  ByteWriter writer(bytes);
  writer.put(kFilterFileVersion);
  writer.put(uint32_t{0});
  writer.put(filter.settings().capacity);
  writer.put(filter.settings().count);
  writer.put(filter.layout().counters_per_line);
  writer.put(filter.settings().fpr);
  writer.put(filter.settings().halve_every);
  writer.put(filter.layout().pages);
  writer.put(adds);
  writer.put(checksum64(std::as_bytes(std::span(bytes)), seed));
  bytes.resize(kFilterMarkOffset);
  bytes += encode_filter_mark(mark, seed);
  bytes.resize(kFilterHeadBytes);
  return bytes;
}

FilterHead read_filter_head(const FileDescriptor& file, uint64_t seed) {
  const std::filesystem::path& path = file.path();
  std::vector<std::byte> bytes(kFilterHeadBytes);
  const size_t got = file.read_at(bytes, 0);
  if (got < kFilterMagic.size()) throw_damaged(path, got, "it is too short for a counting Bloom filter");
  ByteReader fields(bytes, path.string());
  const Bytes magic = fields.take(kFilterMagic.size());
  if (!std::equal(magic.begin(), magic.end(), std::as_bytes(std::span(kFilterMagic)).begin()))
    throw_damaged(path, 0, "it is not a counting Bloom filter");
  if (got < kFilterHeadBytes)
    throw_damaged(path, got, "the file ends inside its head, which has " + std::to_string(kFilterHeadBytes) + " bytes");
  // Before the checksum, for a newer version may have another one: so a flipped bit comes here, too.
  const auto version = fields.get<uint32_t>();
  if (version > kFilterFileVersion)
    throw CorruptionError("[open] " + path.string() + " has filter format " + std::to_string(version) +
                          " at offset 8, this version reads up to " + std::to_string(kFilterFileVersion) +
                          ": it was written by a newer version, then upgrade damo-embedding, or it is damaged");
  if (version == 0) throw_damaged(path, kFilterMagic.size(), "filter format 0");
  fields.take(4);  // reserved, under the checksum
  FilterHead head;
  head.settings.capacity = fields.get<uint64_t>();
  head.settings.count = fields.get<uint32_t>();
  head.layout.counters_per_line = fields.get<uint32_t>();
  head.settings.fpr = fields.get<double>();
  head.settings.halve_every = fields.get<uint64_t>();
  head.layout.pages = fields.get<uint64_t>();
  head.adds = fields.get<uint64_t>();
  if (fields.get<uint64_t>() != checksum64(Bytes(bytes).first(kFieldBytes), seed))
    throw_damaged(path, kFieldBytes, "the head's checksum does not match");
  const size_t mark_end = kFilterMarkOffset + kMarkBytes;
  if (!all_zero(Bytes(bytes).subspan(kFieldBytes + 8, kFilterMarkOffset - kFieldBytes - 8)) ||
      !all_zero(Bytes(bytes).subspan(mark_end)))
    throw_damaged(path, kFieldBytes + 8, "unused bytes of the head that are not zero");
  const Bytes mark = Bytes(bytes).subspan(kFilterMarkOffset, kMarkBytes);
  ByteReader mark_fields(mark, path.string(), kFilterMarkOffset);
  head.mark.end = mark_fields.get<uint64_t>();
  head.mark.synced = mark_fields.get<uint64_t>();
  head.mark.boot = mark_fields.get<uint64_t>();
  if (mark_fields.get<uint64_t>() != checksum64(mark.first(kMarkBytes - 8), seed))
    throw_damaged(path, kFilterMarkOffset, "the mark's checksum does not match");
  return head;
}

uint64_t filter_counters_end(const CountingBloomFilter& filter) noexcept {
  return kFilterHeadBytes + filter.memory_bytes() + filter.num_chunks() * sizeof(uint64_t);
}

void read_filter_counters(const FileDescriptor& file, const FilterHead& head, uint64_t seed,
                          CountingBloomFilter& filter) {
  const auto shorter = [&](uint64_t at) {
    throw_damaged(file.path(), at, "the file became shorter while it was read");
  };
  std::vector<uint64_t> checksums(filter.num_chunks());
  const uint64_t checksums_at = kFilterHeadBytes + filter.memory_bytes();
  if (file.read_at(std::as_writable_bytes(std::span(checksums)), checksums_at) != checksums.size() * sizeof(uint64_t))
    shorter(checksums_at);
  std::vector<std::byte> chunk;
  for (size_t i = 0; i < checksums.size(); ++i) {
    const uint64_t at = filter_chunk_offset(i);
    chunk.resize(filter.chunk_bytes(i));
    if (file.read_at(chunk, at) != chunk.size()) shorter(at);
    if (filter_chunk_checksum(chunk, i, seed) != checksums[i])
      throw_damaged(file.path(), at,
                    "the checksum of " + std::to_string(chunk.size()) + " bytes of counters does not match");
    filter.load_chunk(i, chunk);
  }
  filter.set_adds(head.adds);
}

std::string show_filter_settings(const FilterSettings& settings) {
  return "capacity=" + std::to_string(settings.capacity) + ", count=" + std::to_string(settings.count) +
         ", fpr=" + format_number(settings.fpr) +
         ", halve_every=" + (settings.halve_every == 0 ? "None" : std::to_string(settings.halve_every));
}

}  // namespace damo
