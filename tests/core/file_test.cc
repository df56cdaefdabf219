// SPDX-License-Identifier: Apache-2.0
#include "file.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

using testing::TemporaryDirectory;

Bytes as_bytes(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

TEST_CASE("file: an atomic write creates, replaces and leaves no temporary file") {
  TemporaryDirectory directory;
  const auto path = directory / "CURRENT";
  write_file_atomically(path, "first");
  CHECK(read_file(path, 100) == "first");
  write_file_atomically(path, as_bytes("second, longer"));
  CHECK(read_file(path, 100) == "second, longer");
  write_file_atomically(path, "");
  CHECK(read_file(path, 100).empty());
  CHECK(std::distance(std::filesystem::directory_iterator(directory.path()), {}) == 1);
}

TEST_CASE("file: an atomic write overwrites the leftover of one that died") {
  TemporaryDirectory directory;
  write_file_atomically(directory / "x.tmp", "left by a killed process, longer than what comes");
  write_file_atomically(directory / "x", "new");
  CHECK(read_file(directory / "x", 100) == "new");
  CHECK_FALSE(std::filesystem::exists(directory / "x.tmp"));
}

TEST_CASE("file: an atomic write that fails leaves the old file and nothing else") {
  TemporaryDirectory directory;
  const auto path = directory / "MANIFEST";
  write_file_atomically(path, "old");

  // A file may not grow past 4 KiB: write(2) then fails with EFBIG, once SIGXFSZ is ignored.
  struct rlimit before {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = ::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small { 4096, before.rlim_max };
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  const std::string message = message_of([&] { write_file_atomically(path, std::string(10000, 'x')); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  ::signal(SIGXFSZ, handler);

  CHECK(message == "[write] " + path.string() + ".tmp: File too large");
  CHECK(read_file(path, 100) == "old");
  CHECK(std::distance(std::filesystem::directory_iterator(directory.path()), {}) == 1);
}

TEST_CASE("file: a missing file is told apart from one that cannot be read") {
  TemporaryDirectory directory;
  CHECK_THROWS_AS(read_file(directory / "absent", 10), MissingFileError);
  CHECK_THROWS_AS(read_file(directory / "absent/file", 10), MissingFileError);
  CHECK_THROWS_AS(fsync_file(directory / "absent"), MissingFileError);
  CHECK_THROWS_AS(fsync_directory(directory / "absent"), MissingFileError);
  CHECK_THROWS_AS(crc32c_of_file(directory / "absent"), MissingFileError);
  CHECK_THROWS_AS(link_or_copy(directory / "absent", directory / "b"), MissingFileError);
  CHECK_THROWS_AS(write_file_atomically(directory / "absent/file", "x"), MissingFileError);
  CHECK(message_of([&] { read_file(directory / "absent", 10); }) ==
        "[read] " + (directory / "absent").string() + ": No such file or directory");

  // A directory opens but does not read: an error, and not "missing".
  const std::string message = message_of([&] { read_file(directory.path(), 1 << 20); });
  CHECK(message == "[read] " + directory.path().string() + ": Is a directory");
  bool missing = false;
  try {
    read_file(directory.path(), 1 << 20);
  } catch (const MissingFileError&) {
    missing = true;
  } catch (const StorageError&) {
  }
  CHECK_FALSE(missing);
}

TEST_CASE("file: reading stops at the limit with CorruptionError") {
  TemporaryDirectory directory;
  write_file_atomically(directory / "x", "12345");
  CHECK(read_file(directory / "x", 5) == "12345");
  CHECK(read_file(directory / "x", SIZE_MAX) == "12345");
  CHECK_THROWS_AS(read_file(directory / "x", 4), CorruptionError);
  CHECK_THROWS_AS(read_file(directory / "x", 0), CorruptionError);
}

TEST_CASE("file: a file whose length the system does not tell is read whole") {
  // /proc reports length 0.
  CHECK(read_file("/proc/self/status", 1 << 20).starts_with("Name:"));
  CHECK_THROWS_AS(read_file("/proc/self/status", 3), CorruptionError);
}

TEST_CASE("file: a directory is created once, with its parent there") {
  TemporaryDirectory directory;
  make_directory(directory / "a");
  CHECK(std::filesystem::is_directory(directory / "a"));
  CHECK_THROWS_AS(make_directory(directory / "a"), StorageError);
  CHECK_THROWS_AS(make_directory(directory / "b/c"), MissingFileError);
  make_directory(directory / "d/");  // a trailing slash names the same directory
  CHECK(std::filesystem::is_directory(directory / "d"));
}

TEST_CASE("file: reads and writes at an offset, in a moved descriptor") {
  TemporaryDirectory directory;
  FileDescriptor opened("create", directory / "x", O_RDWR | O_CREAT | O_EXCL);
  FileDescriptor file = std::move(opened);
  CHECK_FALSE(opened.is_open());
  file.write(as_bytes("hello world"));
  file.write_at(as_bytes("W"), 6);
  CHECK(file.bytes() == 11);
  std::string text(8, '?');
  CHECK(file.read_at(std::as_writable_bytes(std::span(text)), 6) == 5);
  CHECK(text == "World???");
  file.truncate(5);
  file.sync();
  file.sync_data();
  CHECK(file.bytes() == 5);
  CHECK((::fcntl(file.get(), F_GETFD) & FD_CLOEXEC) != 0);
  file.close();
  file.close();
  CHECK_FALSE(file.is_open());
  CHECK(read_file(directory / "x", 10) == "hello");
}

TEST_CASE("file: a link shares the file and refuses an existing name") {
  TemporaryDirectory directory;
  write_file_atomically(directory / "a", "data");
  CHECK(link_or_copy(directory / "a", directory / "b"));
  CHECK(std::filesystem::equivalent(directory / "a", directory / "b"));
  CHECK_THROWS_AS(link_or_copy(directory / "a", directory / "b"), StorageError);
  CHECK(read_file(directory / "b", 10) == "data");
}

TEST_CASE("file: across file systems the link is a copy") {
  TemporaryDirectory directory;
  const std::filesystem::path other = "/dev/shm";
  struct stat here {
  }, there{};
  if (::stat(directory.path().c_str(), &here) != 0 || ::stat(other.c_str(), &there) != 0 ||
      here.st_dev == there.st_dev || ::access(other.c_str(), W_OK) != 0) {
    MESSAGE("skipped: no second file system to write to");
    return;
  }
  std::string text(3 << 20, 'x');
  for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * 2654435761u >> 24);
  write_file_atomically(directory / "a", text);
  const auto to = other / directory.path().filename();
  CHECK_FALSE(link_or_copy(directory / "a", to));
  CHECK(read_file(to, 4 << 20) == text);
  CHECK_THROWS_AS(link_or_copy(directory / "a", to), StorageError);  // exists now; must not be removed by the failure
  CHECK(std::filesystem::remove(to));
}

TEST_CASE("file: a directory is listed whole; what is not one says so") {
  TemporaryDirectory directory;
  const fs::path root = directory / "root";
  CHECK_THROWS_AS(list_directory("look", root), MissingFileError);
  make_directory(root);
  CHECK(list_directory("look", root).empty());
  std::vector<fs::path> expected;
  for (const char* name : {".hidden", "a", "b"}) {
    write_file_atomically(root / name, "");
    expected.push_back(root / name);
  }
  std::vector<fs::path> found = list_directory("look", root);
  std::sort(found.begin(), found.end());
  CHECK(found == expected);
  CHECK_THROWS_AS(list_directory("look", root / "a"), StorageError);
}

TEST_CASE("file: a tree is removed with all below it, and no link is followed") {
  TemporaryDirectory directory;
  const fs::path root = directory / "root", beside = directory / "beside";
  fs::create_directories(root / "one" / "two");
  make_directory(beside);
  for (const fs::path& path : {root / "a", root / "one" / "b", root / "one" / "two" / "c", beside / "kept"})
    write_file_atomically(path, "text");
  fs::create_directory_symlink(beside, root / "one" / "link");
  remove_tree("remove", root);
  CHECK_FALSE(fs::exists(root));
  CHECK(fs::exists(beside / "kept"));
  CHECK_NOTHROW(remove_tree("remove", root));
  remove_tree("remove", beside / "kept");
  CHECK_FALSE(fs::exists(beside / "kept"));
  write_file_atomically(beside / "file", "text");
  CHECK_THROWS_AS(remove_tree("remove", beside / "file" / "below"), MissingFileError);
  CHECK_NOTHROW(try_to_remove_tree(beside / "file" / "below"));
}

TEST_CASE("file: CRC-32C has its published check values") {
  CHECK(crc32c(as_bytes("123456789")) == 0xe3069283u);
  CHECK(crc32c(as_bytes("")) == 0);
  CHECK(crc32c(as_bytes(std::string(32, '\0'))) == 0x8a9136aau);    // RFC 3720, B.4
  CHECK(crc32c(as_bytes(std::string(32, '\xff'))) == 0x62a8ab43u);  // the same
}

TEST_CASE("file: CRC-32C is the same by instruction and by table, in pieces and whole") {
  std::string text(1000, '\0');
  for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * 2654435761u >> 24);
  for (size_t size = 0; size < text.size(); size += 7) {
    const Bytes bytes = as_bytes(text).subspan(0, size);
    const uint32_t whole = crc32c(bytes);
    CHECK(detail::crc32c_portable(bytes, 0) == whole);
    CHECK(crc32c(bytes.subspan(size / 3), crc32c(bytes.first(size / 3))) == whole);
  }
  TemporaryDirectory directory;
  write_file_atomically(directory / "x", text);
  CHECK(crc32c_of_file(directory / "x") == crc32c(as_bytes(text)));
}

TEST_CASE("sync_name: what stands in a directory of another file system is a mount, and has no name to sync") {
  CHECK_NOTHROW(sync_name("/proc"));
  CHECK_THROWS_AS(sync_name("/proc/self"), StorageError);  // /proc knows no sync
  const testing::TemporaryDirectory directory;
  CHECK_NOTHROW(sync_name(directory.path()));
  CHECK_THROWS(sync_name(directory / "absent"));
}

}  // namespace
}  // namespace damo
