// SPDX-License-Identifier: Apache-2.0
//
// The file of a stand-alone counting Bloom filter: the counters as they were when it was written, and behind them a log
// of the adds since. docs/format.md has the bytes.
//
// Never mapped: who maps a file dies with SIGBUS when another program truncates it, or when the disk fills under a
// hole. And of a batch of adds the log takes 8 bytes a key, where writing the pages it touches would take 4 KiB a key.
//
// What survives. An append returns when its adds are in the file and the mark in its head says so: they survive the
// death of the process at any moment. A call that was cut short is there whole or not at all. After power loss: what
// was synced, plus a prefix of what followed. The mark names the boot of the machine it was written in. In the same
// boot everything up to it must be right, or the file was damaged; after another boot power may have been lost, and
// what was not synced ends at the first record that is not whole.
//
// Errors: StorageError from append: nothing was added, and the next one may succeed; but after a failed sync, or when
// another program has truncated, removed or replaced the file, all later calls fail as well.
//
// Thread safety: one thread at a time.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

#include "counting_bloom_filter.h"
#include "file.h"
#include "file_lock.h"

namespace damo {

class FilterFile {
 public:
  // Takes the lock PATH.lock and fills `filter`, which is empty. No file at `path`: makes one. A filter file: reads it,
  // or with `reload` false replaces it by an empty one, whatever its settings and even if it is damaged.
  // AlreadyOpenError; CorruptionError (file and offset; also for any other file, which `reload` false does not replace
  // either); SchemaMismatchError: of other settings. On an error the file is what it was.
  FilterFile(const std::filesystem::path& path, CountingBloomFilter& filter, bool reload);

  const std::filesystem::path& path() const noexcept { return path_; }
  uint64_t bytes() const noexcept { return end_; }

  // Logs that each of `keys` is added `num` times; the caller then adds them to the filter.
  void append(std::span<const uint64_t> keys, uint32_t num);
  // After the adds: when the log has become longer than 4 MiB and half of the counters, writes a new file without one
  // in its place. When that fails (a full disk) the old one is kept, and it is tried again when the log is twice as
  // long.
  void compact();
  // Returns when all that was appended is on the disk.
  void sync();
  // Syncs, then lets go of the file and its lock, also when the sync fails. Idempotent.
  void close();
  // Lets go without a sync.
  void abandon() noexcept;

 private:
  class Window;
  void expect_filter(const FileDescriptor& file) const;
  void read();
  void read_log(uint64_t synced, uint64_t end, bool same_boot);
  void write_new();
  void write_mark(uint64_t end, uint64_t synced) const;
  void expect_whole(const char* operation);
  uint64_t counters_end() const noexcept;
  uint64_t longest() const noexcept;  // the file's length at which it is written anew

  std::filesystem::path path_;
  CountingBloomFilter& filter_;
  std::unique_ptr<FileLock> lock_;
  FileDescriptor file_;
  uint64_t boot_;        // of this boot of the machine; 0: not known
  uint64_t end_ = 0;     // of the log
  uint64_t synced_ = 0;  // everything before it is on the disk
  bool name_synced_ = true;
  uint64_t compact_at_ = 0;  // the file's length
  std::string record_;       // kept for its memory
  std::string failure_;      // not empty: what every later call says
};

}  // namespace damo
