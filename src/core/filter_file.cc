// SPDX-License-Identifier: Apache-2.0
#include "filter_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "error.h"
#include "format.h"
#include "log_segment.h"
#include "settings.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kMagic = "DAMOFILT";
constexpr uint32_t kVersion = 1;
constexpr size_t kHeadBytes = 4096;      // then the counters
constexpr size_t kFieldBytes = 64;       // of the head, before its checksum
constexpr size_t kMarkOffset = 512;      // a sector of its own: a disk writes it whole or not at all
constexpr size_t kMarkBytes = 32;        // with its checksum
constexpr size_t kRecordHeadBytes = 24;  // with its checksum
constexpr size_t kSealedHeadBytes = 16;  // without
constexpr size_t kRecordKeys = 1 << 16;  // of one record
constexpr uint64_t kLogBytes = 4 << 20;  // a log of that length is always kept

struct Mark {
  uint64_t end = 0, synced = 0, boot = 0;
};

// A number that changes with each boot of the machine; 0 where the system does not tell.
uint64_t this_boot() {
  try {
    const std::string id = read_file("/proc/sys/kernel/random/boot_id", 64);
    return checksum64(std::as_bytes(std::span(id)));
  } catch (const Error&) {
    return 0;
  }
}

std::string encode_head(const CountingBloomFilter& filter) {
  std::string bytes(kMagic);
  ByteWriter writer(bytes);
  writer.put(kVersion);
  writer.put(uint32_t{0});
  writer.put(filter.settings().capacity);
  writer.put(filter.settings().count);
  writer.put(filter.layout().counters_per_line);
  writer.put(filter.settings().fpr);
  writer.put(filter.settings().halve_every);
  writer.put(filter.layout().pages);
  writer.put(filter.adds());
  writer.put(checksum64(std::as_bytes(std::span(bytes))));
  return bytes;
}

std::string encode_mark(const Mark& mark) {
  std::string bytes;
  ByteWriter writer(bytes);
  writer.put(mark.end);
  writer.put(mark.synced);
  writer.put(mark.boot);
  writer.put(checksum64(std::as_bytes(std::span(bytes))));
  return bytes;
}

bool all_zero(Bytes bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) { return byte == std::byte{0}; });
}

std::string halving(uint64_t every) { return every == 0 ? "None" : std::to_string(every); }

}  // namespace

uint64_t FilterFile::counters_end() const noexcept {
  return kHeadBytes + filter_.memory_bytes() + filter_.num_chunks() * sizeof(uint64_t);
}

uint64_t FilterFile::longest() const noexcept {
  return counters_end() + std::max<uint64_t>(kLogBytes, filter_.memory_bytes() / 2);
}

// -------------------------------------------------------------------- open

FilterFile::FilterFile(const fs::path& path, CountingBloomFilter& filter, bool reload)
    : path_(fs::weakly_canonical(fs::absolute(path))), filter_(filter), boot_(this_boot()) {
  const auto open = [this] {
    // Not blocking: it may be a pipe that nobody writes to.
    try {
      file_ = FileDescriptor("open", path_, O_RDWR | O_NONBLOCK);
      expect_filter(file_);
    } catch (const MissingFileError&) {
    }
  };
  open();  // before a lock file is left beside what is not ours
  fs::path lock = path_;
  lock += ".lock";
  lock_ = std::make_unique<FileLock>(lock, FileLock::Words{path_.string(), "CountingBloomFilter", "file"});
  file_ = FileDescriptor();
  open();  // what is there now that nobody else may change it
  if (file_.is_open() && reload) {
    read();
  } else {
    write_new();
    sync();
  }
}

void FilterFile::expect_filter(const FileDescriptor& file) const {
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) throw_system_error("open", path_);
  if (!S_ISREG(info.st_mode)) throw StorageError("[open] " + path_.string() + " is not a file: give another path");
  std::string magic(kMagic.size(), '\0');
  const size_t got = file.read_at(std::as_writable_bytes(std::span(magic)), 0);
  if (got < magic.size()) throw_damaged(path_, got, "it is too short for a counting Bloom filter: give another path");
  if (magic != kMagic) throw_damaged(path_, 0, "it is not a counting Bloom filter: give another path");
}

