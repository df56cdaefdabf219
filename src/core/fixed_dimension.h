// SPDX-License-Identifier: Apache-2.0
//
// Loops over a row's floats are unrolled where the compiler knows the dimension.
#pragma once

#include <cstddef>
#include <type_traits>

namespace damo {

// Calls work(std::integral_constant<size_t, D>) with the dimension, if it is a usual one, else with 0: taken at run
// time.
template <class Work>
void with_fixed_dimension(size_t dimension, Work&& work) {
  switch (dimension) {
    case 8:
      return work(std::integral_constant<size_t, 8>{});
    case 16:
      return work(std::integral_constant<size_t, 16>{});
    case 32:
      return work(std::integral_constant<size_t, 32>{});
    case 64:
      return work(std::integral_constant<size_t, 64>{});
    default:
      return work(std::integral_constant<size_t, 0>{});
  }
}

}  // namespace damo
