// SPDX-License-Identifier: Apache-2.0
#include "table_tail.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>

#include "../error.h"
#include "../format.h"

namespace damo {
namespace {

constexpr size_t kFooterBytes = 53, kHandlesEnd = 41, kTrailerBytes = 5;
constexpr uint8_t kXxh3 = 4;
constexpr uint32_t kFormatVersion = 5;
constexpr uint64_t kMagic = 0x88e241b785f4cff7;
// One read of this has all of it in a table of ours.
constexpr size_t kFirstRead = 4096;
// A block is a kilobyte or two. Not to take memory for what a damaged handle says.
constexpr uint64_t kMaxBlockBytes = 1 << 20;

struct Handle {
  uint64_t offset = 0, size = 0;
};

// A varint, whose bytes are taken from `text`; none when it ends too early or has more than 64 bits.
std::optional<uint64_t> take_varint(std::string_view& text) {
  uint64_t number = 0;
  for (unsigned shift = 0; shift < 64 && !text.empty(); shift += 7) {
    const auto byte = static_cast<uint8_t>(text.front());
    text.remove_prefix(1);
    number |= uint64_t{byte & 0x7fu} << shift;
    if (byte < 0x80) return number;
  }
  return std::nullopt;
}

std::optional<Handle> take_handle(std::string_view& text) {
  const auto offset = take_varint(text), size = offset ? take_varint(text) : std::nullopt;
  if (!size) return std::nullopt;
  return Handle{*offset, *size};
}

template <class Number>
Number number_at(std::string_view text, size_t at) {
  Number number;
  std::memcpy(&number, text.data() + at, sizeof number);
  return number;
}

// The value of `wanted` in a metaindex block; none where the block makes no sense before it.
std::optional<std::string_view> find(std::string_view block, std::string_view wanted) {
  if (block.size() < sizeof(uint32_t)) return std::nullopt;
  const uint64_t restarts = number_at<uint32_t>(block, block.size() - sizeof(uint32_t));
  if (restarts >= block.size() / sizeof(uint32_t)) return std::nullopt;
  block.remove_suffix((restarts + 1) * sizeof(uint32_t));
  std::string key;
  while (!block.empty()) {
    const auto shared = take_varint(block), more = shared ? take_varint(block) : std::nullopt,
               bytes = more ? take_varint(block) : std::nullopt;
    if (!bytes || *shared > key.size() || *more > block.size() || *bytes > block.size() - *more) return std::nullopt;
    key.resize(*shared);
    key += block.substr(0, *more);
    if (key == wanted) return block.substr(*more, *bytes);
    block.remove_prefix(*more + *bytes);
  }
  return std::nullopt;
}

}  // namespace

void check_table_tail(const std::string& path, uint64_t file_bytes, const ReadTable& read) {
  const auto damaged = [&](std::string_view what, uint64_t from, uint64_t to) {
    return CorruptionError(path + " is damaged: the " + std::string(what) + " (offset " + std::to_string(from) +
                           " to " + std::to_string(to) + ") is not one of a table");
  };
  if (file_bytes < kFooterBytes) throw damaged("end", 0, file_bytes);
  const uint64_t tail_offset = file_bytes - std::min<uint64_t>(file_bytes, kFirstRead);
  std::string tail, other;
  read(tail_offset, static_cast<size_t>(file_bytes - tail_offset), tail);
  if (tail_offset + tail.size() != file_bytes) throw damaged("end", tail_offset, file_bytes);
  const uint64_t footer_offset = file_bytes - kFooterBytes;
  const std::string_view footer = std::string_view(tail).substr(tail.size() - kFooterBytes);

  // A block whose checksum is right, without its trailer; valid until the next call.
  const auto block = [&](const char* name, const Handle& handle) {
    const auto wrong = [&] { return damaged(name, handle.offset, handle.offset + handle.size); };
    if (handle.size > kMaxBlockBytes || handle.size + kTrailerBytes > footer_offset ||
        handle.offset > footer_offset - handle.size - kTrailerBytes)
      throw wrong();
    const auto size = static_cast<size_t>(handle.size);
    std::string_view text;
    if (handle.offset >= tail_offset) {
      text = std::string_view(tail).substr(static_cast<size_t>(handle.offset - tail_offset), size + kTrailerBytes);
    } else {
      read(handle.offset, size + kTrailerBytes, other);
      text = other;
      if (text.size() != size + kTrailerBytes) throw wrong();
    }
    const auto covered = static_cast<uint32_t>(checksum64(std::as_bytes(std::span(text.substr(0, size)))));
    if (text[size] != 0 || number_at<uint32_t>(text, size + 1) != covered) throw wrong();
    return text.substr(0, size);
  };

  std::string_view handles = footer.substr(1, kHandlesEnd - 1);
  const std::optional<Handle> metaindex = take_handle(handles);
  const std::optional<Handle> index = metaindex ? take_handle(handles) : std::nullopt;
  if (static_cast<uint8_t>(footer[0]) != kXxh3 || !index || handles.find_first_not_of('\0') != handles.npos ||
      number_at<uint32_t>(footer, kHandlesEnd) != kFormatVersion ||
      number_at<uint64_t>(footer, kHandlesEnd + 4) != kMagic)
    throw damaged("footer", footer_offset, file_bytes);
  const std::optional<std::string_view> value = find(block("metaindex", *metaindex), "rocksdb.properties");
  std::string_view rest = value.value_or("");
  const std::optional<Handle> properties = take_handle(rest);
  if (!properties) throw damaged("metaindex", metaindex->offset, metaindex->offset + metaindex->size);
  block("properties", *properties);
}

}  // namespace damo
