// SPDX-License-Identifier: Apache-2.0
//
// What is written lies over a store that nobody may change: new values, and the keys that are gone. The upper layer is
// a memory store as long as it is small, and then a RocksDB store in a directory for temporary files, so that any
// number of rows fits beside a budget of memory. There is none before the first entry comes.
//
// In the upper layer a value is one byte, kErased or kValue, and the value.
#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "../error.h"
#include "../scratch_directory.h"
#include "../store.h"

namespace damo {
namespace {

constexpr std::byte kErased{0}, kValue{1};
constexpr size_t kEntryBytes = 128;  // what an entry of the memory store takes beside its value

bool is_value(Bytes entry) { return entry[0] == kValue; }
Bytes value_in(Bytes entry) { return entry.subspan(1); }

// What store, writers and snapshots share.
struct Layers {
  std::unique_ptr<Store> base;
  size_t memory_bytes = 0;
  StoreOptions options;  // of the store for more

  mutable std::mutex mutex;    // protects what follows, for a moment
  std::shared_ptr<Store> top;  // null: nothing was written yet; a writer replaces it
  bool closed = false;

  // The writer's alone, and close()'s, which nobody writes beside.
  std::optional<ScratchDirectory> scratch;
  size_t bytes = 0;  // in memory
  bool on_disk = false;

  std::shared_ptr<Store> upper(const char* operation) const {
    const std::lock_guard lock(mutex);
    if (closed)
      throw ClosedError("[" + std::string(operation) + "] the store in " + options.directory.string() + " is closed");
    return top;
  }
  void set_upper(const char* operation, std::shared_ptr<Store> store) {
    const std::lock_guard lock(mutex);
    if (closed)
      throw ClosedError("[" + std::string(operation) + "] the store in " + options.directory.string() + " is closed");
    top = std::move(store);
  }
  // Moves what is in memory to the disk, and goes on there.
  void move_to_disk();
};

void Layers::move_to_disk() {
  const std::shared_ptr<Store> small = upper("put");
  scratch.emplace();
  try {
    StoreOptions there = options;
    there.directory = scratch->path() / "rows";
    const std::shared_ptr<Store> large = open_rocksdb_store(there);
    if (small) {
      const auto writer = large->begin_write();
      const auto entry = small->snapshot()->scan(StoredKey::make(0, 0), std::nullopt);
      while (entry->next()) writer->put(entry->key(), entry->value());
      writer->commit();
    }
    set_upper("put", large);
  } catch (...) {
    scratch.reset();
    throw;
  }
  on_disk = true;
}

// ------------------------------------------------------------------ writer

class LayeredWriter final : public StoreWriter {
 public:
  explicit LayeredWriter(std::shared_ptr<Layers> layers) : layers_(std::move(layers)) {}

  void put(const StoredKey& key, Bytes value) override {
    entry_.assign(1, static_cast<char>(kValue));
    entry_.append(reinterpret_cast<const char*>(value.data()), value.size());
    add("put", key);
  }
  void erase(const StoredKey& key) override {
    entry_.assign(1, static_cast<char>(kErased));
    add("erase", key);
  }

  void commit() override {
    (void)layers_->upper("commit");
    check_uncommitted("commit");
    committed_ = true;
    if (!writer_ && !entries_.empty()) {
      std::shared_ptr<Store> small = layers_->upper("commit");
      const bool first = small == nullptr;
      if (first) small = open_memory_store({});
      writer_ = small->begin_write();
      for (const auto& [key, entry] : entries_) writer_->put(key, std::as_bytes(std::span(entry)));
      writer_->commit();
      if (first) layers_->set_upper("commit", std::move(small));
      layers_->bytes += bytes_;
    } else if (writer_) {
      writer_->commit();
    }
  }

 private:
  void check_uncommitted(const char* operation) const {
    if (committed_) throw std::invalid_argument("[" + std::string(operation) + "] this batch is committed already");
  }

  void add(const char* operation, const StoredKey& key) {
    (void)layers_->upper(operation);
    check_uncommitted(operation);
    if (last_ && key <= *last_)
      throw std::invalid_argument("[" + std::string(operation) + "] keys of a batch must be strictly ascending");
    if (!writer_) {
      bytes_ += entry_.size() + kEntryBytes;
      if (layers_->on_disk || layers_->bytes + bytes_ > layers_->memory_bytes) {
        if (!layers_->on_disk) layers_->move_to_disk();
        writer_ = layers_->upper(operation)->begin_write();
        for (const auto& [earlier, entry] : std::exchange(entries_, {}))
          writer_->put(earlier, std::as_bytes(std::span(entry)));
      }
    }
    if (writer_)
      writer_->put(key, std::as_bytes(std::span(entry_)));
    else
      entries_.emplace_back(key, entry_);
    last_ = key;
  }

  std::shared_ptr<Layers> layers_;
  std::vector<std::pair<StoredKey, std::string>> entries_;  // until there is a writer
  std::unique_ptr<StoreWriter> writer_;                     // of the upper layer, once that is on the disk
  std::string entry_;
  std::optional<StoredKey> last_;
  size_t bytes_ = 0;  // of the entries
  bool committed_ = false;
};

// --------------------------------------------------------- snapshot, scans

class LayeredIterator final : public StoreIterator {
 public:
  LayeredIterator(std::shared_ptr<Store> upper, std::unique_ptr<StoreIterator> top, std::unique_ptr<StoreIterator> base)
      : upper_(std::move(upper)), top_(std::move(top)), base_(std::move(base)) {}

