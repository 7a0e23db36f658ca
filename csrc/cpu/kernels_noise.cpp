// Normals in blocks of 64 counters (256 elements), in two phases: Philox, then Box-Muller. Each phase keeps its
// constants in registers; running them per vector instead spills and costs a third more.
#if defined(__x86_64__) && !defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
// A step is several registers then, and each one's operations a long chain: in turn instead of one after the other they
// fit the processor's window. Box-Muller 0.77 -> 0.58 ns per normal with AVX2.
#pragma GCC optimize("schedule-insns", "sched-pressure")
#endif
#include "../math/normal.h"
#include "../math/philox.h"
#include "noise.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

constexpr int kBlockCounters = 64;

// Words of a block's counters, in the order in which Box-Muller turns pairs of them into consecutive normals: words 0
// and 2 of each counter in even, 1 and 3 in odd.
struct Words {
  alignas(64) uint32_t even[2 * kBlockCounters];
  alignas(64) uint32_t odd[2 * kBlockCounters];
};

FUSED_ELBO_INLINE WordVector broadcast(uint64_t value) { return WordVector{} + value; }

using Generator = NoiseGenerator;

// Counters in one vector of 64-bit lanes, and vectors in flight: a round is a chain of 5 or 6 cycles.
constexpr int kVectorCounters = kWidth / 2;
constexpr int kVectors = 4;
constexpr int kStep = kVectors * kVectorCounters;
static_assert(kBlockCounters % kStep == 0 && 2 * kStep % kLanes == 0, "a block is whole steps");

// What the first two rounds make of the words that do not depend on the lower half of the counter.
struct FirstRounds {
  WordVector round1_key, round2_key0, round2_key1, round2_c3;
  FUSED_ELBO_INLINE FirstRounds(uint32_t counter_high, const Generator& generator) {
    const uint64_t product = static_cast<uint64_t>(generator.sample) * math::kPhiloxMultiplier1;
    const WordVector c0 = broadcast(static_cast<uint32_t>(product >> 32) ^ counter_high) ^ generator.key0[0];
    round2_c3 = multiply_low_halves(c0, broadcast(math::kPhiloxMultiplier0));
    round1_key = broadcast(generator.stream) ^ generator.key1[0];
    round2_key0 = broadcast(product) ^ generator.key0[1];
    round2_key1 = (round2_c3 >> 32) ^ generator.key1[1];
  }
};

// Philox on kStep consecutive counters that share the upper 32 bits, one in each 64-bit lane, with a word in the lower
// half; upper halves carry garbage that the multiplication ignores.
FUSED_ELBO_INLINE void philox_vectors(uint32_t counter_low, const FirstRounds& first, const Generator& generator,
                                      uint32_t* even, uint32_t* odd) {
  const WordVector* const key0 = generator.key0;
  const WordVector* const key1 = generator.key1;
  const WordVector multiplier0 = broadcast(math::kPhiloxMultiplier0);
  const WordVector multiplier1 = broadcast(math::kPhiloxMultiplier1);
  // The first product of consecutive counters is an arithmetic progression.
  const WordVector product = broadcast(static_cast<uint64_t>(counter_low) * math::kPhiloxMultiplier0);
  WordVector c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
#pragma GCC unroll 8
  for (int part = 0; part < kVectors; ++part) {
    WordVector offsets;
    for (int lane = 0; lane < kVectorCounters; ++lane) {
      offsets[lane] = static_cast<uint64_t>(part * kVectorCounters + lane) * math::kPhiloxMultiplier0;
    }
    const WordVector product0 = product + offsets;
    const WordVector product1 = multiply_low_halves((product0 >> 32) ^ first.round1_key, multiplier1);
    c0[part] = (product1 >> 32) ^ first.round2_key0;
    c1[part] = product1;
    c2[part] = product0 ^ first.round2_key1;
    c3[part] = first.round2_c3;
  }
  constexpr int kLast = math::kPhiloxRounds - 1;
#pragma GCC unroll 8
  for (int round = 2; round < kLast; ++round) {
#pragma GCC unroll 8
    for (int part = 0; part < kVectors; ++part) {
      const WordVector product0 = multiply_low_halves(c0[part], multiplier0);
      const WordVector product1 = multiply_low_halves(c2[part], multiplier1);
      c0[part] = xor3(product1 >> 32, c1[part], key0[round]);
      c1[part] = product1;
      c2[part] = xor3(product0 >> 32, c3[part], key1[round]);
      c3[part] = product0;
    }
  }
  // The last round joins the words of a counter before it adds the keys, which then takes half the operations.
  const WordVector last_keys = join_low(key0[kLast], key1[kLast]);
#pragma GCC unroll 8
  for (int part = 0; part < kVectors; ++part) {
    const WordVector product0 = multiply_low_halves(c0[part], multiplier0);
    const WordVector product1 = multiply_low_halves(c2[part], multiplier1);
    reinterpret_cast<WordVector*>(even)[part] =
        xor3(join_high(product1, product0), join_low(c1[part], c3[part]), last_keys);
    reinterpret_cast<WordVector*>(odd)[part] = join_low(product1, product0);
  }
}

