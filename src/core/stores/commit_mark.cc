// SPDX-License-Identifier: Apache-2.0
#include "commit_mark.h"

#include <fcntl.h>

#include <algorithm>
#include <span>

#include "../error.h"

namespace damo {
namespace {

constexpr uint64_t kMagic = 0x316b72616d6d6164;  // "dammark1"
constexpr size_t kUsedBytes = 24, kSlotBytes = 512, kFileBytes = 2 * kSlotBytes;

uint64_t checksum(uint64_t number) { return checksum64(std::as_bytes(std::span(&number, 1)), kMagic); }

}  // namespace

std::optional<uint64_t> CommitMark::read(const std::filesystem::path& path) {
  std::string text;
  try {
    text = read_file(path, kFileBytes);
  } catch (const MissingFileError&) {
    return std::nullopt;
  }
  std::optional<uint64_t> newest;
  for (const size_t at : {size_t{0}, kSlotBytes}) {
    if (text.size() < at + kUsedBytes) continue;
    ByteReader in(std::as_bytes(std::span(text)).subspan(at, kUsedBytes), path.string(), at);
    const auto magic = in.get<uint64_t>();
    const auto number = in.get<uint64_t>();
    if (magic == kMagic && in.get<uint64_t>() == checksum(number)) newest = std::max(newest.value_or(0), number);
  }
  if (!newest) throw CorruptionError("[open] " + path.string() + " is damaged: neither of its two slots is whole");
  return newest;
}

std::string CommitMark::contents(uint64_t number) {
  std::string slot;
  ByteWriter out(slot);
  out.put(kMagic);
  out.put(number);
  out.put(checksum(number));
  slot.resize(kSlotBytes);
  return slot + slot;
}

void CommitMark::open(const std::filesystem::path& path) { file_ = FileDescriptor("open", path, O_WRONLY); }

void CommitMark::write(uint64_t number) const {
  const std::string both = contents(number);
  file_.write_at(std::as_bytes(std::span(both)).first(kUsedBytes), number % 2 * kSlotBytes);
  file_.sync_data();
}

}  // namespace damo
