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
#include "filter_format.h"
#include "format.h"
#include "log_segment.h"
#include "planted.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

constexpr size_t kRecordHeadBytes = 24;  // with its checksum
constexpr size_t kSealedHeadBytes = 16;  // without
constexpr size_t kRecordKeys = 1 << 16;  // of one record
constexpr uint64_t kLogBytes = 4 << 20;  // a log of that length is always kept

// A number that changes with each boot of the machine; 0 where the system does not tell.
uint64_t this_boot() {
  try {
    const std::string id = read_file("/proc/sys/kernel/random/boot_id", 64);
    return checksum64(std::as_bytes(std::span(id)));
  } catch (const Error&) {
    return 0;
  }
}

}  // namespace

uint64_t FilterFile::counters_end() const noexcept { return filter_counters_end(filter_); }

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
  std::string magic(kFilterMagic.size(), '\0');
  const size_t got = file.read_at(std::as_writable_bytes(std::span(magic)), 0);
  if (got < magic.size()) throw_damaged(path_, got, "it is too short for a counting Bloom filter: give another path");
  if (magic != kFilterMagic) throw_damaged(path_, 0, "it is not a counting Bloom filter: give another path");
}

void FilterFile::read() {
  // What the file is made of, checked in the order in which one thing says how to read the next.
  const FilterHead head = read_filter_head(file_, 0);
  const FilterSettings& wanted = filter_.settings();
  if (head.settings != wanted)
    throw SchemaMismatchError("[open] " + path_.string() + " is a filter with " + show_filter_settings(head.settings) +
                              "; asked for " + show_filter_settings(wanted) +
                              ": give its settings or another path, or start anew with reload=False");
  if (head.layout != filter_.layout()) throw_damaged(path_, 28, "a layout that is not the one of its settings");
  const uint64_t size = file_.bytes(), start = counters_end();
  if (size < start)
    throw_damaged(path_, size, "the file ends inside its counters, which end at " + std::to_string(start));
  if (head.mark.synced < start || head.mark.end < head.mark.synced)
    throw_damaged(path_, kFilterMarkOffset, "a mark that does not fit the file");
  read_filter_counters(file_, head, 0, filter_);
  read_log(head.mark.synced, head.mark.end, boot_ != 0 && head.mark.boot == boot_);
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
  // Who made the file, or wrote its end, may have died before the sync, or tried it in vain.
  name_synced_ = planted("filter named by a name that is not synced");
  if (!planted("filter synced without its end")) file_.write_again(synced_, end_);
  if (!same_boot || synced_ < end_) sync();
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
    const std::string head = encode_filter_head(filter_, filter_.adds(), {end, end, boot_}, 0);
    file.write(std::as_bytes(std::span(head)));
    std::string checksums;
    ByteWriter writer(checksums);
    for (size_t i = 0; i < filter_.num_chunks(); ++i) {
      file.write(filter_.chunk(i));
      writer.put(filter_chunk_checksum(filter_.chunk(i), i, 0));
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
  const std::string mark = encode_filter_mark({end, synced, boot_}, 0);
  file_.write_at(std::as_bytes(std::span(mark)), kFilterMarkOffset);
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
    sync_name(path_);
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
