// Picks the instruction-set level once, and forwards to its kernels. Compiled for the oldest processor.
// FUSED_ELBO_ISA in the environment (v2, v3, v4, generic) asks for a lower level than the machine's best.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../math/philox.h"
#include "level.h"

namespace fused_elbo {
namespace cpu {
namespace {

struct Level {
  const char* name;
  bool (*supported)();
  decltype(&latent_workspace_bytes) latent_bytes;
  decltype(&likelihood_workspace_bytes) likelihood_bytes;
  decltype(&elbo_workspace_bytes) elbo_bytes;
  decltype(&latent) run_latent;
  decltype(&likelihood) run_likelihood;
  decltype(&elbo) run_elbo;
  decltype(&noise_words) write_noise_words;
};

#define FUSED_ELBO_LEVEL(level)       \
  {#level,                            \
   supports_##level,                  \
   level::latent_workspace_bytes,     \
   level::likelihood_workspace_bytes, \
   level::elbo_workspace_bytes,       \
   level::latent,                     \
   level::likelihood,                 \
   level::elbo,                       \
   level::noise_words}

#if defined(__x86_64__)
// The features that -march=x86-64-v3 and -v4 let the compiler use.
bool supports_v2() { return true; }
bool supports_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe") &&
         __builtin_cpu_supports("f16c");
}
bool supports_v4() {
  return supports_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
// Best first.
constexpr Level kLevels[] = {FUSED_ELBO_LEVEL(v4), FUSED_ELBO_LEVEL(v3), FUSED_ELBO_LEVEL(v2)};
#else
bool supports_generic() { return true; }
constexpr Level kLevels[] = {FUSED_ELBO_LEVEL(generic)};
#endif

const Level& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char* const wanted = std::getenv("FUSED_ELBO_ISA");
  const Level* best = nullptr;
  for (const Level& level : kLevels) {
    if (!level.supported()) continue;
    if (best == nullptr) best = &level;
    if (wanted != nullptr && std::strcmp(wanted, level.name) == 0) return level;
  }
  return *best;
}

const Level& chosen() {
  static const Level& level = choose();
  return level;
}

}  // namespace

// From the kernel's description of the first processor: sysconf adds up the caches of all AMD core complexes.
int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    long kilobytes = 0;
    if (std::FILE* const file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      if (std::fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
      std::fclose(file);
    }
    return kilobytes > 0 ? int64_t{kilobytes} << 10 : int64_t{32} << 20;
  }();
  return bytes;
}

int64_t latent_workspace_bytes(const LatentArgs& args, Pass pass) { return chosen().latent_bytes(args, pass); }
int64_t likelihood_workspace_bytes(const LikelihoodArgs& args, Pass pass) {
  return chosen().likelihood_bytes(args, pass);
}
int64_t elbo_workspace_bytes(const ElboArgs& args, Pass pass) { return chosen().elbo_bytes(args, pass); }

void latent(const LatentArgs& args, Pass pass, void* workspace, const Context& context) {
  chosen().run_latent(args, pass, workspace, context);
}
void likelihood(const LikelihoodArgs& args, Pass pass, void* workspace, const Context& context) {
  chosen().run_likelihood(args, pass, workspace, context);
}
void elbo(const ElboArgs& args, Pass pass, void* workspace, const Context& context) {
  chosen().run_elbo(args, pass, workspace, context);
}
void fold_seed(const int64_t* seed, int64_t data, int64_t* out, const Context&) {
  *out = static_cast<int64_t>(math::fold_seed(static_cast<uint64_t>(*seed), static_cast<uint64_t>(data)));
}
void noise_words(const NoiseKey& key, int64_t sample, int64_t first, int64_t count, int64_t* out,
                 const Context& context) {
  chosen().write_noise_words(key, sample, first, count, out, context);
}

}  // namespace cpu
}  // namespace fused_elbo

// Which level runs, for python -m fused_elbo.env.
extern "C" __attribute__((visibility("default"))) const char* fused_elbo_isa_level() {
  return fused_elbo::cpu::chosen().name;
}