void FilterFile::read() {
  // What the file is made of, checked in the order in which one thing says how to read the next.
  std::vector<std::byte> head(kHeadBytes);
  const size_t got = file_.read_at(head, 0);
  if (got < kHeadBytes)
    throw_damaged(path_, got, "the file ends inside its head, which has " + std::to_string(kHeadBytes) + " bytes");
  ByteReader fields(head, path_.string());
  fields.take(kMagic.size());
  // Before the checksum, for a newer version may have another one: so a flipped bit comes here, too.
  const auto version = fields.get<uint32_t>();
  if (version > kVersion)
    throw CorruptionError("[open] " + path_.string() + " has filter format " + std::to_string(version) +
                          " at offset 8, this version reads up to " + std::to_string(kVersion) +
                          ": it was written by a newer version, then upgrade damo-embedding, or it is damaged");
  if (version == 0) throw_damaged(path_, kMagic.size(), "filter format 0");
  fields.take(4);  // reserved, under the checksum
  FilterSettings stored;
  FilterLayout layout;
  stored.capacity = fields.get<uint64_t>();
  stored.count = fields.get<uint32_t>();
  layout.counters_per_line = fields.get<uint32_t>();
  stored.fpr = fields.get<double>();
  stored.halve_every = fields.get<uint64_t>();
  layout.pages = fields.get<uint64_t>();
  const auto adds = fields.get<uint64_t>();
  if (fields.get<uint64_t>() != checksum64(Bytes(head).first(kFieldBytes)))
    throw_damaged(path_, kFieldBytes, "the head's checksum does not match");
  const size_t mark_end = kMarkOffset + kMarkBytes;
  if (!all_zero(Bytes(head).subspan(kFieldBytes + 8, kMarkOffset - kFieldBytes - 8)) ||
      !all_zero(Bytes(head).subspan(mark_end)))
    throw_damaged(path_, kFieldBytes + 8, "unused bytes of the head that are not zero");
  const FilterSettings& wanted = filter_.settings();
  if (stored != wanted) {
    const auto text = [](const FilterSettings& s) {
      return "capacity=" + std::to_string(s.capacity) + ", count=" + std::to_string(s.count) +
             ", fpr=" + format_number(s.fpr) + ", halve_every=" + halving(s.halve_every);
    };
    throw SchemaMismatchError("[open] " + path_.string() + " is a filter with " + text(stored) + "; asked for " +
                              text(wanted) + ": give its settings or another path, or start anew with reload=False");
  }
  if (layout != filter_.layout()) throw_damaged(path_, 28, "a layout that is not the one of its settings");
  const uint64_t size = file_.bytes(), start = counters_end();
  if (size < start)
    throw_damaged(path_, size, "the file ends inside its counters, which end at " + std::to_string(start));
  ByteReader mark_fields(Bytes(head).subspan(kMarkOffset, kMarkBytes), path_.string(), kMarkOffset);
  Mark mark;
  mark.end = mark_fields.get<uint64_t>();
  mark.synced = mark_fields.get<uint64_t>();
  mark.boot = mark_fields.get<uint64_t>();
  if (mark_fields.get<uint64_t>() != checksum64(Bytes(head).subspan(kMarkOffset, kMarkBytes - 8)))
    throw_damaged(path_, kMarkOffset, "the mark's checksum does not match");
  if (mark.synced < start || mark.end < mark.synced)
    throw_damaged(path_, kMarkOffset, "a mark that does not fit the file");

  std::vector<uint64_t> checksums(filter_.num_chunks());
  const uint64_t checksums_at = kHeadBytes + filter_.memory_bytes();
  if (file_.read_at(std::as_writable_bytes(std::span(checksums)), checksums_at) != checksums.size() * sizeof(uint64_t))
    throw_damaged(path_, checksums_at, "the file became shorter while it was read");
  std::vector<std::byte> chunk;
  uint64_t at = kHeadBytes;
  for (size_t i = 0; i < checksums.size(); ++i, at += chunk.size()) {
    chunk.resize(filter_.chunk_bytes(i));
    if (file_.read_at(chunk, at) != chunk.size()) throw_damaged(path_, at, "the file became shorter while it was read");
    if (checksum64(chunk, at) != checksums[i])
      throw_damaged(path_, at, "the checksum of " + std::to_string(chunk.size()) + " bytes of counters does not match");
    filter_.load_chunk(i, chunk);
  }
  filter_.set_adds(adds);
  read_log(mark.synced, mark.end, boot_ != 0 && mark.boot == boot_);
}

