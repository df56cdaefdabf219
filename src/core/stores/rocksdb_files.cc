// SPDX-License-Identifier: Apache-2.0
#include "rocksdb_files.h"

#include <rocksdb/file_system.h>

#include <cstddef>
#include <exception>
#include <filesystem>
#include <string>
#include <utility>

#include "../error.h"
#include "../format.h"
#include "table_tail.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;

// RocksDB believes a table's properties before it verifies them, and the builds of distributions, which have
// assertions, end the process over some of what a flipped bit makes of them. So no table is opened whose tail is
// damaged.
class TableChecks final : public rocksdb::FileSystemWrapper {
 public:
  explicit TableChecks(const std::shared_ptr<rocksdb::FileSystem>& system) : FileSystemWrapper(system) {}

  const char* Name() const override { return "damo.TableChecks"; }
  IOStatus NewRandomAccessFile(const std::string& path, const rocksdb::FileOptions& options,
                               std::unique_ptr<rocksdb::FSRandomAccessFile>* file, IODebugContext* debug) override {
    std::unique_ptr<rocksdb::FSRandomAccessFile> opened;
    IOStatus status = target()->NewRandomAccessFile(path, options, &opened, debug);
    if (!status.ok()) return status;
    if (path.ends_with(".sst") && !(status = check(path, *opened, debug)).ok()) return status;
    *file = std::move(opened);
    return status;
  }

 private:
  IOStatus check(const std::string& path, const rocksdb::FSRandomAccessFile& file, IODebugContext* debug) const {
    uint64_t bytes = 0;
    IOStatus status = target()->GetFileSize(path, IOOptions(), &bytes, debug);
    if (!status.ok()) return status;
    const auto read = [&](uint64_t offset, size_t size, std::string& into) {
      into.resize(size);
      rocksdb::Slice got;
      status = file.Read(offset, size, IOOptions(), &got, into.data(), debug);
      if (!status.ok()) throw StorageError(status.ToString());
      into.assign(got.data(), got.size());
    };
    try {
      check_table_tail(path, bytes, read);
    } catch (const CorruptionError& damaged) {
      return IOStatus::Corruption(damaged.what());
    } catch (const std::exception& failed) {
      if (status.ok()) return IOStatus::IOError(failed.what());  // no memory
    }
    return status;
  }
};

// RocksDB takes the tables of an ingestion away again when its manifest, or the name of a new one, could not be written
// or synced. But the record
// of them may have reached the manifest all the same, and then the next open would miss them. So after the first such
// failure no table is deleted any more; the next open removes those that the manifest does not know.
//
// And the names in a directory may become another store's, when somebody removes it and makes a new one there.
// Compactions, and the close, which removes what it does not know, then leave them alone (Store::forsake).
class TableKeeper final : public rocksdb::FileSystemWrapper {
 public:
  using Flag = std::shared_ptr<std::atomic<bool>>;

  TableKeeper(const std::shared_ptr<rocksdb::FileSystem>& system, Flag forsaken)
      : FileSystemWrapper(system), forsaken_(std::move(forsaken)) {}

  const char* Name() const override { return "damo.TableKeeper"; }
  IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                           std::unique_ptr<rocksdb::FSWritableFile>* file, IODebugContext* debug) override {
    if (*forsaken_) return refused(path);
    IOStatus status = target()->NewWritableFile(path, options, file, debug);
    if (status.ok() && fs::path(path).filename().string().starts_with("MANIFEST-"))
      *file = std::make_unique<ManifestFile>(std::move(*file), uncertain_);
    return status;
  }
  IOStatus DeleteFile(const std::string& path, const IOOptions& options, IODebugContext* debug) override {
    if (*forsaken_ || (*uncertain_ && path.ends_with(".sst"))) return IOStatus::OK();
    return target()->DeleteFile(path, options, debug);
  }
  IOStatus RenameFile(const std::string& from, const std::string& to, const IOOptions& options,
                      IODebugContext* debug) override {
    if (*forsaken_) return refused(to);
    const bool names_manifest = fs::path(to).filename() == "CURRENT";
    if (names_manifest) *unnamed_ = true;
    const IOStatus status = target()->RenameFile(from, to, options, debug);
    if (names_manifest && !status.ok()) *uncertain_ = true;
    return status;
  }
  IOStatus NewDirectory(const std::string& path, const IOOptions& options,
                        std::unique_ptr<rocksdb::FSDirectory>* directory, IODebugContext* debug) override {
    IOStatus status = target()->NewDirectory(path, options, directory, debug);
    if (status.ok()) *directory = std::make_unique<Directory>(std::move(*directory), *this);
    return status;
  }
  IOStatus LinkFile(const std::string& from, const std::string& to, const IOOptions& options,
                    IODebugContext* debug) override {
    return *forsaken_ ? refused(to) : target()->LinkFile(from, to, options, debug);
  }

 private:
  static IOStatus refused(const std::string& path) {
    return IOStatus::IOError(path, "the directory was removed or replaced");
  }

  // CURRENT names a new manifest by the time that the sync of its name fails.
  class Directory final : public rocksdb::FSDirectoryWrapper {
   public:
    Directory(std::unique_ptr<rocksdb::FSDirectory>&& directory, const TableKeeper& keeper)
        : FSDirectoryWrapper(std::move(directory)), uncertain_(keeper.uncertain_), unnamed_(keeper.unnamed_) {}

    IOStatus Fsync(const IOOptions& options, IODebugContext* debug) override {
      return noted(FSDirectoryWrapper::Fsync(options, debug));
    }
    IOStatus FsyncWithDirOptions(const IOOptions& options, IODebugContext* debug,
                                 const rocksdb::DirFsyncOptions& how) override {
      return noted(FSDirectoryWrapper::FsyncWithDirOptions(options, debug, how));
    }

   private:
    IOStatus noted(IOStatus status) const {
      if (status.ok())
        *unnamed_ = false;
      else if (*unnamed_)
        *uncertain_ = true;
      return status;
    }
    const Flag uncertain_, unnamed_;
  };

  class ManifestFile final : public rocksdb::FSWritableFileOwnerWrapper {
   public:
    ManifestFile(std::unique_ptr<rocksdb::FSWritableFile>&& file, Flag uncertain)
        : FSWritableFileOwnerWrapper(std::move(file)), uncertain_(std::move(uncertain)) {}

    IOStatus Append(const rocksdb::Slice& data, const IOOptions& options, IODebugContext* debug) override {
      return noted(target()->Append(data, options, debug));
    }
    IOStatus Append(const rocksdb::Slice& data, const IOOptions& options,
                    const rocksdb::DataVerificationInfo& verification, IODebugContext* debug) override {
      return noted(target()->Append(data, options, verification, debug));
    }
    IOStatus Flush(const IOOptions& options, IODebugContext* debug) override {
      return noted(target()->Flush(options, debug));
    }
    IOStatus Sync(const IOOptions& options, IODebugContext* debug) override {
      return noted(target()->Sync(options, debug));
    }
    IOStatus Fsync(const IOOptions& options, IODebugContext* debug) override {
      return noted(target()->Fsync(options, debug));
    }
    IOStatus Close(const IOOptions& options, IODebugContext* debug) override {
      return noted(target()->Close(options, debug));
    }

   private:
    IOStatus noted(IOStatus status) const {
      if (!status.ok()) *uncertain_ = true;
      return status;
    }
    const Flag uncertain_;
  };

  const Flag forsaken_, uncertain_ = std::make_shared<std::atomic<bool>>(false);
  const Flag unnamed_ = std::make_shared<std::atomic<bool>>(false);  // CURRENT was renamed, and not synced since
};

