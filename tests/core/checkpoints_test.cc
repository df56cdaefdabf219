// SPDX-License-Identifier: Apache-2.0
#include "checkpoints.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/file.h>

#include <string>
#include <vector>

#include "error.h"
#include "file.h"
#include "manifest.h"
#include "temporary_directory.h"

namespace damo {
namespace {

namespace fs = std::filesystem;
using testing::TemporaryDirectory;

using Id = std::array<std::byte, 16>;
const Id kOurs{std::byte{1}}, kTheirs{std::byte{2}};

CheckpointFile put(const fs::path& checkpoint, const std::string& name, const std::string& text) {
  fs::create_directories((checkpoint / name).parent_path());
  write_file_atomically(checkpoint / name, text);
  return {name, text.size(), crc32c_of_file(checkpoint / name)};
}

// What this file looks at of a checkpoint; no rows.
fs::path make(const fs::path& path, int64_t created, uint64_t sequence, const Id& id = kOurs) {
  Manifest groups;
  groups.storage_id = id;
  CheckpointManifest manifest;
  manifest.storage_id = id;
  manifest.created = created;
  manifest.counters.sequence = sequence;
  manifest.step = static_cast<int64_t>(sequence) * 10;
  manifest.files = {put(path, "MANIFEST", encode_manifest(groups)), put(path, "rocksdb/CURRENT", "MANIFEST-000001\n"),
                    put(path, "rocksdb/000001.sst", std::string(5000, 'x'))};
  write_file_atomically(path / "CHECKPOINT", encode_checkpoint(manifest));
  return path;
}

std::vector<std::string> names_of(const std::vector<CheckpointInfo>& infos) {
  std::vector<std::string> names;
  for (const CheckpointInfo& info : infos) names.push_back(info.path.filename());
  return names;
}

void flip(const fs::path& file, size_t at) {
  std::string text = read_file(file, 1 << 20);
  text[at] ^= 4;
  write_file_atomically(file, text);
}

using Names = std::vector<std::string>;

TEST_CASE("checkpoints: those of a directory are listed in the order in which they were made") {
  const TemporaryDirectory directory;
  CHECK(list_checkpoints(directory / "absent").complete.empty());
  make(directory / "z", 100, 5);
  make(directory / "a", 200, 5);
  make(directory / "m", 100, 6);
  fs::create_directory(directory / "something else");
  fs::create_directory_symlink(directory / "z", directory / "link");
  make(directory / ("half" + building_suffix(kOurs)), 300, 7);
  make(directory / ("old" + removing_suffix(kOurs)), 10, 1);
  const CheckpointList list = list_checkpoints(directory.path());
  CHECK(names_of(list.complete) == Names{"z", "m", "a"});
  CHECK(list.complete[1].step == 60);
  CHECK(list.complete[1].sequence == 6);
  CHECK(list.complete[1].storage_id == kOurs);
  CHECK(list.damaged.empty());
}

TEST_CASE("checkpoints: what is not complete is told by name with what is wrong, and never counted") {
  const TemporaryDirectory directory;
  make(directory / "whole", 1, 1);
  fs::remove(make(directory / "1 without its manifest", 2, 2) / "CHECKPOINT");
  fs::remove(make(directory / "2 without a file", 3, 3) / "rocksdb/000001.sst");
  fs::resize_file(make(directory / "3 cut off", 4, 4) / "rocksdb/000001.sst", 4999);
  flip(make(directory / "4 flipped", 5, 5) / "CHECKPOINT", 20);
  const CheckpointList list = list_checkpoints(directory.path());
  CHECK(names_of(list.complete) == Names{"whole"});
  const Names said{"has no file CHECKPOINT", "000001.sst is missing", "has 4999 bytes, expected 5000", "CHECKPOINT"};
  REQUIRE(list.damaged.size() == said.size());
  for (size_t i = 0; i < said.size(); ++i) {
    CHECK(list.damaged[i].path.filename().string().starts_with(std::to_string(i + 1)));
    CHECK(list.damaged[i].wrong.find(said[i]) != std::string::npos);
  }
}

TEST_CASE("checkpoints: verifying reads every byte, and names the file that is damaged") {
  const TemporaryDirectory directory;
  const fs::path checkpoint = make(directory / "c", 1, 1);
  CHECK(verify_checkpoint(checkpoint).counters.sequence == 1);
  for (const std::string file : {"MANIFEST", "rocksdb/CURRENT", "rocksdb/000001.sst"}) {
    for (const size_t at : {size_t{0}, static_cast<size_t>(fs::file_size(checkpoint / file)) - 1}) {
      flip(checkpoint / file, at);
      CHECK_THROWS_WITH_AS(verify_checkpoint(checkpoint), doctest::Contains(file.c_str()), CorruptionError);
      flip(checkpoint / file, at);
    }
  }
  CHECK(verify_checkpoint(checkpoint).files.size() == 3);
  CHECK_THROWS_WITH_AS(verify_checkpoint(directory.path()), doctest::Contains("is not a checkpoint"), StorageError);
}

TEST_CASE("checkpoints: the next one is the newest, also when the clock or the storage has gone back") {
  const auto made = [](int64_t created, uint64_t sequence) {
    return CheckpointInfo{.path = {}, .sequence = sequence, .created = created};
  };
  CHECK(next_created({}, 100, 5) == 100);
  CHECK(next_created({made(90, 9)}, 100, 5) == 100);
  CHECK(next_created({made(100, 4)}, 100, 5) == 100);  // told from it by its number
  CHECK(next_created({made(100, 5)}, 100, 5) == 101);
  CHECK(next_created({made(100, 9)}, 100, 5) == 101);
  CHECK(next_created({made(500, 1), made(700, 9)}, 100, 5) == 701);
  CHECK(next_created({made(500, 1), made(700, 4)}, 100, 5) == 700);
}

TEST_CASE("checkpoints: removing takes those that were named, and what crashes have left of the same lineage") {
  const TemporaryDirectory directory;
  const fs::path old = make(directory / "old", 1, 1), kept = make(directory / "kept", 2, 2);
  const fs::path crashed = make(directory / ("crashed" + building_suffix(kOurs)), 3, 3);
  const fs::path half = make(directory / ("half" + removing_suffix(kOurs)), 0, 0);
  const fs::path theirs = make(directory / ("theirs" + building_suffix(kTheirs)), 3, 3, kTheirs);
  const fs::path being_built = make(directory / ("now" + building_suffix(kOurs)), 4, 4);
  const FileDescriptor builder("lock", being_built, O_RDONLY | O_DIRECTORY);
  REQUIRE(::flock(builder.get(), LOCK_EX | LOCK_NB) == 0);
  const CheckpointList list = list_checkpoints(directory.path());
  CHECK(names_of(list.complete) == Names{"old", "kept"});
  CHECK(remove_checkpoints(directory.path(), kOurs, {list.complete[0]}).empty());
  CHECK_FALSE(fs::exists(old));
  CHECK_FALSE(fs::exists(crashed));
  CHECK_FALSE(fs::exists(half));
  CHECK(fs::exists(kept));
  CHECK(fs::exists(theirs));
  CHECK(fs::exists(being_built));
  size_t left = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(directory.path())) ++left;
  CHECK(left == 3);
}

TEST_CASE("checkpoints: what cannot be removed is told, and is no reason to leave the others") {
  const TemporaryDirectory directory;
  write_file_atomically(directory / "file", "no directory");
  const CheckpointInfo refused{.path = directory / "file" / "below"};
  const CheckpointInfo gone{.path = directory / "gone"};  // another has removed it: that is what was wanted
  const CheckpointInfo there{.path = make(directory / "there", 1, 1)};
  const std::vector<std::string> problems = remove_checkpoints(directory.path(), kOurs, {refused, gone, there});
  REQUIRE(problems.size() == 1);
  CHECK(problems[0].find("below") != std::string::npos);
  CHECK_FALSE(fs::exists(directory / "there"));
}

}  // namespace
}  // namespace damo
