// SPDX-License-Identifier: Apache-2.0
//
// The contract of a cold tier: an ordered map from stored keys to opaque bytes.
// It knows nothing of dimensions, groups or optimizers. Writes come in sorted
// batches; a batch is durable (synced) and visible, whole, when commit()
// returns. Nothing else ever reaches the store, so whatever is in it is in
// synced table files, and the operation log may be cut below it.
//
// Thread safety: multi_get, snapshot and stats from any number of threads, beside one
// writer. Two writers at once are the caller's mistake.
//
// Errors: every failed read throws (StorageError, or CorruptionError when the
// bytes are damaged) and is never reported as an absent key. The first failed write is
// latched: each later write throws it again; reads go on.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "format.h"

namespace damo {

// Table settings a store may use; all in bytes.
struct StoreOptions {
  std::filesystem::path directory;  // created if absent; the memory store only loads a linked copy from it
  size_t cache_bytes = 32 << 20;    // block cache: data, index, filters, table builders
  size_t write_bytes = 16 << 20;    // what writers and compactions may hold
  int read_threads = 16;            // concurrent reads of one multi_get
  bool read_only = false;
  bool tolerate_damage = false;  // with read_only: opens beside a table file that cannot be opened; reading that fails
  // With read_only: all table files are opened at once and stay open, so that they can be read whatever becomes of
  // their names. StorageError when the process may not have so many files open.
  bool hold_files = false;
};

// One file of a linked copy, relative to its directory.
struct LinkedFile {
  std::string name;
  uint64_t bytes = 0;
  // crc32c as RocksDB keeps it in its manifest (standard CRC-32C, not masked); computed by us for the small files.
  uint32_t crc32c = 0;
};

// What verify() found.
struct StoreDamage {
  std::filesystem::path file;
  std::string what;
};

struct StoreStats {
  uint64_t disk_bytes = 0;  // live files
  uint64_t files = 0;
  uint64_t cache_bytes = 0;  // in use now
  uint64_t keys_read = 0;    // asked of multi_get since open
  uint64_t keys_found = 0;
  uint64_t keys_written = 0;   // puts and deletes committed since open
  uint64_t bytes_written = 0;  // by commits (not by compaction)
  uint64_t commits = 0;
};

class StoreWriter {
 public:
  virtual ~StoreWriter() = default;  // without commit(): leaves the store as it was
  // Keys strictly ascending over all puts and erases of one writer.
  virtual void put(const StoredKey& key, Bytes value) = 0;
  virtual void erase(const StoredKey& key) = 0;
  // Syncs, then makes the whole batch visible at once. An empty batch does nothing.
  virtual void commit() = 0;
};

class StoreIterator {
 public:
  virtual ~StoreIterator() = default;
  // Moves to the next entry (the first one on the first call). False at the end; throws on a read error.
  virtual bool next() = 0;
  virtual StoredKey key() const = 0;
  virtual Bytes value() const = 0;  // valid until the next call of next()
};

class StoreSnapshot {
 public:
  virtual ~StoreSnapshot() = default;
  // Entries with first <= key < last in order, as they were when the snapshot was taken.
  // `last` absent: to the end.
  virtual std::unique_ptr<StoreIterator> scan(const StoredKey& first, const std::optional<StoredKey>& last) const = 0;
};

class Store {
 public:
  // Called once for each key that is present, perhaps from several threads at once (never twice for one
  // index). `value` is valid during the call only. An exception it throws comes out of multi_get.
  using Found = std::function<void(size_t index, Bytes value)>;

  virtual ~Store() = default;
  // Keys strictly ascending. Blocks until all are read.
  virtual void multi_get(std::span<const StoredKey> keys, const Found& found) const = 0;
  virtual std::unique_ptr<StoreWriter> begin_write() = 0;
  virtual std::shared_ptr<const StoreSnapshot> snapshot() const = 0;
  // Hard-links (copies across file systems) a consistent copy of everything committed into `directory`, which
  // must not exist; every file and the directory are synced on return. StoreOptions{directory} opens it.
  virtual std::vector<LinkedFile> link_into(const std::filesystem::path& directory) = 0;
  // Entries that nobody needs any more: a compaction may leave them out, whole keys at a time, and only while there is
  // no snapshot. Called by threads of the store, perhaps several at once, until the next call or close(); must not
  // throw.
  using Disposable = std::function<bool(const StoredKey& key, Bytes value)>;
  virtual void set_disposable(Disposable disposable) = 0;
  // Rewrites everything, without what is disposable, erased or overwritten. Beside a writer; needs as much disk again
  // as is left over. Ends early, with everything as it was, when `cancelled` (unless null) becomes true.
  virtual void compact(std::atomic<bool>* cancelled) = 0;
  // Reads all files and compares their checksums; adds how many files and bytes it read. A store without files has
  // nothing to do.
  virtual std::vector<StoreDamage> verify(uint64_t& /*files*/, uint64_t& /*bytes*/) { return {}; }
  // Where reading may succeed again when it failed at `key`: the first key after it that lies in another block of some
  // file. Nothing: there is none.
  virtual std::optional<StoredKey> place_after(const StoredKey& /*key*/) const { return std::nullopt; }
  virtual StoreStats stats() const = 0;
  // The failed write after which it takes no more, with the way out; null while it does.
  virtual std::exception_ptr failure() const { return nullptr; }
  // The directory is not ours any more, and perhaps another store's: from here on nothing in it is made, renamed or
  // removed. Any thread; for good.
  virtual void forsake() noexcept {}
  // Waits for or cancels background work, in bounded time; later calls throw ClosedError. Idempotent.
  virtual void close() = 0;
};

std::unique_ptr<Store> open_memory_store(const StoreOptions& options);
std::unique_ptr<Store> open_rocksdb_store(const StoreOptions& options);
// Over `base`, which is not changed: what is written lies above it, in `memory_bytes` of memory and, when it is more,
// in a store of these options in a directory for temporary files (scratch_directory.h). It goes with the store.
std::unique_ptr<Store> open_layered_store(std::unique_ptr<Store> base, size_t memory_bytes,
                                          const StoreOptions& options);

}  // namespace damo
