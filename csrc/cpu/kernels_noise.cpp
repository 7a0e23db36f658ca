// Normals in blocks of 64 counters (256 elements), in three phases: Philox, Box-Muller, interleave. Each phase keeps
// its constants in registers; running them per vector instead spills and costs a third more.
#include "../math/normal.h"
#include "../math/philox.h"
#include "noise.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

constexpr int kBlockCounters = 64;
static_assert(kBlockCounters % kLanes == 0 && kLanes % kWidth == 0, "a block is whole vectors");

// Words and normals of a block, one array per word of the counters. Inside each vector of kWidth lanes, counter c sits
// in lane lane_of(c): four lanes of a 128-bit part hold counters kWidth/4 apart, so that the interleave needs no
// shuffle across those parts.
struct Words {
  alignas(64) uint32_t word[4][kBlockCounters];
};
template <typename T>
struct Normals {
  alignas(64) T lane[4][kBlockCounters];
};

FUSED_ELBO_INLINE constexpr int counter_of_lane(int lane) {
  return lane / kWidth * kWidth + lane % 4 * (kWidth / 4) + lane % kWidth / 4;
}

FUSED_ELBO_INLINE WordVector broadcast(uint64_t value) { return WordVector{} + value; }

using Generator = NoiseGenerator;

// Vectors in flight: a round is a chain of 5 or 6 cycles, and one vector's two halves do not fill it.
constexpr int kVectors = 2;
constexpr int kParts = 2 * kVectors;

// Philox on kVectors * kWidth consecutive counters that share the upper 32 bits. A vector of counters is two parts of
// 64-bit lanes (the even and the odd 32-bit lanes of the result); upper halves carry garbage that the multiplication
// ignores.
FUSED_ELBO_INLINE void philox_vectors(uint32_t counter_low, uint32_t counter_high, const Generator& generator,
                                      uint32_t* w0, uint32_t* w1, uint32_t* w2, uint32_t* w3) {
  const WordVector* const key0 = generator.key0;
  const WordVector* const key1 = generator.key1;
  const WordVector multiplier0 = broadcast(math::kPhiloxMultiplier0);
  const WordVector multiplier1 = broadcast(math::kPhiloxMultiplier1);
  // Until round 3 the words that do not depend on the lower half of the counter are the same in every lane.
  const uint64_t first1 = static_cast<uint64_t>(generator.sample) * math::kPhiloxMultiplier1;
  const WordVector round1_c0 = broadcast(static_cast<uint32_t>(first1 >> 32) ^ counter_high) ^ key0[0];
  const WordVector round1_c1 = broadcast(first1);
  const WordVector second0 = multiply_low_halves(round1_c0, multiplier0);
  const WordVector round1_key = broadcast(generator.stream) ^ key1[0];
  const WordVector round2_key0 = round1_c1 ^ key0[1];
  const WordVector round2_key1 = (second0 >> 32) ^ key1[1];

  WordVector c0[kParts], c1[kParts], c2[kParts], c3[kParts];
#pragma GCC unroll 8
  for (int part = 0; part < kParts; ++part) {
    WordVector offsets;
    for (int lane = 0; lane < kWidth / 2; ++lane)
      offsets[lane] = part / 2 * kWidth + counter_of_lane(2 * lane + part % 2);
    const WordVector product0 = multiply_low_halves(broadcast(counter_low) + offsets, multiplier0);
    const WordVector product1 = multiply_low_halves((product0 >> 32) ^ round1_key, multiplier1);
    c0[part] = (product1 >> 32) ^ round2_key0;
    c1[part] = product1;
    c2[part] = product0 ^ round2_key1;
    c3[part] = second0;
  }
  constexpr int kLast = math::kPhiloxRounds - 1;
#pragma GCC unroll 8
  for (int round = 2; round < kLast; ++round) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const WordVector product0 = multiply_low_halves(c0[part], multiplier0);
      const WordVector product1 = multiply_low_halves(c2[part], multiplier1);
      c0[part] = xor3(product1 >> 32, c1[part], key0[round]);
      c1[part] = product1;
      c2[part] = xor3(product0 >> 32, c3[part], key1[round]);
      c3[part] = product0;
    }
  }
  // The last round joins the two parts of a vector before it adds the keys, which then takes half the operations.
  const WordVector last_key0 = both_halves(key0[kLast]), last_key1 = both_halves(key1[kLast]);
#pragma GCC unroll 8
  for (int part = 0; part < kParts; part += 2) {
    const int to = part / 2 * kWidth;
    const WordVector even0 = multiply_low_halves(c0[part], multiplier0);
    const WordVector even1 = multiply_low_halves(c2[part], multiplier1);
    const WordVector odd0 = multiply_low_halves(c0[part + 1], multiplier0);
    const WordVector odd1 = multiply_low_halves(c2[part + 1], multiplier1);
    *reinterpret_cast<WordVector*>(w0 + to) = xor3(join_high(even1, odd1), join_low(c1[part], c1[part + 1]), last_key0);
    *reinterpret_cast<WordVector*>(w1 + to) = join_low(even1, odd1);
    *reinterpret_cast<WordVector*>(w2 + to) = xor3(join_high(even0, odd0), join_low(c3[part], c3[part + 1]), last_key1);
    *reinterpret_cast<WordVector*>(w3 + to) = join_low(even0, odd0);
  }
}

