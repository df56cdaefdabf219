// SPDX-License-Identifier: Apache-2.0
#include "directory.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

#include "error.h"
#include "file.h"
#include "system_faults.h"
#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;
using testing::FaultScope;
using testing::system_faults;
using testing::TemporaryDirectory;

void build_with(StorageDirectory& directory, const std::string& text) {
  directory.replace_generation([&](const fs::path& generation) { write_file_atomically(generation / "FILE", text); });
}

std::string text_of(const StorageDirectory& directory) { return read_file(directory.generation() / "FILE", 1000); }

// Every file with its bytes, LOCK left out: who holds the lock may change.
std::map<std::string, std::string> contents(const fs::path& path) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(path)) {
    const std::string name = fs::relative(entry.path(), path);
    if (name != "LOCK") files[name] = entry.is_directory() ? "(directory)" : read_file(entry.path(), 100000);
  }
  return files;
}

// Runs `body` in a forked child and returns the text it returns.
std::string in_child(const std::function<std::string()>& body) {
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::string text;
    try {
      text = body();
    } catch (const AlreadyOpenError& error) {
      text = std::string("AlreadyOpenError ") + error.what();
    } catch (const std::exception& error) {
      text = error.what();
    }
    [[maybe_unused]] const ssize_t wrote = ::write(ends[1], text.data(), text.size());
    ::_exit(0);
  }
  ::close(ends[1]);
  std::string text(4096, '\0');
  size_t size = 0;
  for (ssize_t got; (got = ::read(ends[0], text.data() + size, text.size() - size)) > 0;)
    size += static_cast<size_t>(got);
  text.resize(size);
  ::close(ends[0]);
  ::waitpid(child, nullptr, 0);
  return text;
}

TEST_CASE("directory: made when absent or empty, then opened with what was built in it") {
  const TemporaryDirectory directory;
  for (const bool exists : {false, true}) {
    const fs::path path = directory / (exists ? "empty" : "absent");
    if (exists) fs::create_directory(path);
    {
      StorageDirectory storage(path, OpenMode::kOpenOrCreate);
      CHECK(storage.is_new());
      CHECK(storage.path() == path);
      build_with(storage, "first");
      CHECK_FALSE(storage.is_new());
      CHECK(text_of(storage) == "first");
    }
    StorageDirectory storage(path, OpenMode::kOpen);
    CHECK_FALSE(storage.is_new());
    CHECK(text_of(storage) == "first");
    CHECK(storage.generation().filename() == "generation-000001");
    CHECK_FALSE(fs::exists(path / "CREATING"));
  }
}

TEST_CASE("directory: open wants a storage, create wants none; both say the way out") {
  const TemporaryDirectory directory;
  CHECK_THROWS_WITH_AS(StorageDirectory(directory / "absent", OpenMode::kOpen),
                       doctest::Contains("does not exist: create it"), StorageError);
  CHECK_FALSE(fs::exists(directory / "absent"));
  fs::create_directory(directory / "empty");
  CHECK_THROWS_WITH_AS(StorageDirectory(directory / "empty", OpenMode::kOpen), doctest::Contains("is empty: create"),
                       StorageError);
  CHECK(fs::is_empty(directory / "empty"));
  {
    StorageDirectory storage(directory / "made", OpenMode::kCreate);
    build_with(storage, "x");
  }
  CHECK_THROWS_WITH_AS(StorageDirectory(directory / "made", OpenMode::kCreate),
                       doctest::Contains("is a storage already"), StorageError);
  write_file_atomically(directory / "file", std::string_view("text"));
  CHECK_THROWS_WITH_AS(StorageDirectory(directory / "file", OpenMode::kOpenOrCreate),
                       doctest::Contains("not a directory"), StorageError);
  CHECK_THROWS_AS(StorageDirectory(directory / "no" / "parent", OpenMode::kOpenOrCreate), StorageError);
}

TEST_CASE("directory: a second open in the process is refused by any name of the directory; after unlock it is not") {
  const TemporaryDirectory directory;
  StorageDirectory storage(directory / "s", OpenMode::kOpenOrCreate);
  build_with(storage, "x");
  fs::create_directory_symlink(directory / "s", directory / "link");
  for (const fs::path& path : {directory / "s", directory / "link", directory / "s" / ".." / "s"})
    CHECK_THROWS_WITH_AS(StorageDirectory(path, OpenMode::kOpenOrCreate),
                         doctest::Contains(("process " + std::to_string(getpid())).c_str()), AlreadyOpenError);
  // What was refused took nothing away: a process outside still finds the lock held.
  const std::string outside = in_child([&] {
    StorageDirectory second(directory / "s", OpenMode::kOpen);
    return std::string("opened");
  });
  CHECK(outside.starts_with("AlreadyOpenError"));
  storage.unlock();
  storage.unlock();
  StorageDirectory again(directory / "s", OpenMode::kOpen);
  CHECK(text_of(again) == "x");
}

