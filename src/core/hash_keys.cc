// SPDX-License-Identifier: Apache-2.0
#include "hash_keys.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cassert>
#include <cstring>
#include <vector>

namespace damo {

namespace {

template <class T>
T load(const std::byte* bytes, size_t index) noexcept {
  T value;
  std::memcpy(&value, bytes + index * sizeof(T), sizeof(T));
  return value;
}

}  // namespace

KeyHasher::KeyHasher(std::string_view field, uint64_t seed)
    : field_(field),
      field_seed_(XXH3_64bits_withSeed(field.data(), field.size(), seed)),
      integer_seed_(XXH3_64bits_withSeed(&field_seed_, sizeof field_seed_, 0)) {}

inline int64_t KeyHasher::finish(uint64_t hash) const noexcept {
  const auto key = static_cast<int64_t>(hash == 0 ? kZeroReplacement : hash);
  return key == padding_ ? kMissing : key;
}

int64_t KeyHasher::text(std::string_view bytes) const noexcept {
  return finish(XXH3_64bits_withSeed(bytes.data(), bytes.size(), field_seed_));
}

int64_t KeyHasher::integer(uint64_t bits) const noexcept {
  return finish(XXH3_64bits_withSeed(&bits, sizeof bits, integer_seed_));
}

template <class Int>
void KeyHasher::integers(Bytes values, Validity valid, std::span<int64_t> out) const noexcept {
  assert(values.size() >= out.size() * sizeof(Int));
  for (size_t i = 0; i < out.size(); ++i) {
    const auto bits = static_cast<uint64_t>(load<Int>(values.data(), i));  // sign extended when Int is signed
    out[i] = valid(i) ? integer(bits) : kMissing;
  }
}

template <class Offset>
size_t KeyHasher::texts(Bytes offsets, Bytes text_bytes, Validity valid, std::span<int64_t> out) const noexcept {
  assert(out.empty() || offsets.size() >= (out.size() + 1) * sizeof(Offset));
  const char* data = reinterpret_cast<const char*>(text_bytes.data());
  for (size_t i = 0; i < out.size(); ++i) {
    if (!valid(i)) {
      out[i] = kMissing;
      continue;
    }
    const auto begin = load<Offset>(offsets.data(), i);
    const auto end = load<Offset>(offsets.data(), i + 1);
    if (begin < 0 || end < begin || static_cast<uint64_t>(end) > text_bytes.size()) return i;
    out[i] = text({data + begin, static_cast<size_t>(end - begin)});
  }
  return out.size();
}

size_t KeyHasher::views(Bytes view_bytes, std::span<const Bytes> buffers, Validity valid,
                        std::span<int64_t> out) const noexcept {
  constexpr size_t kViewBytes = 16;
  constexpr int32_t kInline = 12;
  assert(view_bytes.size() >= out.size() * kViewBytes);
  for (size_t i = 0; i < out.size(); ++i) {
    if (!valid(i)) {
      out[i] = kMissing;
      continue;
    }
    const std::byte* view = view_bytes.data() + i * kViewBytes;
    const auto length = load<int32_t>(view, 0);
    if (length < 0) return i;
    const auto size = static_cast<size_t>(length);
    if (length <= kInline) {
      out[i] = text({reinterpret_cast<const char*>(view + 4), size});
      continue;
    }
    const auto number = load<int32_t>(view, 2);
    const auto begin = load<int32_t>(view, 3);
    if (number < 0 || static_cast<size_t>(number) >= buffers.size() || begin < 0) return i;
    const Bytes buffer = buffers[static_cast<size_t>(number)];
    if (static_cast<size_t>(begin) + size > buffer.size()) return i;
    out[i] = text({reinterpret_cast<const char*>(buffer.data()) + begin, size});
  }
  return out.size();
}

void KeyHasher::fixed_width(Bytes text_bytes, size_t width, bool strip, Validity valid,
                            std::span<int64_t> out) const noexcept {
  assert(text_bytes.size() >= out.size() * width);
  const char* data = reinterpret_cast<const char*>(text_bytes.data());
  for (size_t i = 0; i < out.size(); ++i) {
    size_t length = width;
    while (strip && length > 0 && data[i * width + length - 1] == '\0') --length;
    out[i] = valid(i) ? text({data + i * width, length}) : kMissing;
  }
}

size_t KeyHasher::utf32(Bytes code_points, size_t width, Validity valid, std::span<int64_t> out) const {
  assert(code_points.size() >= out.size() * width * 4);
  std::vector<char> utf8(width * 4);
  for (size_t i = 0; i < out.size(); ++i) {
    if (!valid(i)) {
      out[i] = kMissing;
      continue;
    }
    const std::byte* row = code_points.data() + i * width * 4;
    size_t length = width;
    while (length > 0 && load<uint32_t>(row, length - 1) == 0) --length;
    const std::optional<size_t> size = encode_utf8<uint32_t>(row, length, utf8.data());
    if (!size) return i;
    out[i] = text({utf8.data(), *size});
  }
  return out.size();
}

template <class CodePoint>
std::optional<size_t> encode_utf8(const std::byte* code_points, size_t length, char* out) noexcept {
  // Almost all text is ASCII: narrow it in a loop the compiler vectorizes, and look back only once.
  uint32_t seen = 0;
  for (size_t i = 0; i < length; ++i) {
    const uint32_t c = load<CodePoint>(code_points, i);
    seen |= c;
    out[i] = static_cast<char>(c);
  }
  if (seen < 0x80) return length;
  char* at = out;
  const auto put = [&at](uint32_t byte) { *at++ = static_cast<char>(byte); };
  for (size_t i = 0; i < length; ++i) {
    const uint32_t c = load<CodePoint>(code_points, i);
    if (c < 0x80) {
      put(c);
    } else if (c < 0x800) {
      put(0xC0 | c >> 6);
      put(0x80 | (c & 0x3F));
    } else if (c < 0x10000) {
      if (c >= 0xD800 && c < 0xE000) return std::nullopt;
      put(0xE0 | c >> 12);
      put(0x80 | (c >> 6 & 0x3F));
      put(0x80 | (c & 0x3F));
    } else {
      if (c > 0x10FFFF) return std::nullopt;
      put(0xF0 | c >> 18);
      put(0x80 | (c >> 12 & 0x3F));
      put(0x80 | (c >> 6 & 0x3F));
      put(0x80 | (c & 0x3F));
    }
  }
  return static_cast<size_t>(at - out);
}

template void KeyHasher::integers<int8_t>(Bytes, Validity, std::span<int64_t>) const noexcept;
template void KeyHasher::integers<int16_t>(Bytes, Validity, std::span<int64_t>) const noexcept;
template void KeyHasher::integers<int32_t>(Bytes, Validity, std::span<int64_t>) const noexcept;
template void KeyHasher::integers<int64_t>(Bytes, Validity, std::span<int64_t>) const noexcept;
template void KeyHasher::integers<uint8_t>(Bytes, Validity, std::span<int64_t>) const noexcept;
template void KeyHasher::integers<uint16_t>(Bytes, Validity, std::span<int64_t>) const noexcept;
template void KeyHasher::integers<uint32_t>(Bytes, Validity, std::span<int64_t>) const noexcept;
template void KeyHasher::integers<uint64_t>(Bytes, Validity, std::span<int64_t>) const noexcept;
template size_t KeyHasher::texts<int32_t>(Bytes, Bytes, Validity, std::span<int64_t>) const noexcept;
template size_t KeyHasher::texts<int64_t>(Bytes, Bytes, Validity, std::span<int64_t>) const noexcept;
template std::optional<size_t> encode_utf8<uint8_t>(const std::byte*, size_t, char*) noexcept;
template std::optional<size_t> encode_utf8<uint16_t>(const std::byte*, size_t, char*) noexcept;
template std::optional<size_t> encode_utf8<uint32_t>(const std::byte*, size_t, char*) noexcept;

}  // namespace damo
