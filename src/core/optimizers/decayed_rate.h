// SPDX-License-Identifier: Apache-2.0
//
// The rate of a row's update `count` under torch.optim.Adagrad's lr_decay:
//   lr / (1 + (count - 1) * lr_decay)
// in doubles, then rounded. Saturating counts are fine: the rate stays.
#pragma once

#include <cstdint>

namespace damo {

// With lr_decay 0 there is nothing to compute for a row.
template <bool kFalls>
struct DecayedRate {
  double lr;
  double lr_decay;
  constexpr float at(uint32_t count) const noexcept {
    if constexpr (!kFalls) return static_cast<float>(lr);
    return static_cast<float>(lr / (1.0 + static_cast<double>(count - 1) * lr_decay));
  }
};

}  // namespace damo
