// SPDX-License-Identifier: Apache-2.0
//
// What Storage::verify finds and Storage::salvage brings back. rescue.cc has both.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace damo {

// One thing that is damaged, as narrowly as it can be told.
struct Damage {
  std::string file;  // or the directory, when it is not known which of its files
  std::string what;
  std::optional<uint32_t> group{};
  std::optional<uint64_t> key{};                         // of one row
  std::optional<std::pair<uint64_t, uint64_t>> mixed{};  // rows whose mixed keys lie from .first to .second, both in
};

struct VerifyReport {
  uint64_t rows = 0;     // read and whole, those that have expired included
  uint64_t files = 0;    // table files and segments read from start to end
  uint64_t bytes = 0;    // of them
  uint64_t records = 0;  // of the log
  std::vector<Damage> damages{};
};

struct SalvageReport {
  uint64_t rows = 0;     // in the new storage
  uint64_t records = 0;  // of the log, done again
  std::vector<Damage> lost{};
};

}  // namespace damo