// A file's bytes in order, a piece at a time: a log may be of very many very short records.
class FilterFile::Window {
 public:
  explicit Window(const FileDescriptor& file) : file_(file) {}

  // The `size` bytes at `at`, until the next call; fewer at the end of the file.
  Bytes at(uint64_t at, size_t size) {
    if (at < begin_ || at + size > begin_ + filled_) {
      buffer_.resize(std::max(size, size_t{1} << 20));
      begin_ = at;
      filled_ = file_.read_at(buffer_, at);
    }
    const size_t from = at - begin_;
    return Bytes(buffer_).subspan(from, std::min(size, filled_ - from));
  }

 private:
  const FileDescriptor& file_;
  std::vector<std::byte> buffer_;
  uint64_t begin_ = 0;
  size_t filled_ = 0;
};

void FilterFile::read_log(uint64_t synced, uint64_t end, bool same_boot) {
  const uint64_t size = file_.bytes();
  // Up to here everything was in the file when a call returned, and nothing but damage can have taken it away.
  const uint64_t sure = same_boot ? end : synced;
  if (size < sure) throw_damaged(path_, size, "the file ends inside its log, which ends at " + std::to_string(sure));
  const uint64_t limit = same_boot ? end : size;
  Window window(file_);
  std::string sealed;  // what a checksum covers: head without it, keys
  std::vector<uint64_t> keys;
  uint64_t at = counters_end();
  // Adds the record at `at`; or says what is wrong with it.
  const auto add_record = [&]() -> const char* {
    if (limit - at < kRecordHeadBytes) return "the log ends inside a record's head";
    const Bytes head_bytes = window.at(at, kRecordHeadBytes);
    if (head_bytes.size() != kRecordHeadBytes) return "the file became shorter while it was read";
    ByteReader head(head_bytes, path_.string(), at);
    const auto n = head.get<uint64_t>();
    const auto num = head.get<uint32_t>();
    if (n == 0 || n > kRecordKeys || num == 0 || head.get<uint32_t>() != 0) return "it is no record's head";
    if (n * sizeof(uint64_t) > limit - at - kRecordHeadBytes) return "the log ends inside a record";
    const auto checksum = head.get<uint64_t>();
    keys.resize(n);
    sealed.assign(reinterpret_cast<const char*>(head_bytes.data()), kSealedHeadBytes);
    const Bytes key_bytes = window.at(at + kRecordHeadBytes, n * sizeof(uint64_t));
    if (key_bytes.size() != n * sizeof(uint64_t)) return "the file became shorter while it was read";
    sealed.append(reinterpret_cast<const char*>(key_bytes.data()), key_bytes.size());
    if (checksum64(std::as_bytes(std::span(sealed)), at) != checksum) return "a record whose checksum does not match";
    std::memcpy(keys.data(), key_bytes.data(), key_bytes.size());
    filter_.add(keys, num);
    return nullptr;
  };
  while (at < limit) {
    if (const char* bad = add_record()) {
      if (at < sure) throw_damaged(path_, at, bad);
      break;
    }
    at += kRecordHeadBytes + keys.size() * sizeof(uint64_t);
  }
  if (at < sure) throw_damaged(path_, at, "the log ends before its mark");

  // Everything is read, so now the file may change: what is behind was never told to anybody.
  end_ = at;
  synced_ = std::min(synced, end_);
  if (size != end_) file_.truncate(end_);
  if (!same_boot) sync();
  compact_at_ = longest();
}

// ------------------------------------------------------------------- write

void FilterFile::write_new() {
  fs::path staged = path_;
  staged += ".tmp";
  // Made here, and never something that was put in its place. A leftover means nothing.
  if (::unlink(staged.c_str()) != 0 && errno != ENOENT) throw_system_error("write", staged);
  const uint64_t end = counters_end();
  FileDescriptor file;
  try {
    file = FileDescriptor("write", staged, O_RDWR | O_CREAT | O_EXCL);
    if (struct stat info{}; file_.is_open() && ::fstat(file_.get(), &info) == 0)
      if (::fchmod(file.get(), info.st_mode & 07777) != 0) throw_system_error("write", staged);
    std::string head = encode_head(filter_);
    head.resize(kMarkOffset);
    head += encode_mark({end, end, boot_});
    head.resize(kHeadBytes);
    file.write(std::as_bytes(std::span(head)));
    std::string checksums;
    ByteWriter writer(checksums);
    uint64_t at = kHeadBytes;
    for (size_t i = 0; i < filter_.num_chunks(); ++i) {
      const Bytes chunk = filter_.chunk(i);
      file.write(chunk);
      writer.put(checksum64(chunk, at));
      at += chunk.size();
    }
    file.write(std::as_bytes(std::span(checksums)));
    file.sync();
    file.rename_to(path_);
  } catch (...) {
    ::unlink(staged.c_str());
    throw;
  }
  file_ = std::move(file);
  end_ = synced_ = end;
  compact_at_ = longest();
  name_synced_ = false;  // until sync(): after power loss the old file may still be there, with all that was synced
}

