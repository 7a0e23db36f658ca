// dtypes as the kernels see them: storage, the type that arithmetic runs in, and units of elements moved 16 bytes at a
// time.
#pragma once

#include "../args.h"
#include "pair.cuh"

namespace fused_elbo {
namespace cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Acc: all arithmetic and sums. kUnit: the elements one thread takes at once, a whole number of 16-byte accesses and of
// Philox counters (4 normals each).
template <typename T>
struct Traits;
template <>
struct Traits<float> {
  using Acc = float;
  static constexpr int kUnit = 4;
  static constexpr DType kDType = DType::kFloat32;
};
template <>
struct Traits<double> {
  using Acc = double;
  static constexpr int kUnit = 4;
  static constexpr DType kDType = DType::kFloat64;
};
template <>
struct Traits<BFloat16> {
  using Acc = float;
  static constexpr int kUnit = 8;
  static constexpr DType kDType = DType::kBFloat16;
};
template <>
struct Traits<Float16> {
  using Acc = float;
  static constexpr int kUnit = 8;
  static constexpr DType kDType = DType::kFloat16;
};

// Operands whose dtype the kernel learns at run time, read element by element: one kernel for every layout that 16-byte
// accesses do not serve. Any<float> stands for float32, bfloat16 and float16, Any<double> for float64. kElements: with
// a scale parameter or a mask (elements.cuh), if there is one. Without it not an instruction of them; float64 has one
// kernel for all.
template <typename A, bool kElements = false>
struct Any {};
template <typename A, bool kElements>
struct Traits<Any<A, kElements>> {
  using Acc = A;
  static constexpr int kUnit = 4;
};
template <typename T>
constexpr bool kIsVector = true;
template <typename A, bool kElements>
constexpr bool kIsVector<Any<A, kElements>> = false;
template <typename T>
constexpr bool kHasElements = false;
template <typename A>
constexpr bool kHasElements<Any<A, true>> = true;

// Blocks of a kernel that takes every case that share a multiprocessor, so few that nothing spills. (Unsaid, ptxas aims
// at a number of its own and would rather spill than miss it.)
template <typename T>
constexpr int kResidentGeneral = sizeof(typename Traits<T>::Acc) == 8 ? 1 : 2;

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_acc(Float16 x) {
  float low, high;
  unpack_float16(x.bits, low, high);
  return low;
}

// Rounded to nearest even; a double headed for a 2-byte dtype goes by way of float.
template <typename T, typename Acc>
__device__ inline T from_acc(Acc x) {
  if constexpr (sizeof(T) >= 4) {
    return static_cast<T>(x);
  } else if constexpr (Traits<T>::kDType == DType::kBFloat16) {
    return {static_cast<uint16_t>(pack_bfloat16(static_cast<float>(x), 0.0f))};
  } else {
    return {static_cast<uint16_t>(pack_float16(static_cast<float>(x), 0.0f))};
  }
}

// 16 bytes of T to and from arithmetic.
__device__ inline void unpack(uint4 raw, float (&v)[4], float) {
  v[0] = __uint_as_float(raw.x);
  v[1] = __uint_as_float(raw.y);
  v[2] = __uint_as_float(raw.z);
  v[3] = __uint_as_float(raw.w);
}
__device__ inline void unpack(uint4 raw, float (&v)[8], BFloat16) {
  const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(w[i] << 16);
    v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
}
__device__ inline void unpack(uint4 raw, float (&v)[8], Float16) {
  const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack_float16(w[i], v[2 * i], v[2 * i + 1]);
}

__device__ inline uint4 pack(const float (&v)[4], float) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}
__device__ inline uint4 pack(const float (&v)[8], BFloat16) {
  return make_uint4(pack_bfloat16(v[0], v[1]), pack_bfloat16(v[2], v[3]), pack_bfloat16(v[4], v[5]),
                    pack_bfloat16(v[6], v[7]));
}
__device__ inline uint4 pack(const float (&v)[8], Float16) {
  return make_uint4(pack_float16(v[0], v[1]), pack_float16(v[2], v[3]), pack_float16(v[4], v[5]),
                    pack_float16(v[6], v[7]));
}

