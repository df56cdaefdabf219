// SPDX-License-Identifier: Apache-2.0
//
// The operation log of a storage that somebody else may have open: read as it is at one moment, and left alone. Nothing
// is truncated, synced or removed.
//
// Beside a writer segments are appended to, created and removed. So the files are opened first and read later: one that
// is removed meanwhile can still be read. extend() fixes the moment: what was logged before it was called is in the
// view, and of what comes later perhaps a part, always a prefix.
//
// Errors: CorruptionError with file and offset, as OperationLog::recover. Beside a writer it may also be a moment that
// cannot be read (a segment came and went between two looks): then another view is tried.
// Thread safety: none; a view belongs to one thread.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string_view>

#include "file.h"
#include "log_segment.h"

namespace damo {

class LogView {
 public:
  // Opens the segments that there are.
  LogView(std::filesystem::path directory, const StorageId& storage_id);
  LogView(const LogView&) = delete;
  LogView& operator=(const LogView&) = delete;

  // Opens those that came since. The view ends where the newest one ends now.
  void extend();
  // As OperationLog::recover, up to that end. Once.
  void read(const std::function<void(uint64_t first_sequence, std::string_view state)>& on_state,
            const std::function<void(const LogRecord&)>& on_record, uint64_t dropped);

  size_t num_segments() const noexcept { return segments_.size(); }
  uint64_t bytes() const;                                                // of all segments
  uint64_t synced_sequence() const { return newest_->mark().sequence; }  // as the newest segment's mark says
 private:
  using Segments = std::map<uint64_t, FileDescriptor>;
  void open_new_segments();
  Segments::const_iterator begin_behind(uint64_t dropped) const;

  const std::filesystem::path directory_;
  const StorageId storage_id_;
  Segments segments_;  // by number
  std::optional<SegmentReader> newest_;
};

}  // namespace damo
