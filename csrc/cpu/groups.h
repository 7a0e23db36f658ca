// One group of kLanes elements between memory and the registers of an inner loop, whatever the dtype in memory. Groups
// pass through arrays of kLanes that the compiler keeps in registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "convert.h"
#include "simd.h"
#include "unit.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {

template <typename T, typename Stored>
FUSED_ELBO_INLINE void widen_group(const Stored* from, T* lanes) {
  FUSED_ELBO_INDEPENDENT
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<T>(widen(from[lane]));
}

template <typename T, typename Stored>
FUSED_ELBO_INLINE void narrow_group(const T* lanes, Stored* to) {
  FUSED_ELBO_INDEPENDENT
  for (int lane = 0; lane < kLanes; ++lane) narrow(lanes[lane], to[lane]);
}

#if defined(__AVX512F__)
// g++ would convert two halves, and wait for both to be stored before it reads them as one register.
FUSED_ELBO_INLINE void widen_group(const BFloat16* from, float* lanes) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm512_storeu_si512(lanes, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FUSED_ELBO_INLINE void narrow_group(const float* lanes, BFloat16* to) {
  const __m512 x = _mm512_loadu_ps(lanes);
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i result =
      _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
}
FUSED_ELBO_INLINE void widen_group(const Float16* from, float* lanes) {
  _mm512_storeu_ps(lanes, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
FUSED_ELBO_INLINE void narrow_group(const float* lanes, Float16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(_mm512_loadu_ps(lanes), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
FUSED_ELBO_INLINE void widen_group(const Float16* from, float* lanes) { widen_run(from, kLanes, lanes); }
FUSED_ELBO_INLINE void narrow_group(const float* lanes, Float16* to) { narrow_run(lanes, kLanes, to); }
#endif

// Whether groups from here on can be streamed.
FUSED_ELBO_INLINE bool is_line(const void* at) { return reinterpret_cast<uintptr_t>(at) % 64 == 0; }

template <typename Stored>
FUSED_ELBO_INLINE void stream_group(const Stored* lanes, Stored* to) {
  stream<kLanes * sizeof(Stored)>(reinterpret_cast<const char*>(lanes), reinterpret_cast<char*>(to));
}

// Where a loop finds the group that begins at from: where it is, or converted in lanes.
template <typename T, typename Stored>
FUSED_ELBO_INLINE const T* read_group(const Stored* from, T* lanes) {
  if constexpr (std::is_same_v<T, Stored>) {
    return from;
  } else {
    widen_group(from, lanes);
    return lanes;
  }
}

// Where a loop leaves the group that begins at to; write_group then brings it there.
template <bool kStream, typename T, typename Stored>
FUSED_ELBO_INLINE T* group_at(Stored* to, T* lanes) {
  if constexpr (std::is_same_v<T, Stored> && !kStream) {
    return to;
  } else {
    return lanes;
  }
}
template <bool kStream, typename T, typename Stored>
FUSED_ELBO_INLINE void write_group(const T* lanes, Stored* to) {
  if constexpr (std::is_same_v<T, Stored>) {
    if constexpr (kStream) stream_group(lanes, to);
  } else if constexpr (kStream) {
    alignas(64) Stored narrowed[kLanes];
    narrow_group(lanes, narrowed);
    stream_group(narrowed, to);
  } else {
    narrow_group(lanes, to);
  }
}

// Fetches a step of the next unit while this one is worked on: processors that foresee addresses stop at the end of a
// page, and a unit is about a page.
template <typename Stored>
FUSED_ELBO_INLINE void fetch_step(const Stored* next) {
  constexpr int kLine = 64;
  for (int byte = 0; byte < kStep * static_cast<int>(sizeof(Stored)); byte += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(next) + byte);
  }
}

// group(i) for every group of count elements, and fetch(i) before each step of them.
template <class Fetch, class Group>
FUSED_ELBO_INLINE void for_groups(int64_t count, Fetch fetch, Group group) {
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    fetch(i);
    for (int k = 0; k < kStep; k += kLanes) group(i + k);
  }
  for (; i < count; i += kLanes) group(i);
}

// What sum_groups adds up of the values that it is given. Products and sums are joined explicitly: left to the
// compiler, two forms of one loop might round differently.
struct Values {
  template <typename T>
  FUSED_ELBO_INLINE static T one(T a) {
    return a;
  }
  template <typename T>
  FUSED_ELBO_INLINE static T two(T a, T b) {
    return a + b;
  }
};
struct Squares {
  template <typename T>
  FUSED_ELBO_INLINE static T one(T a) {
    return a * a;
  }
  template <typename T>
  FUSED_ELBO_INLINE static T two(T a, T b) {
    return math::fma(a, a, b * b);
  }
};

// The sum of what group(i, values) yields for kLanes elements from i on. Four terms are added in their own type before
// they are widened: three roundings, a quarter of the conversions.
template <class Terms, typename T, class Fetch, class Group>
FUSED_ELBO_INLINE double sum_groups(int64_t count, Fetch fetch, Group group) {
  Sums sums;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    fetch(i);
    alignas(64) T a[kLanes], b[kLanes], c[kLanes], d[kLanes], sum[kLanes];
    group(i, a);
    group(i + kLanes, b);
    group(i + 2 * kLanes, c);
    group(i + 3 * kLanes, d);
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) {
      sum[lane] = Terms::two(a[lane], b[lane]) + Terms::two(c[lane], d[lane]);
    }
    sums.add(sum);
  }
  for (; i < count; i += kLanes) {
    alignas(64) T a[kLanes];
    group(i, a);
    FUSED_ELBO_INDEPENDENT
    for (int lane = 0; lane < kLanes; ++lane) a[lane] = Terms::one(a[lane]);
    sums.add(a);
  }
  return sums.total();
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