  bool next() override {
    if (at_ == At::kEnd) return false;
    if (at_ == At::kStart) more_above_ = top_ != nullptr && top_->next();
    if (at_ == At::kTop) more_above_ = top_->next();
    if (at_ == At::kStart || at_ == At::kBase) more_below_ = base_->next();
    while (more_above_ || more_below_) {
      if (!more_above_ || (more_below_ && base_->key() < top_->key())) {
        at_ = At::kBase;
        return true;
      }
      if (more_below_ && base_->key() == top_->key()) more_below_ = base_->next();
      if (is_value(top_->value())) {
        at_ = At::kTop;
        return true;
      }
      more_above_ = top_->next();
    }
    at_ = At::kEnd;
    return false;
  }
  StoredKey key() const override { return at_ == At::kTop ? top_->key() : base_->key(); }
  Bytes value() const override { return at_ == At::kTop ? value_in(top_->value()) : base_->value(); }

 private:
  enum class At { kStart, kTop, kBase, kEnd } at_ = At::kStart;
  std::shared_ptr<Store> upper_;  // goes on to be read when another one has taken its place
  std::unique_ptr<StoreIterator> top_, base_;
  bool more_above_ = false, more_below_ = false;
};

class LayeredSnapshot final : public StoreSnapshot {
 public:
  LayeredSnapshot(std::shared_ptr<Store> upper, std::shared_ptr<const StoreSnapshot> base)
      : upper_(std::move(upper)), top_(upper_ ? upper_->snapshot() : nullptr), base_(std::move(base)) {}
  std::unique_ptr<StoreIterator> scan(const StoredKey& first, const std::optional<StoredKey>& last) const override {
    return std::make_unique<LayeredIterator>(upper_, top_ ? top_->scan(first, last) : nullptr,
                                             base_->scan(first, last));
  }

 private:
  std::shared_ptr<Store> upper_;
  std::shared_ptr<const StoreSnapshot> top_, base_;
};

// ------------------------------------------------------------------- store

class LayeredStore final : public Store {
 public:
  LayeredStore(std::unique_ptr<Store> base, size_t memory_bytes, const StoreOptions& options)
      : layers_(std::make_shared<Layers>()) {
    layers_->base = std::move(base);
    layers_->memory_bytes = memory_bytes;
    layers_->options = options;
  }
  ~LayeredStore() override {
    try {
      LayeredStore::close();
    } catch (...) {
      // Nothing of it was to stay.
    }
  }

  void multi_get(std::span<const StoredKey> keys, const Found& found) const override {
    const std::shared_ptr<Store> top = layers_->upper("multi_get");
    if (!top) return layers_->base->multi_get(keys, found);
    std::vector<uint8_t> seen(keys.size(), 0);
    top->multi_get(keys, [&](size_t i, Bytes entry) {
      seen[i] = 1;
      if (is_value(entry)) found(i, value_in(entry));
    });
    std::vector<StoredKey> others;
    std::vector<size_t> index;
    for (size_t i = 0; i < keys.size(); ++i) {
      if (seen[i] != 0) continue;
      others.push_back(keys[i]);
      index.push_back(i);
    }
    if (!others.empty()) layers_->base->multi_get(others, [&](size_t i, Bytes value) { found(index[i], value); });
  }

  std::unique_ptr<StoreWriter> begin_write() override {
    (void)layers_->upper("begin_write");
    return std::make_unique<LayeredWriter>(layers_);
  }

  std::shared_ptr<const StoreSnapshot> snapshot() const override {
    return std::make_shared<LayeredSnapshot>(layers_->upper("snapshot"), layers_->base->snapshot());
  }

  std::vector<LinkedFile> link_into(const std::filesystem::path& directory) override {
    throw StorageError("[link_into] " + directory.string() + ": a layered store is not all in files");
  }
  // Nothing is left out: what hides an entry below is needed as long as that is there.
  void set_disposable(Disposable) override {}
  void compact(std::atomic<bool>*) override {}

  std::vector<StoreDamage> verify(uint64_t& files, uint64_t& bytes) override {
    (void)layers_->upper("verify");
    return layers_->base->verify(files, bytes);
  }

  std::optional<StoredKey> place_after(const StoredKey& key) const override {
    const std::shared_ptr<Store> top = layers_->upper("scan");
    const std::optional<StoredKey> above = top ? top->place_after(key) : std::nullopt;
    const std::optional<StoredKey> below = layers_->base->place_after(key);
    if (!above || !below) return above ? above : below;
    return std::min(*above, *below);
  }

  // Files and reads are those below.
  StoreStats stats() const override {
    const std::shared_ptr<Store> top = layers_->upper("stats");
    StoreStats stats = layers_->base->stats();
    if (!top) return stats;
    const StoreStats above = top->stats();
    stats.cache_bytes += above.cache_bytes;
    stats.keys_written = above.keys_written;
    stats.bytes_written = above.bytes_written;
    stats.commits = above.commits;
    return stats;
  }

  void close() override {
    std::shared_ptr<Store> top;
    {
      const std::lock_guard lock(layers_->mutex);
      layers_->closed = true;
      top = layers_->top;
    }
    if (top) top->close();
    layers_->scratch.reset();
    layers_->base->close();
  }

 private:
  std::shared_ptr<Layers> layers_;
};

}  // namespace

std::unique_ptr<Store> open_layered_store(std::unique_ptr<Store> base, size_t memory_bytes,
                                          const StoreOptions& options) {
  return std::make_unique<LayeredStore>(std::move(base), memory_bytes, options);
}

}  // namespace damo
