// SPDX-License-Identifier: Apache-2.0
#include "budget.h"

#include <stdexcept>
#include <string>

namespace damo {

void check_filters_fit(const char* operation, size_t filters, size_t memory, bool more) {
  const size_t allowed = Budget(memory).filters();
  if (filters <= allowed) return;
  size_t enough = memory >> 20;
  while (Budget(++enough << 20).filters() < filters) {
  }
  throw std::invalid_argument(std::string("[") + operation + "] admission filters take " + std::to_string(filters) +
                              " bytes, of memory=" + std::to_string(memory) + " they may take " +
                              std::to_string(allowed) + ": open the storage with memory=\"" + std::to_string(enough) +
                              "MiB\" or more" +
                              (more ? ", or give the filter a smaller capacity or a higher fpr" : ""));
}

}  // namespace damo
