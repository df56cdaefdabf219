// SPDX-License-Identifier: Apache-2.0
#define STORE_NAME "memory store"
#define OPEN_STORE open_memory_store
#include "store_conformance.h"

namespace damo {
namespace {

TEST_CASE_FIXTURE(Fixture, "memory store: a damaged copy is CorruptionError") {
  commit(*store, numbered(0, 20, 0, 10));
  store->link_into(directory / "copy");
  const auto path = directory / "copy" / "entries";
  const std::string good = read_file(path, 1 << 20);
  for (size_t size = 0; size < good.size(); size += 5) {
    write_file_atomically(path, std::string_view(good).substr(0, size));
    CHECK_THROWS_AS(open_memory_store(options_for(directory / "copy")), CorruptionError);
  }
  for (size_t at = 0; at < good.size(); at += 5) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 0x40);
    write_file_atomically(path, bad);
    CHECK_THROWS_AS(open_memory_store(options_for(directory / "copy")), CorruptionError);
  }
  write_file_atomically(path, good);
  CHECK(scan(*open_memory_store(options_for(directory / "copy"))->snapshot()).size() == 20);
}

}  // namespace
}  // namespace damo
