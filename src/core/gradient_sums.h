// SPDX-License-Identifier: Apache-2.0
//
// The gradients of a batch's positions, added up for each distinct key.
#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "batch.h"
#include "thread_pool.h"

namespace damo {

// Adds gradients[position] to sums[index[position]] in order of appearance, in float32, whatever the number of
// threads. `sums` is [rows, dimension], need not be zeroed. Each part is one batch's positions in the index of `batch`.
void sum_gradients(const Batch& batch, std::span<const float* const> parts, std::span<const size_t> part_positions,
                   size_t dimension, ThreadPool& pool, float* sums);

// The first row of `sums` that holds NaN or infinity.
std::optional<size_t> first_not_finite(const float* sums, size_t rows, size_t dimension, ThreadPool& pool);

}  // namespace damo
