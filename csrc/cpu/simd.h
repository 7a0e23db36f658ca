// The instruction-set level a kernel file is compiled for, and the few vector operations that plain loops do not give.
// A level's code lives in fused_elbo::cpu::<level>; nothing here or above it may end up outside that namespace.
#pragma once

#include <cstdint>

#include "../args.h"

#if !defined(FUSED_ELBO_ISA)
#error "compile the kernel files with -DFUSED_ELBO_ISA=v2, v3, v4 or generic"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
// g++ 12 warns about the undefined vectors inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define FUSED_ELBO_INLINE __attribute__((always_inline)) inline
// The loop's iterations are independent: the pointers in it never overlap. Small loops are not to be unrolled, because
// g++ does that before it vectorizes, and then tests at run time whether the pointers overlap after all.
#define FUSED_ELBO_INDEPENDENT _Pragma("GCC ivdep") _Pragma("GCC unroll 1")

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

// Asks for cache lines that are going to be written: fresh outputs lie in memory that no core holds, and stores that
// wait for it fill their queue.
template <typename T>
FUSED_ELBO_INLINE void fetch_for_writing(T* to, int64_t count) {
#if defined(__x86_64__)
  // Not __builtin_prefetch: without -mprfchw it fetches for reading. Processors without the instruction ignore it.
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) asm volatile("prefetchw %0" ::"m"(to[i]));
#else
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(to + i, 1);
#endif
}

// Copies kBytes, a multiple of 16, to a multiple of its registers' size, past the caches: saves reading what the lines
// held before.
template <int kBytes>
FUSED_ELBO_INLINE void stream(const char* from, char* to) {
#if defined(__AVX512F__)
  if constexpr (kBytes % 64 == 0) {
    for (int i = 0; i < kBytes; i += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    }
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (kBytes % 32 == 0) {
    for (int i = 0; i < kBytes; i += 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    }
    return;
  }
#endif
#if defined(__SSE2__)
  for (int i = 0; i < kBytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#else
  __builtin_memcpy(to, from, kBytes);
#endif
}

// 32-bit lanes of the widest register.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

// Elements per step of every inner loop, whatever the level: one register of the widest level.
constexpr int kLanes = 16;

typedef float FloatVector __attribute__((vector_size(4 * kWidth)));
typedef int32_t IndexVector __attribute__((vector_size(4 * kWidth)));
typedef uint64_t WordVector __attribute__((vector_size(4 * kWidth)));

// Product of the lower halves; the upper halves are ignored.
FUSED_ELBO_INLINE WordVector multiply_low_halves(WordVector a, WordVector b) {
#if defined(__AVX512F__)
  return (WordVector)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (WordVector)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (WordVector)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

FUSED_ELBO_INLINE WordVector xor3(WordVector a, WordVector b, WordVector c) {
#if defined(__AVX512F__)
  return (WordVector)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// Vectors of 32-bit words: the lower (higher) halves of even at even places, those of odd at odd places.
FUSED_ELBO_INLINE WordVector join_low(WordVector even, WordVector odd) {
#if defined(__AVX512F__)
  return (WordVector)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
  return (WordVector)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
#else
  return (even & 0xffffffffu) | (odd << 32);
#endif
}
FUSED_ELBO_INLINE WordVector join_high(WordVector even, WordVector odd) {
#if defined(__AVX512F__)
  return (WordVector)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, _MM_PERM_DDBB);
#elif defined(__AVX2__)
  return (WordVector)_mm256_blend_epi32((__m256i)(even >> 32), (__m256i)odd, 0xaa);
#else
  return (even >> 32) | (odd & ~uint64_t{0xffffffffu});
#endif
}
// The lower halves in both.
FUSED_ELBO_INLINE WordVector both_halves(WordVector words) { return join_low(words, words); }

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
