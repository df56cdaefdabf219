// SPDX-License-Identifier: Apache-2.0
//
// The plain store: a sorted map. For tests, small tables, and as the oracle of
// the RocksDB store. Nothing outlives the process but the copies link_into
// makes: one file, which open_memory_store loads when the directory has it.
#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <utility>

#include "../error.h"
#include "../file.h"
#include "../store.h"

namespace damo {
namespace {

constexpr char kCopyName[] = "entries";
constexpr uint64_t kCopyMagic = 0x317970636f6d6164;  // "damocpy1"; part of the persistent format

Bytes bytes_of(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

struct Map {
  std::map<StoredKey, std::string> entries;
  size_t snapshots = 0;  // while there are any, a commit changes a copy
};

// What store, writers and snapshots share: each may be the last one left.
struct State {
  bool read_only = false;
  mutable std::shared_mutex mutex;  // protects what follows, and Map
  std::shared_ptr<Map> map = std::make_shared<Map>();
  bool closed = false;
  StoreStats stats;
  // Counted by readers, who hold the mutex shared.
  std::atomic<uint64_t> keys_read{0}, keys_found{0};

  void check_open(std::string_view operation) const {
    if (closed) throw ClosedError("[" + std::string(operation) + "] the memory store is closed");
  }
  template <class Lock>
  Lock enter(std::string_view operation) const {
    Lock lock(mutex);
    check_open(operation);
    return lock;
  }
  auto enter_shared(std::string_view operation) const { return enter<std::shared_lock<std::shared_mutex>>(operation); }
  auto enter_alone(std::string_view operation) const { return enter<std::unique_lock<std::shared_mutex>>(operation); }
};

class MemoryWriter final : public StoreWriter {
 public:
  explicit MemoryWriter(std::shared_ptr<State> state) : state_(std::move(state)) {}

  void put(const StoredKey& key, Bytes value) override {
    check("put", key);
    changes_.emplace_back(key, std::string(reinterpret_cast<const char*>(value.data()), value.size()));
  }
  void erase(const StoredKey& key) override {
    check("erase", key);
    changes_.emplace_back(key, std::nullopt);
  }

  void commit() override {
    const auto lock = state_->enter_alone("commit");
    if (std::exchange(committed_, true)) throw std::invalid_argument("[commit] this batch is committed already");
    if (changes_.empty()) return;
    auto map = state_->map;
    if (map->snapshots > 0) {
      map = std::make_shared<Map>(*map);
      map->snapshots = 0;
    }
    for (auto& [key, value] : changes_) {
      if (value) {
        state_->stats.bytes_written += StoredKey::kBytes + value->size();
        map->entries.insert_or_assign(key, std::move(*value));
      } else {
        state_->stats.bytes_written += StoredKey::kBytes;
        map->entries.erase(key);
      }
    }
    state_->stats.keys_written += changes_.size();
    ++state_->stats.commits;
    state_->map = std::move(map);
  }

 private:
  void check(const char* operation, const StoredKey& key) const {
    state_->enter_shared(operation);
    if (committed_) throw std::invalid_argument("[" + std::string(operation) + "] this batch is committed already");
    if (!changes_.empty() && key <= changes_.back().first)
      throw std::invalid_argument("[" + std::string(operation) + "] keys of a batch must be strictly ascending");
  }

  std::shared_ptr<State> state_;
  std::vector<std::pair<StoredKey, std::optional<std::string>>> changes_;
  bool committed_ = false;
};

class MemorySnapshot;

class MemoryIterator final : public StoreIterator {
 public:
  MemoryIterator(std::shared_ptr<const MemorySnapshot> snapshot, const StoredKey& first,
                 const std::optional<StoredKey>& last);
  bool next() override;
  StoredKey key() const override { return at_->first; }
  Bytes value() const override { return bytes_of(at_->second); }

 private:
  std::shared_ptr<const MemorySnapshot> snapshot_;  // keeps the map unchanged
  std::map<StoredKey, std::string>::const_iterator at_, end_;
  bool started_ = false;
};

class MemorySnapshot final : public StoreSnapshot, public std::enable_shared_from_this<MemorySnapshot> {
 public:
  explicit MemorySnapshot(std::shared_ptr<State> state) : state_(std::move(state)) {
    const auto lock = state_->enter_alone("snapshot");
    map_ = state_->map;
    ++map_->snapshots;
  }
  ~MemorySnapshot() override {
    const std::lock_guard lock(state_->mutex);
    --map_->snapshots;
  }
  std::unique_ptr<StoreIterator> scan(const StoredKey& first, const std::optional<StoredKey>& last) const override {
    state_->enter_shared("scan");
    return std::make_unique<MemoryIterator>(shared_from_this(), first, last);
  }
  const State& state() const { return *state_; }
  const Map& map() const { return *map_; }

 private:
  std::shared_ptr<State> state_;
  std::shared_ptr<Map> map_;
};

MemoryIterator::MemoryIterator(std::shared_ptr<const MemorySnapshot> snapshot, const StoredKey& first,
                               const std::optional<StoredKey>& last)
    : snapshot_(std::move(snapshot)) {
  const auto& entries = snapshot_->map().entries;
  at_ = entries.lower_bound(first);
  end_ = !last ? entries.end() : *last <= first ? at_ : entries.lower_bound(*last);
}

bool MemoryIterator::next() {
  snapshot_->state().enter_shared("scan");
  if (at_ != end_ && std::exchange(started_, true)) ++at_;
  return at_ != end_;
}

class MemoryStore final : public Store {
 public:
  explicit MemoryStore(const StoreOptions& options) {
    if (!options.directory.empty()) load(options.directory);
    state_->read_only = options.read_only;
  }
  ~MemoryStore() override { MemoryStore::close(); }

  void multi_get(std::span<const StoredKey> keys, const Found& found) const override {
    const auto lock = state_->enter_shared("multi_get");
    if (std::adjacent_find(keys.begin(), keys.end(), std::greater_equal<>()) != keys.end())
      throw std::invalid_argument("[multi_get] keys must be strictly ascending");
    uint64_t num_found = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      const auto entry = state_->map->entries.find(keys[i]);
      if (entry == state_->map->entries.end()) continue;
      ++num_found;
      found(i, bytes_of(entry->second));
    }
    state_->keys_read += keys.size();
    state_->keys_found += num_found;
  }

  std::unique_ptr<StoreWriter> begin_write() override {
    state_->enter_shared("begin_write");
    if (state_->read_only) throw StorageError("[begin_write] the memory store was opened read-only");
    return std::make_unique<MemoryWriter>(state_);
  }

  std::shared_ptr<const StoreSnapshot> snapshot() const override { return std::make_shared<MemorySnapshot>(state_); }

  std::vector<LinkedFile> link_into(const std::filesystem::path& directory) override {
    std::string text;
    {
      const auto lock = state_->enter_shared("link_into");
      ByteWriter out(text);
      out.put(kCopyMagic);
      out.put<uint64_t>(state_->map->entries.size());
      for (const auto& [key, value] : state_->map->entries) {
        out.put_bytes(key.bytes.data(), key.bytes.size());
        out.put_string(value);
      }
      out.put(checksum64(bytes_of(text)));
    }
    make_directory(directory);
    write_file_atomically(directory / kCopyName, text);
    return {{kCopyName, text.size(), crc32c(bytes_of(text))}};
  }

  void set_disposable(Disposable disposable) override {
    const auto lock = state_->enter_alone("set_disposable");
    disposable_ = std::move(disposable);
  }

  void compact(std::atomic<bool>*) override {
    const auto lock = state_->enter_alone("compact");
    if (disposable_ && state_->map->snapshots == 0)
      std::erase_if(state_->map->entries,
                    [&](const auto& entry) { return disposable_(entry.first, bytes_of(entry.second)); });
  }

  StoreStats stats() const override {
    const auto lock = state_->enter_shared("stats");
    StoreStats stats = state_->stats;
    stats.keys_read = state_->keys_read;
    stats.keys_found = state_->keys_found;
    return stats;
  }

  void close() override {
    const std::lock_guard lock(state_->mutex);
    state_->closed = true;
    if (state_->map->snapshots == 0) state_->map->entries.clear();
  }

 private:
  void load(const std::filesystem::path& directory) {
    const auto path = directory / kCopyName;
    std::string text;
    try {
      text = read_file(path, SIZE_MAX);
    } catch (const MissingFileError&) {
      return;
    }
    ByteReader in(bytes_of(text), path.string());
    if (in.get<uint64_t>() != kCopyMagic) in.corrupt("is not a copy of a memory store");
    if (text.size() < 24) in.corrupt("is too short");
    const uint64_t sum = checksum64(bytes_of(text).first(text.size() - 8));
    if (ByteReader(bytes_of(text).last(8), path.string()).get<uint64_t>() != sum) in.corrupt("has another checksum");
    auto& entries = state_->map->entries;
    for (uint64_t left = in.get<uint64_t>(); left > 0; --left) {
      const StoredKey key = StoredKey::from_bytes(in.take(StoredKey::kBytes));
      entries.emplace_hint(entries.end(), key, in.get_string(SIZE_MAX));
    }
    in.get<uint64_t>();  // the checksum
    in.expect_end();
  }

  std::shared_ptr<State> state_ = std::make_shared<State>();
  Disposable disposable_;  // changed with the mutex held alone
};

}  // namespace

std::unique_ptr<Store> open_memory_store(const StoreOptions& options) { return std::make_unique<MemoryStore>(options); }

}  // namespace damo