// The lower half of the counter wraps inside these vectors: once in 2^34 elements.
__attribute__((noinline, cold)) void philox_wrapping(uint64_t counter, const Generator& generator, uint32_t* even,
                                                     uint32_t* odd) {
  for (int i = 0; i < kStep; ++i) {
    const math::PhiloxWords w = math::philox4x32(counter + i, generator.sample, generator.stream, generator.seed);
    even[2 * i] = w.w0, odd[2 * i] = w.w1, even[2 * i + 1] = w.w2, odd[2 * i + 1] = w.w3;
  }
}

// Whole steps: counters is rounded up to a multiple of kStep.
FUSED_ELBO_INLINE void philox_phase(uint64_t counter, int counters, const Generator& generator, Words& out) {
  const FirstRounds first(static_cast<uint32_t>(counter >> 32), generator);
  for (int i = 0; i < counters; i += kStep) {
    const uint32_t low = static_cast<uint32_t>(counter) + static_cast<uint32_t>(i);
    if (low < static_cast<uint32_t>(counter) || low > 0xffffffffu - (kStep - 1)) {
      philox_wrapping(counter + i, generator, out.even + 2 * i, out.odd + 2 * i);
    } else {
      philox_vectors(low, first, generator, out.even + 2 * i, out.odd + 2 * i);
    }
  }
}

template <typename T>
FUSED_ELBO_INLINE void box_muller_phase(const Words& words, int counters, T* out) {
  for (int i = 0; i < 2 * counters; i += kLanes) {
    FUSED_ELBO_INDEPENDENT
    for (int lane = i; lane < i + kLanes; ++lane) {
      math::box_muller(words.even[lane], words.odd[lane], out[2 * lane], out[2 * lane + 1]);
    }
  }
}

template <typename T>
FUSED_ELBO_INLINE const T* generate(const Generator& generator, uint64_t first, int64_t count, T* buffer) {
  const int64_t offset = static_cast<int64_t>(first % 4);
  const uint64_t counter = first / 4;
  const int64_t counters = (offset + count + 3) / 4;
  Words words;
  for (int64_t i = 0; i < counters; i += kBlockCounters) {
    const int64_t left = counters - i;
    const int block = left < kBlockCounters ? static_cast<int>((left + kLanes - 1) / kLanes * kLanes) : kBlockCounters;
    philox_phase(counter + i, block, generator, words);
    asm volatile("" : "+m"(words));  // without this wall g++ merges the phases and falls back to scalar code
    box_muller_phase(words, block, buffer + 4 * i);
  }
  return buffer + offset;
}

}  // namespace

NoiseGenerator::NoiseGenerator(const Noise& noise, uint32_t sample)
    : seed(noise.seed), sample(sample), stream(noise.stream) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < math::kPhiloxRounds; ++round) {
    key0[round] = broadcast(low);
    key1[round] = broadcast(high);
    low += math::kPhiloxWeyl0;
    high += math::kPhiloxWeyl1;
  }
}

__attribute__((noinline)) const float* normals(const NoiseGenerator& generator, uint64_t first, int64_t count,
                                               float* buffer) {
  return generate(generator, first, count, buffer);
}

__attribute__((noinline)) const double* normals(const NoiseGenerator& generator, uint64_t first, int64_t count,
                                                double* buffer) {
  return generate(generator, first, count, buffer);
}

// Through the vector path, so that its words are what the tests see.
void noise_words(const NoiseKey& key, int64_t sample, int64_t first, int64_t count, int64_t* out) {
  const Generator generator(make_noise(key), static_cast<uint32_t>(sample));
  Words words;
  for (int64_t i = 0; i < count; i += kStep) {
    philox_phase(static_cast<uint64_t>(first) + i, kStep, generator, words);
    for (int j = 0; j < kStep && i + j < count; ++j) {
      int64_t* const to = out + 4 * (i + j);
      to[0] = words.even[2 * j], to[1] = words.odd[2 * j], to[2] = words.even[2 * j + 1], to[3] = words.odd[2 * j + 1];
    }
  }
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
