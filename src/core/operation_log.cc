// SPDX-License-Identifier: Apache-2.0
#include "operation_log.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <condition_variable>
#include <list>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

#include "error.h"
#include "file.h"
#include "log_segment.h"
#include "planted.h"

namespace damo {
namespace {

constexpr uint64_t kMebibyte = 1 << 20;

// What append leaves in the page cache behind its end. Older pages are handed back: the log lives in the same few pages
// and pushes nothing else out of memory. On a virtual machine that has not touched all its memory yet it is faster too,
// because a fresh page is a fault of the host: 4.4 MB each 25 ms took 2.5 ms at the median and 6 ms at the 90th
// percentile against 6.5 and 33 ms. Once the machine is warm the two are equal (2.5 ms).
constexpr uint64_t kKeepCachedBytes = 8 * kMebibyte;

constexpr std::array<std::byte, 8> kZeros{};

// The segment that takes appends.
struct Segment {
  uint64_t number = 0;
  uint64_t seed = 0;
  uint64_t first_sequence = 0;
  FileDescriptor file;
  uint64_t end = 0;                         // guarded by Impl::mutex
  unsigned next_slot = 1;                   // of the sync mark; touched by the thread that syncs
  uint64_t written_back = 0;                // up to here the kernel was told to write; touched by the appender
  uint64_t dropped_from_cache = kMebibyte;  // from there on: the head stays, marks are written into it; the appender's
};

// A segment that is full, synced and closed.
struct Finished {
  std::filesystem::path path;
  uint64_t bytes = 0;
  uint64_t last_sequence = 0;
};

// Starts writing finished mebibytes to the disk, so that a later sync waits for little, and hands the pages before them
// back. Whether it worked does not matter here: the kernel keeps an error of the disk for the next fdatasync.
void write_back(Segment& segment, uint64_t end) {
  const uint64_t finished = end - end % kMebibyte;
  if (finished <= segment.written_back) return;
  const int fd = segment.file.get();
  ::sync_file_range(fd, static_cast<off_t>(segment.written_back), static_cast<off_t>(finished - segment.written_back),
                    SYNC_FILE_RANGE_WRITE);
  segment.written_back = finished;
  if (finished < segment.dropped_from_cache + kKeepCachedBytes + kMebibyte) return;
  const uint64_t drop_to = finished - kKeepCachedBytes;
  ::posix_fadvise(fd, static_cast<off_t>(segment.dropped_from_cache),
                  static_cast<off_t>(drop_to - segment.dropped_from_cache), POSIX_FADV_DONTNEED);
  segment.dropped_from_cache = drop_to;
}

// Writes all of `pieces` at `offset`; false with errno set when the system refuses, some bytes perhaps written.
bool write_pieces(int fd, std::span<iovec> pieces, uint64_t offset) {
  while (!pieces.empty()) {
    if (pieces.front().iov_len == 0) {
      pieces = pieces.subspan(1);
      continue;
    }
    const int count = static_cast<int>(std::min<size_t>(pieces.size(), IOV_MAX));
    const ssize_t wrote = ::pwritev(fd, pieces.data(), count, static_cast<off_t>(offset));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote == 0) errno = EIO;  // no progress is no answer POSIX knows; never spin on it
    if (wrote <= 0) return false;
    offset += static_cast<uint64_t>(wrote);
    for (auto left = static_cast<size_t>(wrote); left > 0;) {
      iovec& piece = pieces.front();
      const size_t taken = std::min(left, piece.iov_len);
      piece.iov_base = static_cast<std::byte*>(piece.iov_base) + taken;
      piece.iov_len -= taken;
      left -= taken;
      if (piece.iov_len == 0) pieces = pieces.subspan(1);
    }
  }
  return true;
}

}  // namespace

struct OperationLog::Impl {
  Impl() {}  // of one that is not written
  explicit Impl(const LogOptions& log_options)
      : written(true), options(log_options), directory("open the log", log_options.directory, O_RDONLY | O_DIRECTORY) {}

  const bool written = false;
  const LogOptions options;
  const FileDescriptor directory;  // open all the time: no descriptor may be missing between a rename and its sync

  mutable std::mutex mutex;  // guards what follows; never held across a system call
  std::condition_variable synced_more;
  std::list<Finished> finished;  // oldest first
  // Two owners: this, and the thread that is syncing it while the appender moves on to the next.
  std::shared_ptr<Segment> current;
  uint64_t last = 0;     // sequence number of the last record appended
  uint64_t synced = 0;   // everything up to this one is on the disk
  bool syncing = false;  // one thread is in fdatasync, the others wait for it
  std::string failure;   // not empty: the latched error

