// SPDX-License-Identifier: Apache-2.0
#include "file_lock.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <string>

#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;
using testing::TemporaryDirectory;

const FileLock::Words kWords{"/the/thing", "Handle", "file"};

// What a child process says on trying to take the lock: the error, or "locked".
std::string try_in_child(const fs::path& file) {
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::string text = "locked";
    try {
      const FileLock lock(file, kWords);
    } catch (const std::exception& error) {
      text = error.what();
    }
    [[maybe_unused]] const ssize_t wrote = ::write(ends[1], text.data(), text.size());
    ::_exit(0);
  }
  ::close(ends[1]);
  std::string text(1024, '\0');
  const ssize_t got = ::read(ends[0], text.data(), text.size());
  text.resize(got > 0 ? static_cast<size_t>(got) : 0);
  ::close(ends[0]);
  ::waitpid(child, nullptr, 0);
  return text;
}

TEST_CASE("file lock: the second one, in this process or another, is told who holds it; after unlock it may") {
  const TemporaryDirectory directory;
  const fs::path file = directory / "LOCK";
  const std::string me = "process " + std::to_string(getpid());
  FileLock lock(file, kWords);
  CHECK_THROWS_WITH_AS(
      FileLock(file, kWords),
      doctest::Contains(("/the/thing is open in this process already (" + me + "): use that Handle").c_str()),
      AlreadyOpenError);
  const std::string outside = try_in_child(file);
  CHECK(outside.starts_with("[open] /the/thing is open elsewhere: " + me + " on "));
  CHECK(outside.ends_with("; close it there, or open another file"));
  CHECK(read_file(file, 1000).starts_with(me));
  const FileLock another(directory / "another", kWords);
  lock.unlock();
  lock.unlock();
  CHECK(try_in_child(file) == "locked");
  const FileLock again(file, kWords);
  CHECK(read_file(file, 1000).starts_with(me));  // not longer than the child's text left it
}

TEST_CASE("file lock: this process is refused by every path, also when somebody has removed the file") {
  const TemporaryDirectory directory;
  fs::create_directory(directory / "d");
  fs::create_directory_symlink(directory / "d", directory / "link");
  const FileLock lock(directory / "d" / "LOCK", kWords);
  CHECK_THROWS_AS(FileLock(directory / "link" / "LOCK", kWords), AlreadyOpenError);
  fs::remove(directory / "d" / "LOCK");
  CHECK_THROWS_AS(FileLock(directory / "link" / "LOCK", kWords), AlreadyOpenError);
}

TEST_CASE("file lock: a forked child that ends takes the lock from nobody") {
  const TemporaryDirectory directory;
  FileLock lock(directory / "LOCK", kWords);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    lock.unlock();
    lock.~FileLock();
    ::_exit(0);
  }
  ::waitpid(child, nullptr, 0);
  CHECK(try_in_child(directory / "LOCK").find("open elsewhere") != std::string::npos);
}

TEST_CASE("file lock: without a directory for it the error names what is missing") {
  const TemporaryDirectory directory;
  CHECK_THROWS_WITH_AS(FileLock(directory / "absent" / "LOCK", kWords), doctest::Contains("absent"), MissingFileError);
}

}  // namespace
}  // namespace damo