// The lower half of the counter wraps inside these vectors: once in 2^34 elements.
__attribute__((noinline, cold)) void philox_wrapping(uint64_t counter, const Generator& generator, uint32_t* w0,
                                                     uint32_t* w1, uint32_t* w2, uint32_t* w3) {
  for (int lane = 0; lane < kVectors * kWidth; ++lane) {
    const math::PhiloxWords w =
        math::philox4x32(counter + counter_of_lane(lane), generator.sample, generator.stream, generator.seed);
    w0[lane] = w.w0, w1[lane] = w.w1, w2[lane] = w.w2, w3[lane] = w.w3;
  }
}

FUSED_ELBO_INLINE void philox_phase(uint64_t counter, int counters, const Generator& generator, Words& out) {
  for (int i = 0; i < counters; i += kVectors * kWidth) {
    const uint64_t first = counter + i;
    uint32_t *w0 = out.word[0] + i, *w1 = out.word[1] + i, *w2 = out.word[2] + i, *w3 = out.word[3] + i;
    if (static_cast<uint32_t>(first) > 0xffffffffu - (kVectors * kWidth - 1)) {
      philox_wrapping(first, generator, w0, w1, w2, w3);
    } else {
      philox_vectors(static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32), generator, w0, w1, w2, w3);
    }
  }
}

template <typename T>
FUSED_ELBO_INLINE void box_muller_phase(const Words& words, int counters, Normals<T>& out) {
  for (int pair = 0; pair < 4; pair += 2) {
    for (int i = 0; i < counters; i += kLanes) {
      FUSED_ELBO_INDEPENDENT
      for (int lane = 0; lane < kLanes; ++lane) {
        math::box_muller(words.word[pair][i + lane], words.word[pair + 1][i + lane], out.lane[pair][i + lane],
                         out.lane[pair + 1][i + lane]);
      }
    }
  }
}

// Four arrays to four consecutive normals per counter: a 4 x 4 transposition inside each 128-bit part.
FUSED_ELBO_INLINE void interleave_phase(const Normals<float>& normals, int counters, float* out) {
  IndexVector low, high, low_pairs, high_pairs;
  for (int lane = 0; lane < kWidth; ++lane) {
    const int part = lane / 4 * 4;
    const int position = lane % 4;
    low[lane] = part + position / 2 + position % 2 * kWidth;
    high[lane] = low[lane] + 2;
    low_pairs[lane] = part + position % 2 + position / 2 * kWidth;
    high_pairs[lane] = low_pairs[lane] + 2;
  }
  for (int i = 0; i < counters; i += kWidth) {
    const FloatVector n0 = *reinterpret_cast<const FloatVector*>(normals.lane[0] + i);
    const FloatVector n1 = *reinterpret_cast<const FloatVector*>(normals.lane[1] + i);
    const FloatVector n2 = *reinterpret_cast<const FloatVector*>(normals.lane[2] + i);
    const FloatVector n3 = *reinterpret_cast<const FloatVector*>(normals.lane[3] + i);
    const FloatVector n01_low = __builtin_shuffle(n0, n1, low), n01_high = __builtin_shuffle(n0, n1, high);
    const FloatVector n23_low = __builtin_shuffle(n2, n3, low), n23_high = __builtin_shuffle(n2, n3, high);
    FloatVector* const to = reinterpret_cast<FloatVector*>(out + 4 * i);
    to[0] = __builtin_shuffle(n01_low, n23_low, low_pairs);
    to[1] = __builtin_shuffle(n01_low, n23_low, high_pairs);
    to[2] = __builtin_shuffle(n01_high, n23_high, low_pairs);
    to[3] = __builtin_shuffle(n01_high, n23_high, high_pairs);
  }
}

FUSED_ELBO_INLINE void interleave_phase(const Normals<double>& normals, int counters, double* out) {
  for (int i = 0; i < counters; i += kWidth) {
    for (int lane = 0; lane < kWidth; ++lane) {
      double* const to = out + 4 * (i + counter_of_lane(lane));
      for (int k = 0; k < 4; ++k) to[k] = normals.lane[k][i + lane];
    }
  }
}

template <typename T>
FUSED_ELBO_INLINE const T* generate(const Generator& generator, uint64_t first, int64_t count, T* buffer) {
  const int64_t offset = static_cast<int64_t>(first % 4);
  const uint64_t counter = first / 4;
  const int64_t counters = (offset + count + 3) / 4;
  Words words;
  Normals<T> normals;
  for (int64_t i = 0; i < counters; i += kBlockCounters) {
    const int64_t left = counters - i;
    const int block = left < kBlockCounters ? static_cast<int>((left + kLanes - 1) / kLanes * kLanes) : kBlockCounters;
    philox_phase(counter + i, block, generator, words);
    asm volatile("" : "+m"(words));  // without these walls g++ merges the phases and falls back to scalar code
    box_muller_phase(words, block, normals);
    asm volatile("" : "+m"(normals));
    interleave_phase(normals, block, buffer + 4 * i);
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
  for (int64_t i = 0; i < count; i += kVectors * kWidth) {
    philox_phase(static_cast<uint64_t>(first) + i, kVectors * kWidth, generator, words);
    for (int lane = 0; lane < kVectors * kWidth; ++lane) {
      const int64_t counter = i + counter_of_lane(lane);
      if (counter >= count) continue;
      for (int k = 0; k < 4; ++k) out[4 * counter + k] = words.word[k][lane];
    }
  }
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
