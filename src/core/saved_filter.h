// SPDX-License-Identifier: Apache-2.0
//
// The file of a filter inside a storage: the counters after one operation, whole. What came later is in the operation
// log. docs/format.md has the bytes; they are those of filter_format.h, sealed for one storage, table and moment.
//
// A file never changes once it has its name. So a checkpoint may share it, and damage is CorruptionError with the file
// and the offset, never a filter that has forgotten something.
#pragma once

#include <cstdint>
#include <exception>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "counting_bloom_filter.h"
#include "file.h"
#include "filter_format.h"
#include "log_segment.h"

namespace damo {

// Whose filter, and after which operation.
struct SavedFilter {
  StorageId storage_id{};
  uint32_t table_id = 0;
  uint64_t sequence = 0;

  std::string name() const;  // "filter-1-42"
  uint64_t seed() const;     // of its checksums
};
// Whether a file of a generation has such a name, or had it while it was written.
bool is_name_of_saved_filter(const std::string& name);

// The file of that name in `directory`; CorruptionError: it is missing.
FileDescriptor open_saved_filter(const std::filesystem::path& directory, const SavedFilter& saved);
// Fills an empty `filter` from the file. CorruptionError: it is damaged, of another storage, table, moment, or other
// settings.
void read_saved_filter(const FileDescriptor& file, const SavedFilter& saved, CountingBloomFilter& filter);
void read_saved_filter(const std::filesystem::path& directory, const SavedFilter& saved, CountingBloomFilter& filter);

// Verifies the file and writes it once more as that of another storage, synced; the directory is not.
void reseal_saved_filter(const std::filesystem::path& from_directory, const SavedFilter& from,
                         const FilterSettings& settings, const std::filesystem::path& to_directory,
                         const SavedFilter& to);

// Writes the filter of one moment while it is added to: a chunk that is about to change is written first, by the thread
// that changes it; save() writes the others. So a filter needs no second copy in memory, and an add waits for its own
// chunks at most.
//
// Made and ended by who holds the lock under which keys are added.
class FilterSaver {
 public:
  // begin_cut()s the filter. Nothing is written yet.
  FilterSaver(const std::filesystem::path& directory, const SavedFilter& saved,
              std::shared_ptr<CountingBloomFilter> filter);
  ~FilterSaver();  // removes what a save that did not get to its end has left
  FilterSaver(const FilterSaver&) = delete;
  FilterSaver& operator=(const FilterSaver&) = delete;

  const SavedFilter& saved() const noexcept { return saved_; }
  // Writes what is left, syncs the file and gives it its name; the directory is not synced. No lock held. On an error
  // no file is left; what an add could not write is told here.
  void save();
  void end() noexcept { filter_->end_cut(); }  // the lock held: adds do not come here any more

 private:
  void write(size_t index);

  std::filesystem::path path_, staged_;
  SavedFilter saved_;
  std::shared_ptr<CountingBloomFilter> filter_;
  uint64_t adds_;
  std::mutex mutex_;  // protects what follows: one chunk is written at a time
  FileDescriptor file_;
  std::vector<uint8_t> written_;
  std::vector<uint64_t> checksums_;
  std::exception_ptr error_;
};

}  // namespace damo
