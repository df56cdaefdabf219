// SPDX-License-Identifier: Apache-2.0
#include "stores/rocksdb_files.h"

#include <doctest/doctest.h>
#include <rocksdb/file_system.h>

#include <fstream>

#include "temporary_directory.h"

namespace damo {
namespace {

// The manifest is written anew now and then; CURRENT names the new one by the time that this sync may fail, and RocksDB
// then takes the tables away again of which it tells.
TEST_CASE("rocksdb files: after the sync of a directory that failed no table is deleted") {
  const testing::TemporaryDirectory directory;
  const auto files = rocksdb_files(/*read_only=*/false, std::make_shared<std::atomic<bool>>(false));
  const auto make_and_delete = [&](const char* name) {
    const std::string path = directory.path() / name;
    std::ofstream(path) << "x";
    CHECK(files->DeleteFile(path, rocksdb::IOOptions(), nullptr).ok());
    return !std::filesystem::exists(path);
  };
  const auto synced = [&](const std::string& path) {
    std::unique_ptr<rocksdb::FSDirectory> opened;
    REQUIRE(files->NewDirectory(path, rocksdb::IOOptions(), &opened, nullptr).ok());
    return opened->FsyncWithDirOptions(rocksdb::IOOptions(), nullptr, rocksdb::DirFsyncOptions()).ok();
  };
  CHECK(synced(directory.path()));
  CHECK(make_and_delete("1.sst"));
  REQUIRE_FALSE(synced("/proc"));   // which knows no sync
  CHECK(make_and_delete("2.sst"));  // no manifest is concerned
  std::ofstream(directory.path() / "new") << "MANIFEST-000002";
  const std::string current = directory.path() / "CURRENT";
  REQUIRE(files->RenameFile(directory.path() / "new", current, rocksdb::IOOptions(), nullptr).ok());
  REQUIRE_FALSE(synced("/proc"));
  CHECK_FALSE(make_and_delete("2.sst"));
  CHECK(make_and_delete("3.log"));
}

}  // namespace
}  // namespace damo
