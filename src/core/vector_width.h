// SPDX-License-Identifier: Apache-2.0
//
// Which of the compiled widths of a loop runs. Each such loop is written once,
// inlined into one function a width, and chosen by a branch a batch: an explicit
// form of function multiversioning, which lets a test run both and which
// sanitizers and both compilers take alike. Elementwise IEEE operations give the
// same bits at every width.
#pragma once

#include <atomic>

namespace damo {

enum class VectorWidth { kBaseline, kAvx2 };  // SSE2, which every x86-64 has; AVX2 without fused multiply-add

inline VectorWidth widest_vectors() noexcept {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return VectorWidth::kAvx2;
#endif
  return VectorWidth::kBaseline;
}

// The widest this processor has. Tests may set it lower; results must not change.
inline std::atomic<VectorWidth>& vector_width() noexcept {
  static std::atomic<VectorWidth> width = widest_vectors();
  return width;
}

}  // namespace damo

// In front of a loop that is inlined into the functions of each width.
#define DAMO_INLINE_IN_EVERY_WIDTH [[gnu::always_inline]] inline
// In front of the AVX2 function. It leaves FMA out, so that no compiler can fuse.
#if defined(__x86_64__)
#define DAMO_TARGET_AVX2 [[gnu::target("avx2")]]
#else
#define DAMO_TARGET_AVX2
#endif
// In front of a short loop of known length: GCC 12 would unroll it whole before it vectorizes, and then finds
// less to vectorize (dimension 8: 2.5 times slower).
#if defined(__GNUC__) && !defined(__clang__)
#define DAMO_VECTORIZE_BEFORE_UNROLLING _Pragma("GCC unroll 1")
#else
#define DAMO_VECTORIZE_BEFORE_UNROLLING
#endif
