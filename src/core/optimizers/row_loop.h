// SPDX-License-Identifier: Apache-2.0
//
// The loop over a batch of rows, shared by the optimizers. An optimizer brings a
// Kernel, the arithmetic of one row:
//
//   struct Kernel {
//     // constants of the step, floats already
//     static constexpr size_t state_floats(size_t dimension) noexcept { return 2 * dimension; }
//     template <size_t kDimension>  // 0: any, in `dimension`
//     DAMO_INLINE_IN_EVERY_WIDTH void update(const RowUpdate& row, size_t dimension) const noexcept;
//   };
//
// and update_each_row(kernel, dimension, rows) compiles it for each vector width
// and for the common dimensions, whose loops then need no remainder.
//
// Determinism: a kernel computes each weight from that weight's own numbers with
// +, -, *, /, sqrt, comparisons and signs in float32, so neither the width nor the
// specialisation can change a bit; a sum over a row has an order of its own, the
// same at every width (rowwise_adagrad.cc). The build must not contract a*b+c
// (-ffp-contract=off); the AVX2 functions leave the instruction out of reach as well.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "../optimizer.h"
#include "../vector_width.h"

namespace damo {

inline constexpr size_t kCacheLine = 64;

// How many rows ahead to prefetch. 4 to 16 measure alike on scattered rows (2 to 3 ms for 60,000 rows of Adam,
// dimension 16, in huge pages; 14 without prefetching).
inline constexpr size_t kPrefetchRows = 8;

DAMO_INLINE_IN_EVERY_WIDTH void prefetch_floats(const float* begin, size_t count) noexcept {
  const char* bytes = reinterpret_cast<const char*>(begin);
  for (size_t at = 0; at < count * sizeof(float); at += kCacheLine) __builtin_prefetch(bytes + at, 1);
  // A row need not start on a line; its last float may lie one further.
  if (count != 0) __builtin_prefetch(begin + count - 1, 1);
}

template <size_t kDimension, class Kernel>
DAMO_INLINE_IN_EVERY_WIDTH void update_rows_of(const Kernel& kernel, size_t dimension,
                                               std::span<const RowUpdate> rows) noexcept {
  const size_t floats = kDimension != 0 ? kDimension : dimension;
  // Long rows stream by themselves after their first lines.
  const size_t ahead = std::min<size_t>(floats, 64);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i + kPrefetchRows < rows.size()) {
      const RowUpdate& next = rows[i + kPrefetchRows];
      prefetch_floats(next.weights, ahead);
      prefetch_floats(next.state, std::min<size_t>(Kernel::state_floats(floats), 128));
    }
    kernel.template update<kDimension>(rows[i], floats);
  }
}

template <class Kernel>
DAMO_INLINE_IN_EVERY_WIDTH void choose_dimension(const Kernel& kernel, size_t dimension,
                                                 std::span<const RowUpdate> rows) noexcept {
  switch (dimension) {
    case 8:
      return update_rows_of<8>(kernel, dimension, rows);
    case 16:
      return update_rows_of<16>(kernel, dimension, rows);
    case 32:
      return update_rows_of<32>(kernel, dimension, rows);
    case 64:
      return update_rows_of<64>(kernel, dimension, rows);
    default:
      return update_rows_of<0>(kernel, dimension, rows);
  }
}

template <class Kernel>
void update_each_row_baseline(const Kernel& kernel, size_t dimension, std::span<const RowUpdate> rows) noexcept {
  choose_dimension(kernel, dimension, rows);
}

template <class Kernel>
DAMO_TARGET_AVX2 void update_each_row_avx2(const Kernel& kernel, size_t dimension,
                                           std::span<const RowUpdate> rows) noexcept {
  choose_dimension(kernel, dimension, rows);
}

template <class Kernel>
void update_each_row(const Kernel& kernel, size_t dimension, std::span<const RowUpdate> rows) noexcept {
  if (vector_width().load(std::memory_order_relaxed) == VectorWidth::kAvx2) {
    update_each_row_avx2(kernel, dimension, rows);
  } else {
    update_each_row_baseline(kernel, dimension, rows);
  }
}

// Calls f<true>() or f<false>(), f being [&]<bool kCondition>() {...}: makes a condition of the step a loop of its own.
template <class F>
void choose_loop(bool condition, const F& f) {
  if (condition) {
    f.template operator()<true>();
  } else {
    f.template operator()<false>();
  }
}

}  // namespace damo