  std::mutex drop_mutex;      // one drop_through at a time
  std::vector<iovec> pieces;  // the appender's, kept for its memory

  void throw_if_failed() const {  // holding mutex
    if (!failure.empty()) throw StorageError(failure);
  }

  void latch(std::string_view operation, const std::string& what) {  // holding mutex
    if (!failure.empty()) return;
    failure.append("[").append(operation).append("] ").append(what);
    failure.append("; the log takes nothing more ").append(kUntilOpenedAgain);
  }

  [[noreturn]] void fail(std::string_view operation, const std::string& what) {
    const std::lock_guard lock(mutex);
    latch(operation, what);
    throw StorageError(failure);
  }

  // A new segment file, durable with its name. Until the rename nothing has changed.
  std::shared_ptr<Segment> create_segment(uint64_t number, uint64_t first_sequence, std::string_view state) {
    const std::filesystem::path path = options.directory / segment_name(number);
    const std::string head = encode_segment_head(options.storage_id, number, first_sequence, state);
    auto segment = std::make_shared<Segment>();
    segment->number = number;
    segment->seed = segment_seed(options.storage_id, number);
    segment->first_sequence = first_sequence;
    segment->end = head.size();
    const std::filesystem::path temporary = path.string() + ".tmp";
    segment->file = FileDescriptor("create a log segment", temporary, O_RDWR | O_CREAT | O_TRUNC);
    try {
      segment->file.write_at(std::as_bytes(std::span(head)), 0);
      if (!planted("segment renamed before it is synced")) segment->file.sync();
      segment->file.rename_to(path);
    } catch (...) {
      ::unlink(temporary.c_str());
      throw;
    }
    try {
      if (!planted("segment's name not synced")) directory.sync();
    } catch (const StorageError& error) {
      // The new segment may or may not be there after power loss; records in either could be lost.
      fail("create a log segment", error.what());
    }
    return segment;
  }

  // Waits until everything up to `sequence` is on the disk; the first thread here syncs for all that came before it.
  void sync_to(uint64_t sequence) {
    if (!written) return;
    std::unique_lock lock(mutex);
    sequence = std::min(sequence, last);
    for (;;) {
      throw_if_failed();
      if (synced >= sequence) return;
      if (!syncing) break;
      synced_more.wait(lock);
    }
    syncing = true;
    const std::shared_ptr<Segment> segment = current;
    const SyncMark mark{segment->end, last};
    lock.unlock();
    std::string error;
    try {
      if (planted("mark before the log's sync")) write_mark(*segment, mark);
      if (!planted("log never synced")) segment->file.sync_data();
      write_mark(*segment, mark);
    } catch (const std::exception& refused) {
      error = refused.what();
    }
    lock.lock();
    syncing = false;
    // Latched before anybody else can try: the kernel may have dropped what it could not write and call it clean from
    // now on, so a second attempt that succeeds proves nothing.
    if (error.empty())
      synced = planted("sync covers what came meanwhile") ? last : mark.sequence;
    else if (!planted("failed sync forgotten"))
      latch("sync the log", error);
    synced_more.notify_all();
    throw_if_failed();
  }

  // After the sync it tells of. Not synced itself: an older mark is as true, it only says less.
  static void write_mark(Segment& segment, const SyncMark& mark) {
    const std::string bytes = encode_sync_mark(mark, segment.seed);
    segment.file.write_at(std::as_bytes(std::span(bytes)), sync_mark_offset(segment.next_slot));
    segment.next_slot ^= 1;
  }

  void recover(const std::function<void(uint64_t, std::string_view)>& on_state,
               const std::function<void(const LogRecord&)>& on_record, uint64_t dropped);
  void pass_over_dropped(SegmentFiles& files, uint64_t dropped) const;
  void settle_end(Segment& segment, const SyncMark& mark, uint64_t file_bytes);
};

