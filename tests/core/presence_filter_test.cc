// SPDX-License-Identifier: Apache-2.0
#include "presence_filter.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "error.h"
#include "file.h"
#include "temporary_directory.h"

namespace damo {
namespace {

using testing::TemporaryDirectory;

StoredKey key_of(uint64_t i, uint32_t table_id = 1) { return StoredKey::make(table_id, mix_key(i)); }

void add(PresenceFilter& filter, uint64_t first, uint64_t last) {
  for (uint64_t i = first; i < last; ++i) filter.add(key_of(i));
}

size_t present(const PresenceFilter& filter, uint64_t first, uint64_t last, uint32_t table_id = 1) {
  size_t count = 0;
  for (uint64_t i = first; i < last; ++i) count += filter.may_contain(key_of(i, table_id));
  return count;
}

TEST_CASE("presence filter: no key that was added is ever absent, however full it is") {
  for (const size_t bytes : {0, 1, 64, 100, 4096, 1 << 16}) {
    PresenceFilter filter(bytes);
    CHECK(filter.bytes() <= std::max<size_t>(bytes, 64));
    for (uint64_t i = 0; i < 5000; ++i) {
      filter.add(key_of(i));
      REQUIRE(filter.may_contain(key_of(i)));
    }
    CHECK(present(filter, 0, 5000) == 5000);
  }
}

TEST_CASE("presence filter: few keys that were not added seem present: about what the bits per key give") {
  constexpr uint64_t kAdded = 40000, kAsked = 200000;
  // bits per key, and the most of kAsked that may seem present: a third more than a blocked filter of six bits gives.
  for (const auto& [bits, most] : {std::pair{8.0, 0.045}, {12.0, 0.0125}, {16.0, 0.0060}}) {
    PresenceFilter filter(static_cast<size_t>(kAdded * bits / 8));
    add(filter, 0, kAdded);
    const double rate = static_cast<double>(present(filter, kAdded, kAdded + kAsked)) / kAsked;
    CAPTURE(bits);
    CAPTURE(rate);
    CHECK(rate < most);
    CHECK(rate > most / 10);
    // The same keys of another table are other keys.
    CHECK(static_cast<double>(present(filter, 0, kAdded, 2)) / kAdded < most);
  }
}

TEST_CASE("presence filter: one shard's keys fill it as evenly as all keys do") {
  PresenceFilter filter(40000);
  uint64_t added = 0;
  for (uint64_t mixed = 0; added < 40000; mixed += 0x3777777, ++added)
    filter.add(StoredKey::make(1, mixed));  // low mixes only
  size_t wrong = 0;
  for (uint64_t i = 0; i < 40000; ++i)
    wrong += filter.may_contain(StoredKey::make(1, (uint64_t{1} << 62) + i * 0x3777777));
  CHECK(wrong < 40000 * 5 / 100);
}

TEST_CASE("presence filter: complete is said by the caller, once") {
  PresenceFilter filter(1000);
  CHECK_FALSE(filter.complete());
  filter.set_complete();
  CHECK(filter.complete());
}

TEST_CASE("presence filter: what was saved comes back, beside what is there already") {
  const TemporaryDirectory directory;
  // Below, at, and above the size of the pieces it is written in.
  for (const size_t bytes :
       {size_t{64}, size_t{5000}, (size_t{1} << 18) - 64, size_t{1} << 18, (size_t{1} << 19) + 64}) {
    PresenceFilter filter(bytes);
    const uint64_t many = bytes / 2;
    add(filter, 0, many);
    filter.save(directory / "presence", 77);
    PresenceFilter loaded(bytes);
    loaded.add(key_of(many + 1));
    CHECK(loaded.load(directory / "presence", 77));
    CHECK_FALSE(loaded.complete());  // the caller says so, not the file
    CHECK(present(loaded, 0, many) == many);
    CHECK(loaded.may_contain(key_of(many + 1)));
    PresenceFilter same(bytes);
    CHECK(same.load(directory / "presence", 0));
    size_t differ = 0;
    for (uint64_t i = 0; i < 10000; ++i) differ += same.may_contain(key_of(i, 3)) != filter.may_contain(key_of(i, 3));
    CHECK(differ == 0);
  }
  CHECK_FALSE(std::filesystem::exists(directory / "presence.tmp"));
}

TEST_CASE("presence filter: an absent, older, resized or damaged file is not loaded and adds nothing") {
  const TemporaryDirectory directory;
  const auto path = directory / "presence";
  constexpr size_t kBytes = 1024;
  PresenceFilter filter(kBytes);
  add(filter, 0, 300);
  const auto refused_at = [&](size_t bytes, uint64_t oldest) {
    PresenceFilter fresh(bytes);
    const bool loaded = fresh.load(path, oldest);
    return !loaded && present(fresh, 0, 300) == 0;
  };
  const auto refused = [&](uint64_t oldest) { return refused_at(kBytes, oldest); };
  CHECK(refused(0));  // no file
  filter.save(path, 50);
  CHECK(refused(51));
  CHECK_FALSE(refused(50));
  CHECK(refused_at(kBytes + 64, 0));
  CHECK(refused_at(kBytes - 64, 0));
  const std::string good = read_file(path, 1 << 20);
  CHECK(good.size() == 32 + kBytes + 8);
  for (size_t size = 0; size < good.size(); size += 7) {
    write_file_atomically(path, std::string_view(good).substr(0, size));
    CHECK(refused(0));
  }
  write_file_atomically(path, good + '\0');
  CHECK(refused(0));
  for (size_t at = 0; at < good.size(); at += at < 40 ? 1 : 11) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 0x10);
    write_file_atomically(path, bad);
    CAPTURE(at);
    CHECK(refused(0));
  }
  write_file_atomically(path, good);
  CHECK_FALSE(refused(0));
}

TEST_CASE("presence filter: keys may be added and asked while it is saved; what was added before is in the file") {
  const TemporaryDirectory directory;
  PresenceFilter filter(1 << 19);
  add(filter, 0, 10000);
  std::thread adder([&] { add(filter, 10000, 60000); });
  for (uint64_t round = 0; round < 3; ++round) {
    filter.save(directory / "presence", round);
    PresenceFilter loaded(1 << 19);
    CHECK(loaded.load(directory / "presence", round));
    CHECK(present(loaded, 0, 10000) == 10000);
  }
  adder.join();
  CHECK(present(filter, 0, 60000) == 60000);
}

}  // namespace
}  // namespace damo
