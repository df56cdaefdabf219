// SPDX-License-Identifier: Apache-2.0
#include "stores/commit_mark.h"

#include <doctest/doctest.h>

#include <string>

#include "temporary_directory.h"

namespace damo {
namespace {

using testing::TemporaryDirectory;

TEST_CASE("commit mark: the last number written is read, over reopening") {
  TemporaryDirectory directory;
  const auto path = directory / "COMMITTED";
  CHECK_FALSE(CommitMark::read(path));
  write_file_atomically(path, CommitMark::contents(0));
  CHECK(CommitMark::read(path) == 0);
  for (uint64_t number = 1; number < 6; ++number) {
    CommitMark mark;
    mark.open(path);
    mark.write(number);
    CHECK(CommitMark::read(path) == number);
  }
  CHECK(read_file(path, 10000).size() == 1024);
}

TEST_CASE("commit mark: damage in one slot leaves the other; in both it is CorruptionError") {
  TemporaryDirectory directory;
  const auto path = directory / "COMMITTED";
  write_file_atomically(path, CommitMark::contents(6));
  CommitMark mark;
  mark.open(path);
  mark.write(7);
  const std::string good = read_file(path, 10000);
  for (size_t at = 0; at < 24; ++at) {
    std::string bad = good;
    bad[512 + at] = static_cast<char>(bad[512 + at] ^ 1);
    write_file_atomically(path, bad);
    CHECK(CommitMark::read(path) == 6);
    bad[at] = static_cast<char>(bad[at] ^ 1);
    write_file_atomically(path, bad);
    CHECK_THROWS_AS(CommitMark::read(path), CorruptionError);
  }
  for (const size_t size : {size_t{0}, size_t{10}, size_t{23}}) {
    write_file_atomically(path, good.substr(0, size));
    CHECK_THROWS_AS(CommitMark::read(path), CorruptionError);
  }
  write_file_atomically(path, good + "x");
  CHECK_THROWS_AS(CommitMark::read(path), CorruptionError);
}

}  // namespace
}  // namespace damo
