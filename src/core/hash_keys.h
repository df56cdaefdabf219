// SPDX-License-Identifier: Apache-2.0
//
// Keys from values: text, bytes and integers of a named field become 64-bit
// keys by XXH3-64. The definition is part of the persistent format (rows are
// found again by it), and docs/format.md repeats it with example values:
//
//   field_seed   = XXH3_64(UTF-8 of the field's name, seed)
//   integer_seed = XXH3_64(field_seed as 8 bytes little-endian, 0)
//   key(text)    = XXH3_64(UTF-8 of the text, field_seed); bytes are hashed as they are
//   key(integer) = XXH3_64(8 bytes little-endian two's complement, integer_seed)
//   a result of 0 becomes kZeroReplacement; key 0 says "missing" or "padding"
//
// What follows from it: a text and its UTF-8 bytes have one key; 5 and "5" do
// not, nor 5 and its eight bytes; -1 and 2^64 - 1 are the same 64 bits, so they
// do. XXH3 maps inputs of eight bytes one to one, so two integers of a field
// never share a key (but for the one whose hash is 0).
//
// Thread safety: all methods but set_padding are const and may run on many
// threads. Nothing here throws or allocates, except where it says so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "format.h"  // Bytes

namespace damo {

// Which rows of a column hold a value: Arrow's bitmap, least significant bit
// first, row 0 at bit `offset`. Null bits: all of them.
struct Validity {
  const std::byte* bits = nullptr;
  size_t offset = 0;
  bool operator()(size_t row) const noexcept {
    const size_t bit = offset + row;
    return bits == nullptr || (static_cast<uint8_t>(bits[bit / 8]) >> (bit % 8) & 1) != 0;
  }
};

class KeyHasher {
 public:
  static constexpr int64_t kMissing = 0;
  static constexpr uint64_t kZeroReplacement = 0x9E3779B97F4A7C15ULL;

  KeyHasher(std::string_view field, uint64_t seed);

  const std::string& field() const noexcept { return field_; }

  // Values whose key is `key` become kMissing from now on. Give the key of the
  // padding value, made before the call.
  void set_padding(int64_t key) noexcept { padding_ = key; }

  int64_t text(std::string_view bytes) const noexcept;
  int64_t integer(uint64_t bits) const noexcept;

  // Columns: out[i] is the key of row i, kMissing where it is not valid. Columns
  // are given as bytes and need not be aligned: Arrow does not promise it.

  // Int: any of the eight integer types; signed ones are widened with their sign.
  template <class Int>
  void integers(Bytes values, Validity valid, std::span<int64_t> out) const noexcept;

  // Row i is bytes offsets[i] .. offsets[i + 1] of `text`; Offset is int32_t or int64_t.
  // Returns the number of rows done: less than out.size() at a row whose offsets do not fit into `text`.
  template <class Offset>
  size_t texts(Bytes offsets, Bytes text, Validity valid, std::span<int64_t> out) const noexcept;

  // Arrow's views of 16 bytes: length, then the text itself, or its first four bytes, buffer number and offset.
  // Returns the number of rows done: less than out.size() at a view that points outside of its buffer.
  size_t views(Bytes views, std::span<const Bytes> buffers, Validity valid, std::span<int64_t> out) const noexcept;

  // Row i is the `width` bytes at i * width; NUL bytes at its end are left out when `strip` is set (NumPy's "S").
  void fixed_width(Bytes text, size_t width, bool strip, Validity valid, std::span<int64_t> out) const noexcept;

  // Row i is the `width` code points at i * width, NUL at its end left out (NumPy's "U"), hashed as UTF-8.
  // Returns the number of rows done: less than out.size() at a row that has no UTF-8 (a surrogate, or beyond U+10FFFF).
  // Allocates `width` * 4 bytes.
  size_t utf32(Bytes code_points, size_t width, Validity valid, std::span<int64_t> out) const;

 private:
  int64_t finish(uint64_t hash) const noexcept;

  std::string field_;
  uint64_t field_seed_;
  uint64_t integer_seed_;
  int64_t padding_ = kMissing;  // no value has this key, so it stands for "none"
};

// Writes the UTF-8 of `length` code points (unaligned, CodePoint is uint8_t, uint16_t or uint32_t) to `out`, which has
// room for 4 bytes each. Nothing when one of them is a surrogate or beyond U+10FFFF.
template <class CodePoint>
std::optional<size_t> encode_utf8(const std::byte* code_points, size_t length, char* out) noexcept;

}  // namespace damo