TEST_CASE("directory: a forked child is refused and told the holder; ending it takes the parent's lock from nobody") {
  const TemporaryDirectory directory;
  StorageDirectory storage(directory / "s", OpenMode::kOpenOrCreate);
  build_with(storage, "x");
  const auto try_open = [&] {
    StorageDirectory second(directory / "s", OpenMode::kOpen);
    return std::string("opened");
  };
  const std::string refused = in_child([&] {
    storage.unlock();  // not the child's to give up
    return try_open();
  });
  CHECK(refused.find("AlreadyOpenError") == 0);
  CHECK(refused.find("process " + std::to_string(getpid()) + " on ") != std::string::npos);
  CHECK(refused.find(" since ") != std::string::npos);
  CHECK(in_child(try_open).starts_with("AlreadyOpenError"));
  storage.unlock();
  CHECK(in_child(try_open) == "opened");
}

TEST_CASE("directory: a lock whose holder died is free") {
  const TemporaryDirectory directory;
  const std::string made = in_child([&] {
    auto* storage =
        new StorageDirectory(directory / "s", OpenMode::kOpenOrCreate);  // never closed: the child just ends
    build_with(*storage, "by the child");
    return std::string("made");
  });
  REQUIRE(made == "made");
  CHECK(fs::exists(directory / "s" / "LOCK"));
  StorageDirectory storage(directory / "s", OpenMode::kOpen);
  CHECK(text_of(storage) == "by the child");
}

TEST_CASE("directory: whoever finds it being made waits for nobody, and takes what was made meanwhile as it is") {
  // Two processes may both find it empty; the second gets the lock only after the first made a storage and closed it.
  const TemporaryDirectory directory;
  fs::create_directory(directory / "s");
  {
    StorageDirectory first(directory / "s", OpenMode::kOpenOrCreate);
    CHECK(in_child([&] {
            StorageDirectory second(directory / "s", OpenMode::kOpenOrCreate);
            return std::string("opened");
          }).starts_with("AlreadyOpenError"));
    build_with(first, "first");
  }
  StorageDirectory second(directory / "s", OpenMode::kOpenOrCreate);
  CHECK_FALSE(second.is_new());
}

TEST_CASE("directory: a creation that was interrupted at any step starts again") {
  // What the directory holds after each step of a creation.
  using Step = std::function<void(const fs::path&)>;
  const std::vector<Step> steps{
      [](const fs::path& path) { fs::create_directory(path); },
      [](const fs::path& path) { write_file_atomically(path / "LOCK", std::string_view("process 1")); },
      [](const fs::path& path) { write_file_atomically(path / "CREATING", std::string_view()); },
      [](const fs::path& path) { fs::create_directory(path / "generation-000001"); },
      [](const fs::path& path) {
        write_file_atomically(path / "generation-000001" / "FILE", std::string_view("half"));
      },
      [](const fs::path& path) { write_file_atomically(path / "CURRENT.tmp", std::string_view("generation-0")); },
  };
  for (size_t done = 1; done <= steps.size(); ++done) {
    const TemporaryDirectory directory;
    const fs::path path = directory / "s";
    for (size_t i = 0; i < done; ++i) steps[i](path);
    CHECK_THROWS_AS(StorageDirectory(path, OpenMode::kOpen), StorageError);
    StorageDirectory storage(path, done % 2 == 0 ? OpenMode::kCreate : OpenMode::kOpenOrCreate);
    CHECK(storage.is_new());
    build_with(storage, "whole");
    CHECK(text_of(storage) == "whole");
    size_t generations = 0;
    for (const auto& entry : fs::directory_iterator(path))
      generations += entry.path().filename().string().starts_with("generation-");
    CHECK(generations == 1);
    CHECK_FALSE(fs::exists(path / "CREATING"));
  }
}

TEST_CASE("directory: a creation interrupted after its last step but one is a storage") {
  const TemporaryDirectory directory;
  {
    StorageDirectory storage(directory / "s", OpenMode::kCreate);
    build_with(storage, "whole");
  }
  write_file_atomically(directory / "s" / "CREATING", std::string_view());
  CHECK_THROWS_AS(StorageDirectory(directory / "s", OpenMode::kCreate), StorageError);
  StorageDirectory storage(directory / "s", OpenMode::kOpen);
  CHECK_FALSE(storage.is_new());
  CHECK(text_of(storage) == "whole");
  CHECK_FALSE(fs::exists(directory / "s" / "CREATING"));
}

