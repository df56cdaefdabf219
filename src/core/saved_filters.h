// SPDX-License-Identifier: Apache-2.0
//
// All filters of a storage that have counted keys since they were saved, on their way into the files of one cut.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "saved_filter.h"
#include "storage.h"

namespace damo {

class Storage::SavedFilters {
 public:
  SavedFilters(Storage& storage, std::filesystem::path directory);
  ~SavedFilters();
  SavedFilters(const SavedFilters&) = delete;
  SavedFilters& operator=(const SavedFilters&) = delete;

  void begin(uint64_t sequence);  // the order lock is held: no add before the cut is missing, none after it is in
  void save();                    // no lock but cutting_; on return the files have their names, durably
  bool empty() const noexcept { return savers_.empty(); }
  void note_in(Manifest& manifest) const;  // that these are the groups' files

 private:
  void end() noexcept;

  Storage& storage_;
  std::filesystem::path directory_;
  std::vector<std::unique_ptr<FilterSaver>> savers_;
  bool ended_ = false;
};

}  // namespace damo
