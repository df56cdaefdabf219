// SPDX-License-Identifier: Apache-2.0
#include "log_view.h"

#include <fcntl.h>

#include <iterator>
#include <string>
#include <utility>

namespace damo {

LogView::LogView(std::filesystem::path directory, const StorageId& storage_id)
    : directory_(std::move(directory)), storage_id_(storage_id) {
  open_new_segments();
}

void LogView::open_new_segments() {
  const uint64_t newest = segments_.empty() ? 0 : segments_.rbegin()->first;
  for (const auto& [number, path] : list_segments(directory_).segments)
    if (number > newest) segments_.emplace(number, FileDescriptor("read the log", path, O_RDONLY));
}

void LogView::extend() {
  open_new_segments();
  if (segments_.empty())
    throw CorruptionError("[read] the log " + directory_.string() + " has no segment, expected at least one");
  uint64_t expected = segments_.begin()->first;
  for (const auto& segment : segments_) {
    if (segment.first != expected)
      throw CorruptionError("[read] the log " + directory_.string() + " has no segment " + segment_name(expected) +
                            ", but later ones");
    ++expected;
  }
  // The others are whole: a segment is created when the one before it takes nothing more.
  newest_.emplace(segments_.rbegin()->second, storage_id_);
}

uint64_t LogView::bytes() const {
  uint64_t total = 0;
  for (const auto& segment : segments_)
    total += segment.first == newest_->number() ? newest_->file_bytes() : segment.second.bytes();
  return total;
}

// Passes over segments that were to be removed when the log was cut after that operation.
LogView::Segments::const_iterator LogView::begin_behind(uint64_t dropped) const {
  if (dropped == 0) return segments_.begin();
  for (auto next = std::prev(segments_.end());; --next) {
    const uint64_t first = SegmentReader(next->second, storage_id_).first_sequence();
    if (first == dropped + 1) return next;
    if (first <= dropped)
      throw_damaged(next->second.path(), 40,
                    "it starts with operation " + std::to_string(first) + ", but no segment starts behind " +
                        std::to_string(dropped) + ", where the log was cut");
    if (next == segments_.begin()) return next;
  }
}

void LogView::read(const std::function<void(uint64_t first_sequence, std::string_view state)>& on_state,
                   const std::function<void(const LogRecord&)>& on_record, uint64_t dropped) {
  const auto begin = begin_behind(dropped);
  uint64_t last = 0;
  for (auto at = begin; at != segments_.end(); ++at) {
    const std::filesystem::path& path = at->second.path();
    const bool is_newest = std::next(at) == segments_.end();
    std::optional<SegmentReader> finished;
    if (!is_newest) finished.emplace(at->second, storage_id_);
    SegmentReader& reader = is_newest ? *newest_ : *finished;
    reader.expect(at->first, at == begin ? std::nullopt : std::optional(last));
    if (at == begin) {
      on_state(reader.first_sequence(), reader.state());
      last = reader.first_sequence() - 1;
    }
    read_records(reader, path, is_newest, last, on_record);
    // Read once, and not to push anything else out of the page cache.
    if (!is_newest) ::posix_fadvise(at->second.get(), 0, 0, POSIX_FADV_DONTNEED);
  }
}

}  // namespace damo