TEST_CASE("directory: every truncation and flipped byte of CURRENT is CorruptionError that names it") {
  const TemporaryDirectory directory;
  StorageDirectory storage(directory / "s", OpenMode::kCreate);
  build_with(storage, "whole");
  const fs::path current = directory / "s" / "CURRENT";
  const std::string good = read_file(current, 1000);
  const auto refused = [&](const std::string& text) {
    write_file_atomically(current, text);
    CAPTURE(text);
    CHECK_THROWS_WITH_AS(storage.generation(), doctest::Contains("CURRENT"), CorruptionError);
  };
  for (size_t size = 0; size < good.size(); ++size) refused(good.substr(0, size));
  refused(good + "\n");
  refused(good + std::string(1000, 'x'));
  for (size_t at = 0; at < good.size(); ++at) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 1);
    refused(bad);
  }
  write_file_atomically(current, good);
  CHECK_NOTHROW(storage.generation());
  fs::rename(directory / "s" / "generation-000001", directory / "s" / "generation-000002");
  CHECK_THROWS_WITH_AS(storage.generation(), doctest::Contains("does not exist"), CorruptionError);
}

TEST_CASE("directory: a storage without CURRENT is damaged, not new, and is left as it is") {
  const TemporaryDirectory directory;
  {
    StorageDirectory storage(directory / "s", OpenMode::kCreate);
    build_with(storage, "whole");
  }
  fs::remove(directory / "s" / "CURRENT");
  const auto before = contents(directory / "s");
  for (const OpenMode mode : {OpenMode::kOpen, OpenMode::kCreate, OpenMode::kOpenOrCreate})
    CHECK_THROWS_WITH_AS(StorageDirectory(directory / "s", mode), doctest::Contains("lost its file CURRENT"),
                         CorruptionError);
  CHECK(contents(directory / "s") == before);
}

TEST_CASE("directory: a directory with other files is refused and left as it is") {
  const TemporaryDirectory directory;
  fs::create_directory(directory / "photos");
  write_file_atomically(directory / "photos" / "cat.jpg", std::string_view("meow"));
  for (const OpenMode mode : {OpenMode::kOpen, OpenMode::kCreate, OpenMode::kOpenOrCreate})
    CHECK_THROWS_WITH_AS(StorageDirectory(directory / "photos", mode), doctest::Contains("is not a storage"),
                         StorageError);
  CHECK(fs::exists(directory / "photos" / "cat.jpg"));
  CHECK_FALSE(fs::exists(directory / "photos" / "LOCK"));
  CHECK_FALSE(fs::exists(directory / "photos" / "CREATING"));
}

TEST_CASE("directory: a generation is replaced whole, and the one before goes") {
  const TemporaryDirectory directory;
  StorageDirectory storage(directory / "s", OpenMode::kCreate);
  for (int i = 1; i <= 3; ++i) {
    build_with(storage, std::to_string(i));
    CHECK(text_of(storage) == std::to_string(i));
    CHECK(storage.generation().filename() == "generation-00000" + std::to_string(i));
    CHECK_FALSE(fs::exists(directory / "s" / ("generation-00000" + std::to_string(i - 1))));
  }
}

TEST_CASE("directory: a replacement whose building fails changes nothing, at its start or half-way") {
  const TemporaryDirectory directory;
  StorageDirectory storage(directory / "s", OpenMode::kCreate);
  const auto fail = [&](bool half) {
    CHECK_THROWS_AS(storage.replace_generation([&](const fs::path& generation) {
      CHECK(fs::is_empty(generation));
      if (half) write_file_atomically(generation / "FILE", std::string_view("half"));
      throw std::domain_error("failed");
    }),
                    std::domain_error);
  };
  fail(true);
  CHECK(storage.is_new());
  build_with(storage, "whole");
  const auto before = contents(directory / "s");
  fail(false);
  fail(true);
  CHECK(contents(directory / "s") == before);
  CHECK(text_of(storage) == "whole");
}

TEST_CASE("directory: a replacement whose switch cannot be made durable is whole, before or after") {
  const TemporaryDirectory directory;
  const FaultScope faults;
  StorageDirectory storage(directory / "s", OpenMode::kCreate);
  build_with(storage, "before");
  bool threw = false;
  try {
    storage.replace_generation([&](const fs::path& generation) {
      write_file_atomically(generation / "FILE", std::string_view("after"));
      system_faults.fsync_directory_error = EIO;
    });
  } catch (const StorageError&) {
    threw = true;
  }
  system_faults.clear();
  CHECK(threw);
  const std::string text = text_of(storage);
  CHECK((text == "before" || text == "after"));
}

TEST_CASE("directory: generations that an interrupted restore left are removed, the live one stays") {
  const TemporaryDirectory directory;
  StorageDirectory storage(directory / "s", OpenMode::kCreate);
  build_with(storage, "live");
  fs::create_directories(directory / "s" / "generation-000009" / "rocksdb");
  write_file_atomically(directory / "s" / "generation-000009" / "rocksdb" / "x", std::string_view("left"));
  storage.remove_stale_generations();
  CHECK_FALSE(fs::exists(directory / "s" / "generation-000009"));
  CHECK(text_of(storage) == "live");
  // And a new one never takes the number of one that is there.
  fs::create_directory(directory / "s" / "generation-000041");
  build_with(storage, "next");
  CHECK(storage.generation().filename() == "generation-000042");
}

}  // namespace
}  // namespace damo
