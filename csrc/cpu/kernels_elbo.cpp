// The ELBO in one pass over all units of the reconstruction and of the latent, then a sum in fixed order.
#include "latent.h"
#include "level.h"
#include "likelihood.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

// Not whether mean has data: an empty tensor has none.
bool has_own_latent(const ElboArgs& args) { return args.kl_given.data == nullptr; }

template <typename T, typename U>
void run_elbo(const ElboArgs& args, Pass pass, double* partials, const Context& context) {
  const LikelihoodArgs& reconstruction = args.reconstruction;
  const bool has_latent = has_own_latent(args);

  struct Work {
    LikelihoodWork<T> likelihood;
    LatentWork<U> latent;
    int64_t units, latent_units;
    // Of the first units of all. Every task gets its share of the latent's, which compute more than they move.
    int64_t latent_among(int64_t first) const { return first * latent_units / units; }
  };
  double* const latent_partials = partials + LikelihoodWork<T>::partials_needed(reconstruction, pass, true);
  Work work{LikelihoodWork<T>(reconstruction, pass, partials, true),
            LatentWork<U>(args.latent, pass, latent_partials, true), 0, 0};
  work.latent_units = has_latent ? work.latent.units() : 0;
  work.units = work.likelihood.units() + work.latent_units;
  for_units(
      context, work.units,
      [](void* user, int64_t begin, int64_t end) {
        const Work& work = *static_cast<Work*>(user);
        const int64_t latent_begin = work.latent_among(begin), latent_end = work.latent_among(end);
        if (end - latent_end > begin - latent_begin) work.likelihood.run(begin - latent_begin, end - latent_end);
        if (latent_end > latent_begin) work.latent.run(latent_begin, latent_end);
      },
      &work);
  work.likelihood.finish();
  if (has_latent) work.latent.finish();

  const DType nats = args.loss.dtype;
  const auto number = [&](const void* data, int64_t i, DType dtype) {
    return dtype == DType::kFloat64 ? static_cast<const double*>(data)[i]
                                    : static_cast<double>(static_cast<const float*>(data)[i]);
  };
  const auto put = [&](const Operand& to, int64_t i, double value) {
    if (to.dtype == DType::kFloat64) {
      static_cast<double*>(to.data)[i] = value;
    } else {
      static_cast<float*>(to.data)[i] = static_cast<float>(value);
    }
  };
  const double beta = args.beta ? number(args.beta, 0, nats) : args.beta_value;
  double total = 0;
  for (int64_t row = 0; row < reconstruction.shape.rows; ++row) {
    double kl;
    if (has_latent) {
      kl = work.latent.total(row);
    } else {
      kl = number(args.kl_given.data, row * args.kl_given.row_stride, args.kl_given.dtype);
      if (args.latent.kl.data) put(args.latent.kl, row * args.latent.kl.row_stride, kl);
    }
    const double loss = beta * kl - work.likelihood.total(0, row);
    if (args.loss_per_row) {
      put(args.loss, row * args.loss.row_stride, args.loss_scale * loss);
    } else {
      total += loss;
    }
  }
  if (!args.loss_per_row) put(args.loss, 0, args.loss_scale * total);
}

}  // namespace

void elbo(const ElboArgs& args, Pass pass, void* workspace, const Context& context) {
  double* const partials = static_cast<double*>(workspace);
  const bool wide = args.reconstruction.dtype == DType::kFloat64;
  const bool wide_latent = args.latent.dtype == DType::kFloat64;
  if (wide) {
    wide_latent ? run_elbo<double, double>(args, pass, partials, context)
                : run_elbo<double, float>(args, pass, partials, context);
  } else {
    wide_latent ? run_elbo<float, double>(args, pass, partials, context)
                : run_elbo<float, float>(args, pass, partials, context);
  }
}

int64_t elbo_workspace_bytes(const ElboArgs& args, Pass pass) {
  const int64_t latent = has_own_latent(args) ? LatentWork<float>::partials_needed(args.latent, pass, true) : 0;
  return (LikelihoodWork<float>::partials_needed(args.reconstruction, pass, true) + latent) *
         static_cast<int64_t>(sizeof(double));
}

void noise_words(const NoiseKey& key, int64_t sample, int64_t first, int64_t count, int64_t* out, const Context&) {
  noise_words(key, sample, first, count, out);
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
