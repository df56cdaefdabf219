// SPDX-License-Identifier: Apache-2.0
#include "presence_filter.h"

#include <fcntl.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "error.h"
#include "file.h"

namespace damo {
namespace {

constexpr std::string_view kMagic = "DAMOPRES";
constexpr uint32_t kPresenceVersion = 1;
constexpr int kBitsPerKey = 6;
constexpr size_t kPieceBytes = size_t{1} << 18;
__extension__ using Wide = unsigned __int128;

}  // namespace

PresenceFilter::PresenceFilter(size_t bytes)
    : num_blocks_(std::max<size_t>(bytes / sizeof(Block), 1)), blocks_(new Block[num_blocks_]()) {}

PresenceFilter::Place PresenceFilter::place_of(const StoredKey& key) const noexcept {
  // The mixed key again, because its high bits alone would give the keys of one shard to one part of the filter of
  // another table; then the block from the high half of a product, the bits from a second mix.
  const uint64_t hash = mix_key(key.mixed() ^ key.table_id() * 0x9E3779B97F4A7C15ULL);
  const auto block = static_cast<size_t>((static_cast<Wide>(hash) * num_blocks_) >> 64);
  return {block, mix_key(hash)};
}

void PresenceFilter::add(const StoredKey& key) noexcept {
  Place place = place_of(key);
  for (int i = 0; i < kBitsPerKey; ++i, place.bits >>= 9)
    blocks_[place.block].words[place.bits >> 6 & 7].fetch_or(uint64_t{1} << (place.bits & 63),
                                                             std::memory_order_relaxed);
}

bool PresenceFilter::may_contain(const StoredKey& key) const noexcept {
  Place place = place_of(key);
  for (int i = 0; i < kBitsPerKey; ++i, place.bits >>= 9)
    if ((blocks_[place.block].words[place.bits >> 6 & 7].load(std::memory_order_relaxed) >> (place.bits & 63) & 1) == 0)
      return false;
  return true;
}

// In pieces, each copied first: bits may be added while the filter is saved, and the checksum is of what was written.
void PresenceFilter::save(const std::filesystem::path& file, uint64_t sequence) const {
  std::filesystem::path staged = file;
  staged += ".tmp";
  {
    FileDescriptor out("save the presence filter", staged, O_WRONLY | O_CREAT | O_TRUNC);
    std::string piece(kMagic);
    ByteWriter writer(piece);
    writer.put(kPresenceVersion);
    writer.put(uint32_t{0});
    writer.put(sequence);
    writer.put(static_cast<uint64_t>(num_blocks_));
    uint64_t checksum = 0;
    for (size_t b = 0;; ++b) {
      if (b == num_blocks_ || piece.size() >= kPieceBytes) {
        checksum = checksum64(std::as_bytes(std::span(piece)), checksum);
        out.write(std::as_bytes(std::span(piece)));
        piece.clear();
      }
      if (b == num_blocks_) break;
      for (const auto& word : blocks_[b].words) writer.put(word.load(std::memory_order_relaxed));
    }
    out.write(std::as_bytes(std::span(&checksum, 1)));
    out.sync();
    out.close();
  }
  std::filesystem::rename(staged, file);
  fsync_directory(file.parent_path());
}

bool PresenceFilter::load(const std::filesystem::path& file, uint64_t oldest_sequence) {
  try {
    return load(FileDescriptor("load the presence filter", file, O_RDONLY), oldest_sequence);
  } catch (const Error&) {
    return false;
  }
}

bool PresenceFilter::load(const FileDescriptor& in, uint64_t oldest_sequence) {
  // Twice: first to check, then to add. It can always be built again, so whatever is wrong means no.
  try {
    const size_t head = kMagic.size() + 24, total = head + bytes();
    if (in.bytes() != total + 8) return false;
    std::vector<std::byte> piece;
    for (const bool add : {false, true}) {
      uint64_t checksum = 0;
      // As save() cuts it: the first piece is the one that reaches kPieceBytes with whole blocks behind the head.
      for (size_t at = 0; at < total; at += piece.size()) {
        size_t size = at == 0 ? head : 0;
        while (size < kPieceBytes && at + size < total) size += sizeof(Block);
        piece.resize(size);
        if (in.read_at(piece, at) != size) return false;
        checksum = checksum64(piece, checksum);
        if (at == 0 && !add) {
          ByteReader reader(piece, in.path().string());
          if (std::memcmp(reader.take(kMagic.size()).data(), kMagic.data(), kMagic.size()) != 0) return false;
          const auto version = reader.get<uint32_t>();
          reader.get<uint32_t>();
          const auto sequence = reader.get<uint64_t>();
          if (version != kPresenceVersion || sequence < oldest_sequence || reader.get<uint64_t>() != num_blocks_)
            return false;
        }
        if (!add) continue;
        const size_t skip = at == 0 ? head : 0;
        for (size_t offset = skip; offset < size; offset += 8) {
          const size_t word = (at + offset - head) / 8;
          uint64_t bits;
          std::memcpy(&bits, piece.data() + offset, 8);
          blocks_[word / 8].words[word % 8].fetch_or(bits, std::memory_order_relaxed);
        }
      }
      uint64_t expected = 0;
      if (in.read_at(std::as_writable_bytes(std::span(&expected, 1)), total) != 8 || expected != checksum) return false;
    }
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace damo