void OperationLog::Impl::recover(const std::function<void(uint64_t, std::string_view)>& on_state,
                                 const std::function<void(const LogRecord&)>& on_record, uint64_t dropped) {
  SegmentFiles files = list_segments(options.directory);
  if (files.segments.empty())
    throw CorruptionError("[read] the log " + options.directory.string() + " has no segment, expected at least one");
  pass_over_dropped(files, dropped);
  const uint64_t oldest = files.segments.begin()->first;
  const uint64_t newest = files.segments.rbegin()->first;
  uint64_t expected = oldest;
  for (const auto& [number, path] : files.segments) {
    if (number != expected)
      throw CorruptionError("[read] the log " + options.directory.string() + " has no segment " +
                            segment_name(expected) + ", but later ones");
    ++expected;
    FileDescriptor file("read the log", path, number == newest ? O_RDWR : O_RDONLY);
    SegmentReader reader(file, options.storage_id);
    reader.expect(number, number == oldest ? std::nullopt : std::optional(last));
    if (number == oldest) {
      on_state(reader.first_sequence(), reader.state());
      last = reader.first_sequence() - 1;
    }
    // Rows redone may be evicted at once, so no record is done again that is not on the disk: what the process of
    // before had not synced, or tried to in vain, may be in the page cache only.
    if (number == newest && !planted("redone before it is on the disk")) {
      file.write_again(reader.mark().offset, reader.file_bytes());
      file.sync_data();
    }
    read_records(reader, path, number == newest, last, on_record);
    if (number != newest) {
      finished.push_back({path, reader.offset(), last});
      ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED);
      continue;
    }
    // Everything is read, so now files may change.
    for (const auto& leftover : files.leftovers) ::unlink(leftover.c_str());
    // The process that created the newest segment may have died before it made the name durable.
    directory.sync();
    current = std::make_shared<Segment>();
    current->number = number;
    current->seed = segment_seed(options.storage_id, number);
    current->first_sequence = reader.first_sequence();
    current->file = std::move(file);
    current->end = reader.offset();
    current->next_slot = reader.mark_slot() ^ 1;
    settle_end(*current, reader.mark(), reader.file_bytes());
  }
  synced = last;
}

// Takes the segments before the one that starts behind `dropped` for leftovers.
void OperationLog::Impl::pass_over_dropped(SegmentFiles& files, uint64_t dropped) const {
  if (dropped == 0) return;
  for (auto next = files.segments.rbegin(); next != files.segments.rend(); ++next) {
    const FileDescriptor file("read the log", next->second, O_RDONLY);
    const uint64_t first = SegmentReader(file, options.storage_id).first_sequence();
    if (first > dropped + 1) continue;
    if (first <= dropped)
      throw_damaged(next->second, 40,
                    "it starts with operation " + std::to_string(first) + ", but no segment starts behind " +
                        std::to_string(dropped) + ", where the log was cut");
    for (auto old = files.segments.begin(); old->first != next->first; old = files.segments.erase(old))
      files.leftovers.push_back(old->second);
    return;
  }
}

// Cuts what is behind the last record; what was read is on the disk already.
void OperationLog::Impl::settle_end(Segment& segment, const SyncMark& mark, uint64_t file_bytes) {
  if (file_bytes == segment.end && mark.offset == segment.end) return;
  if (planted("end of the log not settled")) return;
  if (file_bytes != segment.end) {
    segment.file.truncate(segment.end);
    segment.file.sync_data();
  }
  if (mark.offset != segment.end) write_mark(segment, {segment.end, last});
}

