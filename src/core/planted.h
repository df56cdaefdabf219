// SPDX-License-Identifier: Apache-2.0
//
// Planted defects: ways in which such stores lose data, each one line at its place, to see whether the suites of
// tests/python/reliability notice. Built only with the CMake option DAMO_PLANTED_DEFECTS, which no release has; then
// the environment variable DAMO_DEFECT names the one that is live. Otherwise planted() is false at compile time.
#pragma once

#include <cstdlib>
#include <string_view>

namespace damo {

#if defined(DAMO_PLANTED_DEFECTS)
inline bool planted(std::string_view defect) noexcept {
  static const char* const live = std::getenv("DAMO_DEFECT");
  return live != nullptr && defect == live;
}
#else
constexpr bool planted(std::string_view) noexcept { return false; }
#endif

}  // namespace damo
