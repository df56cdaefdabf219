// SPDX-License-Identifier: Apache-2.0
//
// How a storage divides its memory.
#pragma once

#include <algorithm>
#include <cstddef>

namespace damo {

// The budget, divided. What is left for rows and their index is the rest.
struct Budget {
  explicit Budget(size_t memory) {
    cache = memory / 8;                                                   // RocksDB: index, filters, blocks
    write = std::clamp<size_t>(memory / 16, size_t{2} << 20, 64u << 20);  // table files being written
    // Batches, records on their way to the log; and what does not follow the budget (threads, RocksDB's own objects),
    // which counts for most when the budget is small.
    scratch = std::max(memory / 8, std::min(memory / 4, size_t{16} << 20));
    presence = memory / 32;  // which keys are in the cold tier
    rows = memory - cache - write - scratch - presence;
  }
  size_t cache, write, scratch, presence, rows;
  // Of the memory for rows, what filters may have.
  size_t filters() const { return rows / 2; }
};

// std::invalid_argument when filters of that many bytes are more than `memory` has for them. `more`: one is being
// added.
void check_filters_fit(const char* operation, size_t filters, size_t memory, bool more);

}  // namespace damo
