// What needs no arithmetic in floating point: derived seeds, Philox words as they are, clearing memory.
//
// fold_seed: one 8-byte word in, one out; one thread. noise_words: writes 32 bytes per counter; one thread per counter.
// clear: one memset node on the stream over the tickets of a call, a few bytes per row at most, and none where no sum
// is shared between blocks.
#include "../math/philox.h"
#include "launch.cuh"
#include "workspace.h"

namespace fused_elbo {
namespace cuda {
namespace {

struct FoldParams {
  const int64_t* seed;
  int64_t data;
  int64_t* out;
};

__global__ void fold_seed_kernel(const __grid_constant__ FoldParams p) {
  *p.out = static_cast<int64_t>(math::fold_seed(static_cast<uint64_t>(*p.seed), static_cast<uint64_t>(p.data)));
}

struct WordsParams {
  const int64_t* seed;
  int64_t seed_value;
  uint32_t stream, sample;
  uint64_t first;
  int64_t count;
  int64_t* out;
};

__global__ void __launch_bounds__(kThreads) noise_words_kernel(const __grid_constant__ WordsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.count) return;
  const uint64_t seed = static_cast<uint64_t>(p.seed != nullptr ? *p.seed : p.seed_value);
  const math::PhiloxWords w = math::philox4x32(p.first + static_cast<uint64_t>(i), p.sample, p.stream, seed);
  int64_t* out = p.out + 4 * i;
  out[0] = w.w0;
  out[1] = w.w1;
  out[2] = w.w2;
  out[3] = w.w3;
}

}  // namespace

void clear(void* data, int64_t bytes, void* stream) {
  if (bytes > 0)
    check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "clearing memory");
}

void write_empty_sum(void* data, int64_t bytes, double scale, void* stream) {
  const bool nan = !(0.0 * scale == 0.0);  // all bits set are a NaN
  check(cudaMemsetAsync(data, nan ? 0xff : 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
        "clearing memory");
}

void fold_seed(const int64_t* seed, int64_t data, int64_t* out, const Context& context) {
  launch(fold_seed_kernel, 1, FoldParams{seed, data, out}, context.stream, 1);
}

void noise_words(const NoiseKey& key, int64_t sample, int64_t first, int64_t count, int64_t* out,
                 const Context& context) {
  const WordsParams p{
      key.seed, key.seed_value, key.stream, static_cast<uint32_t>(sample), static_cast<uint64_t>(first), count, out};
  launch(noise_words_kernel, ceil_div(count, kThreads), p, context.stream);
}

}  // namespace cuda
}  // namespace fused_elbo