OperationLog::OperationLog(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
OperationLog::~OperationLog() = default;

std::unique_ptr<OperationLog> OperationLog::create(const LogOptions& options, uint64_t first_sequence,
                                                   std::string_view state) {
  if (first_sequence == 0)
    throw std::invalid_argument("[create the log] first_sequence is 0, expected 1 or more (0: before any operation)");
  if (!list_segments(options.directory).segments.empty())
    throw StorageError("[create the log] " + options.directory.string() +
                       " already holds a log; expected a directory without segments");
  auto impl = std::make_unique<Impl>(options);
  impl->current = impl->create_segment(1, first_sequence, state);
  impl->last = impl->synced = first_sequence - 1;
  return std::unique_ptr<OperationLog>(new OperationLog(std::move(impl)));
}

void OperationLog::replace_empty(const LogOptions& options, uint64_t first_sequence, std::string_view state) {
  write_file_atomically(options.directory / segment_name(1),
                        encode_segment_head(options.storage_id, 1, first_sequence, state));
}

std::unique_ptr<OperationLog> OperationLog::unwritten(uint64_t first_sequence) {
  auto impl = std::make_unique<Impl>();
  impl->last = impl->synced = first_sequence - 1;
  return std::unique_ptr<OperationLog>(new OperationLog(std::move(impl)));
}

void OperationLog::check_heads(const LogOptions& options, const std::function<void(std::string_view state)>& on_state) {
  const SegmentFiles files = list_segments(options.directory);
  for (const auto& [number, path] : files.segments) {
    const FileDescriptor file("read the log", path, O_RDONLY);
    const SegmentReader reader(file, options.storage_id);
    if (number == files.segments.begin()->first) on_state(reader.state());
  }
}

std::unique_ptr<OperationLog> OperationLog::recover(
    const LogOptions& options, const std::function<void(uint64_t first_sequence, std::string_view state)>& on_state,
    const std::function<void(const LogRecord&)>& on_record, uint64_t dropped) {
  auto impl = std::make_unique<Impl>(options);
  impl->recover(on_state, on_record, dropped);
  return std::unique_ptr<OperationLog>(new OperationLog(std::move(impl)));
}

uint64_t OperationLog::append(RecordType type, std::span<const Bytes> parts) {
  Impl& impl = *impl_;
  uint64_t sequence, start;
  {
    const std::lock_guard lock(impl.mutex);
    impl.throw_if_failed();
    if (!impl.written) return ++impl.last;
    sequence = impl.last + 1;
    start = impl.current->end;
  }
  Segment& segment = *impl.current;  // replaced by the appender only, and that is us

  const std::string header = encode_record_header(type, sequence, parts, segment.seed);
  uint64_t end = start;
  impl.pieces.clear();
  const auto put = [&](Bytes bytes) {
    impl.pieces.push_back({const_cast<std::byte*>(bytes.data()), bytes.size()});
    end += bytes.size();
  };
  put(std::as_bytes(std::span(header)));
  for (const Bytes part : parts) put(part);
  put(Bytes(kZeros).first(record_padding(end - start)));  // the header's length is a multiple of 8 too

  if (!write_pieces(segment.file.get(), impl.pieces, start)) {
    const int error = errno;
    if (planted("failed append not taken back")) throw_system_error("append to the log", segment.file.path(), error);
    try {
      segment.file.truncate(start);
    } catch (const StorageError& refused) {
      impl.fail("append to the log", std::generic_category().message(error) + ", and then " + refused.what());
    }
    throw_system_error("append to the log", segment.file.path(), error);
  }
  {
    const std::lock_guard lock(impl.mutex);
    segment.end = end;
    impl.last = sequence;
  }
  write_back(segment, end);
  return sequence;
}

void OperationLog::sync() { impl_->sync_to(UINT64_MAX); }
void OperationLog::sync_to(uint64_t sequence) { impl_->sync_to(sequence); }

uint64_t OperationLog::synced_sequence() const noexcept {
  const std::lock_guard lock(impl_->mutex);
  return impl_->synced;
}

void OperationLog::note_synced(uint64_t sequence) noexcept {
  const std::lock_guard lock(impl_->mutex);
  impl_->synced = sequence;
}

uint64_t OperationLog::last_sequence() const noexcept {
  const std::lock_guard lock(impl_->mutex);
  return impl_->last;
}

bool OperationLog::should_rotate() const noexcept {
  const std::lock_guard lock(impl_->mutex);
  return impl_->written && impl_->current->end > impl_->options.segment_bytes;
}

bool OperationLog::newest_segment_is_empty() const noexcept {
  const std::lock_guard lock(impl_->mutex);
  return !impl_->written || impl_->last < impl_->current->first_sequence;
}

void OperationLog::rotate(std::string_view state) {
  Impl& impl = *impl_;
  if (!impl.written) return;
  if (!planted("segment left unsynced")) impl.sync_to(UINT64_MAX);
  // Nobody syncs the old segment from here on: everything in it is synced.
  const std::shared_ptr<Segment> old = impl.current;
  std::list<Finished> entry{{old->file.path(), old->end, impl.last}};
  auto next = impl.create_segment(old->number + 1, impl.last + 1, state);
  ::posix_fadvise(old->file.get(), 0, 0, POSIX_FADV_DONTNEED);
  // Nothing from here on can fail: a segment that exists must be the one that is appended to.
  const std::lock_guard lock(impl.mutex);
  impl.finished.splice(impl.finished.end(), entry);
  impl.current = std::move(next);
}

void OperationLog::drop_through(uint64_t sequence) {
  Impl& impl = *impl_;
  const std::lock_guard one_at_a_time(impl.drop_mutex);
  for (;;) {
    std::filesystem::path path;
    {
      const std::lock_guard lock(impl.mutex);
      if (impl.finished.empty() || impl.finished.front().last_sequence > sequence) return;
      path = impl.finished.front().path;
    }
    // The directory is not synced: file systems keep the order of removals, and a segment that comes back after power
    // loss is only read once more. The oldest goes first, so what is left never has a gap.
    if (::unlink(path.c_str()) != 0 && errno != ENOENT) throw_system_error("drop a log segment", path);
    const std::lock_guard lock(impl.mutex);
    impl.finished.pop_front();
  }
}

uint64_t OperationLog::bytes() const noexcept {
  const std::lock_guard lock(impl_->mutex);
  uint64_t total = impl_->written ? impl_->current->end : 0;
  for (const Finished& segment : impl_->finished) total += segment.bytes;
  return total;
}

std::filesystem::path OperationLog::directory() const { return impl_->options.directory; }

}  // namespace damo