void FilterFile::write_mark(uint64_t end, uint64_t synced) const {
  const std::string mark = encode_mark({end, synced, boot_});
  file_.write_at(std::as_bytes(std::span(mark)), kMarkOffset);
}

// Another program may have done something to the file. Writing on would leave a file whose adds of before are gone.
void FilterFile::expect_whole(const char* operation) {
  if (!failure_.empty()) throw StorageError(failure_);
  struct stat info {};
  if (::fstat(file_.get(), &info) != 0) throw_system_error(operation, path_);
  const bool removed = info.st_nlink == 0;
  if (!removed && static_cast<uint64_t>(info.st_size) >= end_) return;
  failure_ = std::string("[") + operation + "] " + path_.string() +
             (removed ? " was removed or replaced"
                      : " was cut from " + std::to_string(end_) + " to " + std::to_string(info.st_size) + " bytes") +
             " by another program; close the filter and start anew with reload=False or another path";
  throw StorageError(failure_);
}

void FilterFile::append(std::span<const uint64_t> keys, uint32_t num) {
  expect_whole("add");
  if (num == 0 || keys.empty()) return;
  uint64_t at = end_;
  bool marking = false;
  try {
    for (size_t first = 0; first < keys.size(); first += kRecordKeys) {
      const auto part = std::as_bytes(keys.subspan(first, std::min(kRecordKeys, keys.size() - first)));
      // The checksum covers head and keys, which lie side by side only while it is made.
      record_.clear();
      ByteWriter writer(record_);
      writer.put(static_cast<uint64_t>(part.size() / sizeof(uint64_t)));
      writer.put(num);
      writer.put(uint32_t{0});
      writer.put_bytes(part.data(), part.size());
      const uint64_t checksum = checksum64(std::as_bytes(std::span(record_)), at);
      record_.insert(kSealedHeadBytes, reinterpret_cast<const char*>(&checksum), sizeof checksum);
      file_.write_at(std::as_bytes(std::span(record_)), at);
      at += record_.size();
    }
    marking = true;
    write_mark(at, synced_);
  } catch (const StorageError& refused) {
    const std::string said = std::string(refused.what()) + "; nothing was added";
    if (marking) {
      // What the mark is now is not known, and records must not be overwritten that it may count.
      failure_ = said + "; close the filter, and open it again to see what is left";
      throw StorageError(failure_);
    }
    // The mark does not reach what was written; that this is cut off only keeps the file short.
    [[maybe_unused]] const int ignored = ::ftruncate(file_.get(), static_cast<off_t>(end_));
    throw StorageError(said);
  }
  end_ = at;
}

void FilterFile::compact() {
  if (end_ < compact_at_) return;
  try {
    write_new();
  } catch (const StorageError&) {
    // The log has it all, so nothing is lost and the adds were good. When the disk takes no more of it, append says so.
    compact_at_ = counters_end() + 2 * (end_ - counters_end());
  }
}

void FilterFile::sync() {
  expect_whole("sync");
  if (!name_synced_) {
    fsync_directory(path_.parent_path());
    name_synced_ = true;
  }
  try {
    file_.sync_data();
  } catch (const StorageError& refused) {
    // What the system could not write it may call clean from now on: a second attempt that succeeds proves nothing.
    failure_ = std::string(refused.what()) + "; close the filter, and open it again to see what is left";
    throw StorageError(failure_);
  }
  synced_ = end_;
  write_mark(end_, synced_);
}

void FilterFile::close() {
  if (!file_.is_open()) return;
  try {
    sync();
  } catch (...) {
    abandon();
    throw;
  }
  abandon();
}

void FilterFile::abandon() noexcept {
  file_ = FileDescriptor();
  if (lock_) lock_->unlock();
}

}  // namespace damo
