// SPDX-License-Identifier: Apache-2.0
#include "saved_filter.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <span>
#include <utility>

#include "error.h"
#include "format.h"

namespace damo {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "filter-";

// Reads the file's head, which must be that of the filter wanted, in a file of the right length.
FilterHead read_saved_head(const FileDescriptor& file, const SavedFilter& saved, const CountingBloomFilter& wanted) {
  const fs::path& path = file.path();
  FilterHead head = read_filter_head(file, saved.seed());
  if (head.settings != wanted.settings() || head.layout != wanted.layout())
    throw_damaged(path, 16,
                  "it is a filter with " + show_filter_settings(head.settings) + ", expected " +
                      show_filter_settings(wanted.settings()));
  const uint64_t end = filter_counters_end(wanted), size = file.bytes();
  if (size != end)
    throw_damaged(path, std::min(size, end),
                  "the file has " + std::to_string(size) + " bytes, expected " + std::to_string(end));
  if (head.mark.end != end || head.mark.synced != end || head.mark.boot != 0)
    throw_damaged(path, kFilterMarkOffset, "a mark that does not fit the file");
  return head;
}

}  // namespace

std::string SavedFilter::name() const {
  return std::string(kPrefix) + std::to_string(table_id) + "-" + std::to_string(sequence);
}

uint64_t SavedFilter::seed() const {
  std::string bytes;
  ByteWriter writer(bytes);
  writer.put_bytes(storage_id.data(), storage_id.size());
  writer.put(table_id);
  writer.put(sequence);
  return checksum64(std::as_bytes(std::span(bytes)));
}

bool is_name_of_saved_filter(const std::string& name) { return name.starts_with(kPrefix); }

FileDescriptor open_saved_filter(const fs::path& directory, const SavedFilter& saved) {
  const fs::path path = directory / saved.name();
  try {
    return FileDescriptor("open", path, O_RDONLY | O_NONBLOCK);
  } catch (const MissingFileError&) {
    throw CorruptionError("[open] the file " + path.string() +
                          ", which has how often keys were seen, is missing (damaged at offset 0): restore a"
                          " checkpoint");
  }
}

void read_saved_filter(const FileDescriptor& file, const SavedFilter& saved, CountingBloomFilter& filter) {
  const FilterHead head = read_saved_head(file, saved, filter);
  read_filter_counters(file, head, saved.seed(), filter);
}

void read_saved_filter(const fs::path& directory, const SavedFilter& saved, CountingBloomFilter& filter) {
  read_saved_filter(open_saved_filter(directory, saved), saved, filter);
}

void reseal_saved_filter(const fs::path& from_directory, const SavedFilter& from, const FilterSettings& settings,
                         const fs::path& to_directory, const SavedFilter& to) {
  const auto filter = std::make_shared<CountingBloomFilter>(settings);
  read_saved_filter(from_directory, from, *filter);
  FilterSaver saver(to_directory, to, filter);
  saver.save();
}

// -------------------------------------------------------------------- save

FilterSaver::FilterSaver(const fs::path& directory, const SavedFilter& saved,
                         std::shared_ptr<CountingBloomFilter> filter)
    : path_(directory / saved.name()),
      staged_(path_.string() + ".tmp"),
      saved_(saved),
      filter_(std::move(filter)),
      adds_(filter_->adds()),
      written_(filter_->num_chunks(), 0),
      checksums_(filter_->num_chunks(), 0) {
  filter_->begin_cut([this](size_t index) {
    const std::lock_guard lock(mutex_);
    write(index);
  });
}

FilterSaver::~FilterSaver() {
  if (file_.is_open()) ::unlink(staged_.c_str());
}

// With the mutex. Does not throw: the add that waits for it must go on.
void FilterSaver::write(size_t index) {
  if (error_ || written_[index] != 0) return;
  try {
    if (!file_.is_open()) file_ = FileDescriptor("save a filter", staged_, O_RDWR | O_CREAT | O_TRUNC);
    const Bytes chunk = filter_->chunk(index);
    checksums_[index] = filter_chunk_checksum(chunk, index, saved_.seed());
    file_.write_at(chunk, filter_chunk_offset(index));
    written_[index] = 1;
  } catch (...) {
    error_ = std::current_exception();
  }
}

void FilterSaver::save() {
  for (size_t i = 0; i < written_.size(); ++i) {
    const std::lock_guard lock(mutex_);
    write(i);
    if (error_) std::rethrow_exception(error_);
  }
  const std::lock_guard lock(mutex_);
  const uint64_t end = filter_counters_end(*filter_);
  const std::string head = encode_filter_head(*filter_, adds_, {end, end, 0}, saved_.seed());
  file_.write_at(std::as_bytes(std::span(head)), 0);
  const auto checksums = std::as_bytes(std::span(checksums_));
  file_.write_at(checksums, end - checksums.size());
  file_.sync();
  file_.rename_to(path_);
  file_ = FileDescriptor();
}

}  // namespace damo