// The file system of a store that is opened to be read: whatever this or another version of RocksDB may think of, no
// file and no directory is made, changed or removed.
class ReadOnlyFiles final : public rocksdb::FileSystemWrapper {
 public:
  explicit ReadOnlyFiles(const std::shared_ptr<rocksdb::FileSystem>& system) : FileSystemWrapper(system) {}

  const char* Name() const override { return "damo.ReadOnlyFiles"; }
  IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions&,
                           std::unique_ptr<rocksdb::FSWritableFile>*, IODebugContext*) override {
    return refused(path);
  }
  IOStatus ReopenWritableFile(const std::string& path, const rocksdb::FileOptions&,
                              std::unique_ptr<rocksdb::FSWritableFile>*, IODebugContext*) override {
    return refused(path);
  }
  IOStatus ReuseWritableFile(const std::string& path, const std::string&, const rocksdb::FileOptions&,
                             std::unique_ptr<rocksdb::FSWritableFile>*, IODebugContext*) override {
    return refused(path);
  }
  IOStatus NewRandomRWFile(const std::string& path, const rocksdb::FileOptions&,
                           std::unique_ptr<rocksdb::FSRandomRWFile>*, IODebugContext*) override {
    return refused(path);
  }
  IOStatus NewMemoryMappedFileBuffer(const std::string& path,
                                     std::unique_ptr<rocksdb::MemoryMappedFileBuffer>*) override {
    return refused(path);
  }
  IOStatus DeleteFile(const std::string& path, const IOOptions&, IODebugContext*) override { return refused(path); }
  IOStatus Truncate(const std::string& path, size_t, const IOOptions&, IODebugContext*) override {
    return refused(path);
  }
  IOStatus CreateDir(const std::string& path, const IOOptions&, IODebugContext*) override { return refused(path); }
  IOStatus CreateDirIfMissing(const std::string& path, const IOOptions&, IODebugContext*) override {
    return refused(path);
  }
  IOStatus DeleteDir(const std::string& path, const IOOptions&, IODebugContext*) override { return refused(path); }
  IOStatus RenameFile(const std::string& path, const std::string&, const IOOptions&, IODebugContext*) override {
    return refused(path);
  }
  IOStatus LinkFile(const std::string& path, const std::string&, const IOOptions&, IODebugContext*) override {
    return refused(path);
  }
  IOStatus LockFile(const std::string& path, const IOOptions&, rocksdb::FileLock**, IODebugContext*) override {
    return refused(path);
  }
  IOStatus NewLogger(const std::string& path, const IOOptions&, std::shared_ptr<rocksdb::Logger>*,
                     IODebugContext*) override {
    return refused(path);
  }

 private:
  static IOStatus refused(const std::string& path) { return IOStatus::IOError(path, "the store is open read-only"); }
};

}  // namespace

std::shared_ptr<rocksdb::FileSystem> rocksdb_files(bool read_only, std::shared_ptr<std::atomic<bool>> forsaken) {
  const auto checked = std::make_shared<TableChecks>(rocksdb::FileSystem::Default());
  if (read_only) return std::make_shared<ReadOnlyFiles>(checked);
  return std::make_shared<TableKeeper>(checked, std::move(forsaken));
}

}  // namespace damo
