// SPDX-License-Identifier: Apache-2.0
#include "scratch_directory.h"

#include <doctest/doctest.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <optional>
#include <string>

#include "error.h"
#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

struct Place {
  testing::TemporaryDirectory directory;
  std::string before = ::getenv("TMPDIR") != nullptr ? ::getenv("TMPDIR") : "";
  Place() { ::setenv("TMPDIR", directory.path().c_str(), 1); }
  ~Place() { before.empty() ? ::unsetenv("TMPDIR") : ::setenv("TMPDIR", before.c_str(), 1); }
  size_t count() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(directory.path()), fs::directory_iterator()));
  }
};

TEST_CASE_FIXTURE(Place, "scratch directory: goes with all that is in it") {
  std::optional<ScratchDirectory> scratch(std::in_place);
  CHECK(scratch->path().parent_path() == directory.path());
  fs::create_directories(scratch->path() / "a" / "b");
  std::ofstream(scratch->path() / "a" / "file") << "text";
  const ScratchDirectory other;
  CHECK(count() == 2);
  scratch.reset();
  CHECK(count() == 1);
  CHECK(fs::is_directory(other.path()));
}

TEST_CASE_FIXTURE(Place, "scratch directory: what a killed process left goes with the next one, what is used stays") {
  const pid_t child = ::fork();
  if (child == 0) {
    const ScratchDirectory scratch;
    std::ofstream(scratch.path() / "file") << "text";
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(count() == 1);
  const ScratchDirectory first;
  CHECK(count() == 1);
  const ScratchDirectory second;
  CHECK(count() == 2);
}

TEST_CASE_FIXTURE(Place, "scratch directory: names of others are left alone") {
  fs::create_directory(directory / "damo-something");
  std::ofstream(directory / "damo-scratch-file") << "a file";
  fs::create_directory_symlink("/", directory / "damo-scratch-link");
  const ScratchDirectory scratch;
  CHECK(count() == 4);
}

TEST_CASE_FIXTURE(Place, "scratch directory: no place is a StorageError that names it") {
  ::setenv("TMPDIR", (directory / "absent").c_str(), 1);
  try {
    const ScratchDirectory scratch;
    FAIL("there is no such directory");
  } catch (const StorageError& error) {
    CHECK(std::string(error.what()).find("absent") != std::string::npos);
    CHECK(std::string(error.what()).find("TMPDIR") != std::string::npos);
  }
}

}  // namespace
}  // namespace damo