// 16 bytes as they were loaded, half the registers of 2-byte elements in arithmetic: taken apart a pair at a time.
template <typename T>
struct Packed {
  uint32_t word[4];
  __device__ void load(const T* p) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    word[0] = raw.x, word[1] = raw.y, word[2] = raw.z, word[3] = raw.w;
  }
  // Elements j and j + 1, j even.
  __device__ Pair pair(int j) const {
    if constexpr (sizeof(T) == 4) {
      return Pair(__uint_as_float(word[j]), __uint_as_float(word[j + 1]));
    } else {
      const uint32_t w = keep(word[j / 2]);
      if constexpr (Traits<T>::kDType == DType::kBFloat16) {
        return Pair(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
      } else {
        float low, high;
        unpack_float16(w, low, high);
        return Pair(low, high);
      }
    }
  }
};

template <typename T, int kUnit>
__device__ inline void unpack_pairs(const Packed<T>& packed, float (&v)[kUnit]) {
#pragma unroll
  for (int j = 0; j < kUnit; j += 2) {
    const Pair pair = packed.pair(j);
    v[j] = pair.v.x;
    v[j + 1] = pair.v.y;
  }
}

// One unit, 16 bytes per access. `p` must be 16-byte aligned.
template <typename T, typename Acc, int kUnit>
__device__ inline void load_vector(const T* p, Acc (&v)[kUnit]) {
  if constexpr (sizeof(T) * kUnit == 16) {
    unpack(*reinterpret_cast<const uint4*>(p), v, T{});
  } else if constexpr (sizeof(T) == 4) {  // float beside a 2-byte dtype: two accesses
    float half[4];
#pragma unroll
    for (int i = 0; i < kUnit; i += 4) {
      unpack(*reinterpret_cast<const uint4*>(p + i), half, 0.0f);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] = half[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; i += 2) {
      const double2 pair = *reinterpret_cast<const double2*>(p + i);
      v[i] = pair.x;
      v[i + 1] = pair.y;
    }
  }
}

// (__stwb is the default store; a plain assignment is taken apart into 4-byte stores.)
template <typename T, typename Acc, int kUnit>
__device__ inline void store_vector(T* p, const Acc (&v)[kUnit]) {
  if constexpr (sizeof(T) * kUnit == 16) {
    __stwb(reinterpret_cast<uint4*>(p), pack(v, T{}));
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kUnit; i += 4) {
      const float half[4] = {v[i], v[i + 1], v[i + 2], v[i + 3]};
      __stwb(reinterpret_cast<uint4*>(p + i), pack(half, 0.0f));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; i += 2) __stwb(reinterpret_cast<double2*>(p + i), make_double2(v[i], v[i + 1]));
  }
}

// One unit of any layout: `valid` elements `step` apart, the rest read as 0.
template <typename T, typename Acc, int kUnit>
__device__ inline void load_strided(const T* p, int64_t step, int valid, Acc (&v)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) v[i] = i < valid ? static_cast<Acc>(to_acc(p[i * step])) : Acc(0);
}

template <typename T, typename Acc, int kUnit>
__device__ inline void store_strided(T* p, int64_t step, int valid, const Acc (&v)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if (i < valid) p[i * step] = from_acc<T>(v[i]);
  }
}

// Calls f with a value of the type that a run-time dtype names.
template <typename F>
__device__ inline void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kFloat64:
      return f(double());
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kFloat16:
      return f(Float16());
  }
}

// On the host, for a kernel's template arguments: a function of its own, because nvcc lets no function for both sides
// call one of the host.
template <typename F>
inline void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kFloat64:
      return f(double());
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kFloat16:
      return f(Float16());
  }
}

// Among the dtypes of Any<Acc>.
template <bool kElements, typename F>
__device__ inline void with_type_of(Any<float, kElements>, DType dtype, const F& f) {
  if (dtype == DType::kFloat32) return f(float());
  if (dtype == DType::kBFloat16) return f(BFloat16());
  f(Float16());
}
template <bool kElements, typename F>
__device__ inline void with_type_of(Any<double, kElements>, DType, const F& f) {
  f(double());
}

// One number whose dtype is known only at run time (a learned scale and its gradient).
template <typename Acc>
__device__ inline Acc load_any(const void* data, int64_t index, DType dtype) {
  Acc value = 0;
  with_type(dtype,
            [&](auto type) { value = static_cast<Acc>(to_acc(static_cast<const decltype(type)*>(data)[index])); });
  return value;
}

template <typename Acc>
__device__ inline void store_any(void* data, int64_t index, DType dtype, Acc value) {
  with_type(dtype, [&](auto type) { static_cast<decltype(type)*>(data)[index] = from_acc<decltype(type)>(value); });
}

}  // namespace cuda
}  // namespace fused_elbo
