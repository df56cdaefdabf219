// SPDX-License-Identifier: Apache-2.0
//
// What the operations on the rows of a table share: table.cc, table_updates.cc.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "batch.h"
#include "error.h"
#include "tiers.h"

namespace damo {

inline std::vector<uint32_t> all_rows(const Batch& batch) {
  std::vector<uint32_t> rows(batch.num_rows());
  std::iota(rows.begin(), rows.end(), 0u);
  return rows;
}

template <class Visit>
void for_each_chunk(std::span<const uint32_t> rows, size_t size, Visit&& visit) {
  for (size_t begin = 0; begin < rows.size(); begin += size)
    visit(rows.subspan(begin, std::min(size, rows.size() - begin)));
}

// Changes memory after the record is in the log. Only memory can run out here: then the storage latches, while the
// structure lock is still held, so that no row of which only a part was changed is ever written; redo does it all.
// (Where rows are brought in part by part after the record, it is around all of that, too: nothing more may happen
// then.)
template <class Change>
void after_log(Tiers& tiers, Change&& change) {
  try {
    change();
  } catch (...) {
    tiers.fail(with_way_out(std::current_exception()));
    throw;
  }
}

inline void check_positions(const char* operation, size_t positions) {
  if (positions >= Batch::kMaxPositions)
    throw std::invalid_argument(std::string("[") + operation + "] " + std::to_string(positions) +
                                " keys in one call, expected fewer than 2147483648: split the batch");
}

}  // namespace damo
