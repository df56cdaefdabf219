// SPDX-License-Identifier: Apache-2.0
#include "hash_keys.h"

#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace damo {
namespace {

Bytes bytes(const auto& values) { return std::as_bytes(std::span(values)); }

// A copy of the bytes at an odd address, as Arrow may hand them over.
struct Misaligned {
  explicit Misaligned(Bytes source) : memory(source.size() + 1) {
    if (!source.empty()) std::memcpy(memory.data() + 1, source.data(), source.size());
  }
  Bytes get() const { return Bytes(memory).subspan(1); }
  std::vector<std::byte> memory;
};

}  // namespace

TEST_CASE("keys are the golden values of docs/format.md") {
  // Made with the Python package xxhash; test_hashing.py has the definition.
  const KeyHasher city("city", 0);
  CHECK(city.text("Oslo") == 8647766617524932057);
  CHECK(city.text("") == 4875961023906514590);
  CHECK(city.text("東京") == 2113774763446396006);
  const KeyHasher user("user", 0);
  CHECK(user.integer(0) == -7440446539185294909);
  CHECK(user.integer(5) == 5012926161063040769);
  CHECK(user.text("5") == 691214282487138278);
  CHECK(user.integer(~uint64_t{0}) == -6955562014299007629);
  CHECK(KeyHasher("user", 7).integer(5) == 850429433315291248);
}

TEST_CASE("a hash of zero becomes the replacement and no other key is zero") {
  const KeyHasher hasher("field", 0);
  // The integer whose hash is 0 in this field: XXH3 run backwards by zero_integer() of test_hashing.py.
  const uint64_t value = 532521709402113170u;
  CHECK(static_cast<uint64_t>(hasher.integer(value)) == KeyHasher::kZeroReplacement);
  CHECK(hasher.integer(value + 1) != 0);
}

TEST_CASE("the padding's key becomes zero and other keys stay") {
  KeyHasher hasher("f", 0);
  const int64_t pad = hasher.text("pad");
  const int64_t other = hasher.text("other");
  hasher.set_padding(pad);
  CHECK(hasher.text("pad") == KeyHasher::kMissing);
  CHECK(hasher.text("other") == other);
}

TEST_CASE("integers of every width have the key of their value") {
  const KeyHasher hasher("f", 0);
  const auto check = [&]<class Int>(Int) {
    const std::array<Int, 4> values{std::numeric_limits<Int>::min(), Int{0}, Int{5}, std::numeric_limits<Int>::max()};
    std::array<int64_t, 4> keys;
    const Misaligned column(bytes(values));
    hasher.integers<Int>(column.get(), {}, keys);
    for (size_t i = 0; i < values.size(); ++i) CHECK(keys[i] == hasher.integer(static_cast<uint64_t>(values[i])));
  };
  check(int8_t{});
  check(uint8_t{});
  check(int16_t{});
  check(uint16_t{});
  check(int32_t{});
  check(uint32_t{});
  check(int64_t{});
  check(uint64_t{});
}

TEST_CASE("rows that are not valid are missing, from any bit of the bitmap on") {
  const KeyHasher hasher("f", 0);
  const std::array<uint8_t, 2> bits{0b10110000, 0b1};  // rows from bit 4: 1 1 0 1 1
  const std::array<int64_t, 5> values{1, 2, 3, 4, 5};
  std::array<int64_t, 5> keys;
  hasher.integers<int64_t>(bytes(values), {bytes(bits).data(), 4}, keys);
  CHECK(keys == std::array<int64_t, 5>{hasher.integer(1), hasher.integer(2), 0, hasher.integer(4), hasher.integer(5)});
}

TEST_CASE("texts with offsets have the keys of their bytes") {
  const KeyHasher hasher("f", 0);
  const std::string text = "Oslo--Bergen";
  const std::array<int32_t, 5> offsets{0, 4, 4, 6, 12};
  std::array<int64_t, 4> keys;
  CHECK(hasher.texts<int32_t>(Misaligned(bytes(offsets)).get(), bytes(text), {}, keys) == 4);
  CHECK(keys == std::array<int64_t, 4>{hasher.text("Oslo"), hasher.text(""), hasher.text("--"), hasher.text("Bergen")});
  const std::array<int64_t, 3> wide{4, 6, 12};
  std::array<int64_t, 2> two;
  CHECK(hasher.texts<int64_t>(bytes(wide), bytes(text), {}, two) == 2);
  CHECK(two == std::array<int64_t, 2>{hasher.text("--"), hasher.text("Bergen")});
}

TEST_CASE("texts stop at the first row whose offsets do not fit") {
  const KeyHasher hasher("f", 0);
  const std::string text = "0123456789";
  std::array<int64_t, 3> keys;
  for (const std::array<int32_t, 4>& offsets :
       {std::array<int32_t, 4>{0, 2, 11, 12}, {0, 2, 1, 3}, {0, 2, -1, 3}, {0, 2, 2'000'000'000, 3}}) {
    CHECK(hasher.texts<int32_t>(bytes(offsets), bytes(text), {}, keys) == 1);
  }
}

TEST_CASE("views have the keys of their bytes and stop where they point outside") {
  const KeyHasher hasher("f", 0);
  const std::string long_text = "a text of more than twelve bytes";
  const auto view = [](int32_t length, const char* head, int32_t buffer, int32_t offset) {
    std::array<std::byte, 16> result{};
    std::memcpy(result.data(), &length, 4);
    if (length <= 12) {
      std::memcpy(result.data() + 4, head, length < 0 ? 0 : static_cast<size_t>(length));
    } else {
      std::memcpy(result.data() + 4, head, 4);
      std::memcpy(result.data() + 8, &buffer, 4);
      std::memcpy(result.data() + 12, &offset, 4);
    }
    return result;
  };
  const std::vector<Bytes> buffers{bytes(std::string_view("unused")), bytes(long_text)};
  const auto size = static_cast<int32_t>(long_text.size());
  const std::array good{view(0, "", 0, 0), view(12, "twelve bytes", 0, 0), view(size, "a te", 1, 0),
                        view(size - 2, "text", 1, 2)};
  std::array<int64_t, 4> keys;
  CHECK(hasher.views(bytes(good), buffers, {}, keys) == 4);
  CHECK(keys == std::array<int64_t, 4>{hasher.text(""), hasher.text("twelve bytes"), hasher.text(long_text),
                                       hasher.text(long_text.substr(2))});
  for (const auto& bad : {view(-1, "", 0, 0), view(size, "a te", 1, 1), view(size, "a te", 2, 0),
                          view(size, "a te", -1, 0), view(size, "a te", 1, -1)}) {
    const std::array column{good[0], bad};
    std::array<int64_t, 2> two;
    CHECK(hasher.views(bytes(column), buffers, {}, two) == 1);
  }
}

TEST_CASE("fixed width text leaves NUL bytes at its end out only when asked") {
  const KeyHasher hasher("f", 0);
  const std::string text("ab\0\0a\0b\0\0\0\0\0", 12);
  std::array<int64_t, 3> keys;
  hasher.fixed_width(bytes(text), 4, true, {}, keys);
  CHECK(keys == std::array<int64_t, 3>{hasher.text("ab"), hasher.text({"a\0b", 3}), hasher.text("")});
  hasher.fixed_width(bytes(text), 4, false, {}, keys);
  CHECK(keys[0] == hasher.text({"ab\0\0", 4}));
}

TEST_CASE("code points have the key of their UTF-8") {
  const KeyHasher hasher("f", 0);
  const std::u32string text = std::u32string(U"Oslo") + U"K\u00F8\u6771\U0001F600" + U"\u007F\u0080\u07FF\u0800" +
                              U"\uFFFF\U00010000\U0010FFFF" + std::u32string(1, U'\0');
  std::array<int64_t, 4> keys;
  CHECK(hasher.utf32(Misaligned(bytes(text)).get(), 4, {}, keys) == 4);
  CHECK(keys == std::array<int64_t, 4>{hasher.text("Oslo"), hasher.text("K\u00F8\u6771\U0001F600"),
                                       hasher.text("\u007F\u0080\u07FF\u0800"),
                                       hasher.text("\uFFFF\U00010000\U0010FFFF")});
}

TEST_CASE("code points without UTF-8 stop the column unless they are not valid") {
  const KeyHasher hasher("f", 0);
  for (const uint32_t bad : {0xD800u, 0xDFFFu, 0x110000u, 0xFFFFFFFFu}) {
    const std::array<uint32_t, 2> text{'a', bad};
    std::array<int64_t, 2> keys;
    CHECK(hasher.utf32(bytes(text), 1, {}, keys) == 1);
    const std::array<uint8_t, 1> bits{0b01};
    CHECK(hasher.utf32(bytes(text), 1, {bytes(bits).data(), 0}, keys) == 2);
    CHECK(keys[1] == KeyHasher::kMissing);
  }
}

TEST_CASE("empty columns are done at once") {
  const KeyHasher hasher("f", 0);
  CHECK(hasher.texts<int32_t>({}, {}, {}, {}) == 0);
  CHECK(hasher.views({}, {}, {}, {}) == 0);
  CHECK(hasher.utf32({}, 0, {}, {}) == 0);
  hasher.integers<int32_t>({}, {}, {});
  hasher.fixed_width({}, 3, true, {}, {});
}

}  // namespace damo
