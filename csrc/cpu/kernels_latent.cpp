// z = mean + exp(logvar/2) * eps, KL(q || p) and their gradients.
//
// Memory: forward reads 2 numbers per element and writes 1, backward reads 3 and writes 2; noise is generated where it
// is used, in both directions. One exponential serves the standard deviation, the KL and its gradient.
#include <initializer_list>

#include "elements.h"
#include "latent.h"
#include "latent_loops.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

// Channels of a channels_last event that are interleaved in a buffer: with more of them, the runs of consecutive noise
// indices in a unit get too short for the generator.
constexpr int64_t kMaxInterleaved = 32;
constexpr int64_t kRun = kUnit / 2 + 80;
constexpr int64_t kNoiseBlock = 256;

}  // namespace

template <typename T>
struct LatentBuffers {
  alignas(64) T mean[kBuffer];
  alignas(64) T logvar[kBuffer];
  alignas(64) T noise[kBuffer];
  alignas(64) T grad_z[kBuffer];
  alignas(64) T coefficient[kBuffer];
  alignas(64) T first[kBuffer];   // z, or grad_mean
  alignas(64) T second[kBuffer];  // standard deviation, or grad_logvar
  alignas(64) T nats[kBuffer];
  alignas(64) T prior_mean[kBuffer];
  alignas(64) T prior_logvar[kBuffer];
  alignas(64) T grad_prior_mean[kBuffer];
  alignas(64) T grad_prior_logvar[kBuffer];
  alignas(64) T grad_z_sum[kBuffer];
  alignas(64) T grad_z_eps[kBuffer];
  alignas(64) T runs[4 * kRun];
  alignas(64) T interleaved[kBuffer];
  alignas(64) T keep[kBuffer];
  alignas(64) T slope[kBuffer];
  alignas(64) T prior_slope[kBuffer];
  alignas(64) double rows[kUnit];
};

namespace {

static_assert(kBuffer >= kUnit + kNoisePadding && kRun >= kUnit / 2 + kNoisePadding, "normals writes whole groups");

bool is_channels_last(const LatentArgs& args) {
  return args.shape.event_dims == 2 && args.mean.stride[0] != 0 && args.mean.stride[0] < args.mean.stride[1] &&
         args.shape.size[0] <= kMaxInterleaved;
}

Units cut(const LatentArgs& args) {
  return Units(1, args.shape.rows, args.shape.event, kUnit, is_channels_last(args) ? args.shape.size[0] : 1);
}

bool wants_nats(const LatentArgs& args, Pass pass) { return pass != Pass::kBackward && args.kl.data != nullptr; }

}  // namespace

template <typename T>
typename LatentWork<T>::Loop LatentWork<T>::choose_loop() const {
  using Plain = math::LogVarScale<T>;
  using Clamped = math::ClampedLogVarScale<T>;
  const bool learned_prior = static_cast<bool>(prior_mean_);
  const Samples several = args_.shape.samples == 1 ? Samples::kOne : Samples::kSeveral;
  const bool nats = wants_nats(args_, pass_);
  if (pass_ == Pass::kForward) {
    const Samples samples = z_ ? several : Samples::kNone;
    if (!nats && samples == Samples::kNone) return nullptr;
    return args_.clamp ? pick_forward<T, Clamped>(learned_prior, nats, samples)
                       : pick_forward<T, Plain>(learned_prior, nats, samples);
  }
  const Samples samples = grad_z_ ? several : Samples::kNone;
  if (!args_.has_grad_kl && samples == Samples::kNone) return nullptr;
  return args_.clamp ? pick_backward<T, Clamped>(learned_prior, args_.has_grad_kl, nats, samples)
                     : pick_backward<T, Plain>(learned_prior, args_.has_grad_kl, nats, samples);
}

template <typename T>
int64_t LatentWork<T>::partials_needed(const LatentArgs& args, Pass pass, bool totals) {
  if (!wants_nats(args, pass) || args.reduction == Reduction::kNone) return 0;
  const Units units = cut(args);
  const bool by_units = args.reduction == Reduction::kSample && units.segments == 1 && !totals;
  return by_units ? 0 : units.rows * units.segments;
}

template <typename T>
LatentWork<T>::LatentWork(const LatentArgs& args, Pass pass, double* partials, bool totals)
    : args_(args),
      pass_(pass),
      units_(cut(args)),
      channels_last_(is_channels_last(args)),
      partials_(partials_needed(args, pass, totals) > 0 ? partials : nullptr),
      noise_(make_noise(args.key)) {
  constexpr int kLogical[] = {0, 1, 2, 3};
  constexpr int kSwapped[] = {1, 0};
  const int* const order = channels_last_ ? kSwapped : kLogical;
  const auto view = [&](const Operand& operand) { return make_view(operand, args.shape, order); };
  mean_ = view(args.mean);
  logvar_ = view(args.logvar);
  prior_mean_ = view(args.prior_mean);
  prior_logvar_ = view(args.prior_logvar);
  mask_ = view(args.mask);
  if (pass != Pass::kBackward) {
    z_ = view(args.z);
    kl_ = view(args.kl);
  }
  if (pass != Pass::kForward) {
    grad_z_ = view(args.grad_z);
    grad_kl_ = view(args.grad_kl);
    grad_mean_ = view(args.grad_mean);
    grad_logvar_ = view(args.grad_logvar);
    grad_prior_mean_ = view(args.grad_prior_mean);
    grad_prior_logvar_ = view(args.grad_prior_logvar);
  }
  loop_ = choose_loop();
}

template <typename T>
void LatentWork<T>::add_inputs(const Range& range, LatentBuffers<T>& buffers, LatentArrays<T>& arrays) const {
  arrays.mean = input(mean_, range, buffers.mean);
  arrays.logvar = input(logvar_, range, buffers.logvar);
  if (prior_mean_) {
    arrays.prior_mean = input(prior_mean_, range, buffers.prior_mean);
    arrays.prior_logvar = input(prior_logvar_, range, buffers.prior_logvar);
  }
  arrays.clamp_min = static_cast<T>(args_.clamp_min);
  arrays.clamp_max = static_cast<T>(args_.clamp_max);
  const int64_t count = whole_groups(range.rows * range.count);
  if (args_.scale.kind != ScaleKind::kPlain) {
    to_logvar(args_.scale, arrays.logvar, count, buffers.logvar, buffers.slope);
    arrays.logvar = buffers.logvar;
    if (prior_mean_) {
      to_logvar(args_.scale, arrays.prior_logvar, count, buffers.prior_logvar, buffers.prior_slope);
      arrays.prior_logvar = buffers.prior_logvar;
    }
  }
  if (mask_) {
    // Mean 0 and logvar 0, against a prior of the same: no nats, exactly.
    load_mask(mask_, range, buffers.keep);
    read_counted(buffers.keep, arrays.mean, count, buffers.mean);
    read_counted(buffers.keep, arrays.logvar, count, buffers.logvar);
    if (prior_mean_) {
      read_counted(buffers.keep, arrays.prior_mean, count, buffers.prior_mean);
      read_counted(buffers.keep, arrays.prior_logvar, count, buffers.prior_logvar);
    }
  }
}

// Gradients by logvar become those by the scale parameters; what does not count has none.
template <typename T>
void LatentWork<T>::finish_gradients(const LatentArrays<T>& arrays, int64_t count,
                                     const LatentBuffers<T>& buffers) const {
  const bool priors = grad_prior_mean_ && args_.has_grad_kl;
  if (args_.scale.kind != ScaleKind::kPlain) {
    through_slope(buffers.slope, count, arrays.grad_logvar);
    if (priors) through_slope(buffers.prior_slope, count, arrays.grad_prior_logvar);
  }
  if (!mask_) return;
  for (T* const grad : {arrays.grad_mean, arrays.grad_logvar}) keep_counted(buffers.keep, grad, count, grad);
  if (!priors) return;
  for (T* const grad : {arrays.grad_prior_mean, arrays.grad_prior_logvar}) {
    keep_counted(buffers.keep, grad, count, grad);
  }
}

template <typename T>
uint64_t LatentWork<T>::noise_index(const Range& range) const {
  return static_cast<uint64_t>(args_.key.row_offset + range.row) * static_cast<uint64_t>(units_.event) +
         static_cast<uint64_t>(channels_last_ ? 0 : range.first);
}

// Noise of a range in the order in which the event is walked through.
template <typename T>
const T* LatentWork<T>::noise(const NoiseGenerator& generator, const Range& range, LatentBuffers<T>& buffers) const {
  const uint64_t index = noise_index(range);
  if (!channels_last_) return normals(generator, index, range.rows * range.count, buffers.noise);

  // The index is logical, (channel, hw); memory is (hw, channel).
  const int64_t channels = args_.shape.size[0], pixels = args_.shape.size[1];
  const int64_t run = range.count / channels;
  const int64_t event = units_.event;
  const bool whole = range.count == event;
  const T* const all = whole ? normals(generator, index, range.rows * event, buffers.noise) : nullptr;
  for (int64_t row = 0; row < range.rows; ++row) {
    for (int64_t channel = 0; channel < channels; channel += 4) {
      const int64_t some = channels - channel < 4 ? channels - channel : 4;
      const T* runs[4] = {};
      for (int64_t j = 0; j < some; ++j) {
        const int64_t start = (channel + j) * pixels + range.first / channels;
        runs[j] = whole ? all + row * event + start : normals(generator, index + start, run, buffers.runs + j * kRun);
      }
      T* const to = buffers.interleaved + row * event + channel;
      if (some == 4) {
        interleave_four(runs, run, channels, to);
      } else {
        for (int64_t j = 0; j < some; ++j) {
          for (int64_t i = 0; i < run; ++i) to[i * channels + j] = runs[j][i];
        }
      }
    }
  }
  return buffers.interleaved;
}

// Whether a block's coefficients serve every block of a unit.
template <typename T>
bool LatentWork<T>::repeats_coefficients(const Range& range) const {
  return range.rows == 1 && args_.reduction != Reduction::kNone;
}

// The loop over a unit with one sample's noise, which is made block by block just before it is used: making all of it
// first leaves memory idle meanwhile, and a third of the time is lost for tensors beyond the caches.
template <typename T>
void LatentWork<T>::run_loop(const NoiseGenerator& generator, const Range& range, LatentArrays<T>& arrays,
                             LatentBuffers<T>& buffers) const {
  const int64_t count = whole_groups(range.rows * range.count);
  const bool coefficients_wanted = pass_ != Pass::kForward && args_.has_grad_kl;
  if (channels_last_) {
    arrays.eps = noise(generator, range, buffers);
    if (coefficients_wanted) arrays.coefficient = coefficients(range, false, buffers);
    loop_(arrays, 0, count);
    return;
  }
  const uint64_t index = noise_index(range);
  const bool repeated = repeats_coefficients(range);
  const T* const all = coefficients_wanted ? coefficients(range, repeated, buffers) : nullptr;
  for (int64_t begin = 0; begin < count; begin += kNoiseBlock) {
    const int64_t end = count < begin + kNoiseBlock ? count : begin + kNoiseBlock;
    arrays.eps = normals(generator, index + begin, end - begin, buffers.noise);
    arrays.coefficient = coefficients_wanted && !repeated ? all + begin : all;
    loop_(arrays, begin, end);
  }
}

// The coefficient of the KL's gradient for every element of a range; repeated: for every element of a block.
template <typename T>
const T* LatentWork<T>::coefficients(const Range& range, bool repeated, LatentBuffers<T>& buffers) const {
  const double scale = args_.grad_kl_scale;
  if (args_.reduction == Reduction::kNone && grad_kl_) {
    const T* const values = input(grad_kl_, range, buffers.coefficient);
    if (scale == 1) return values;
    const int64_t count = whole_groups(range.rows * range.count);
    for (int64_t i = 0; i < count; ++i) buffers.coefficient[i] = values[i] * static_cast<T>(scale);
    return buffers.coefficient;
  }
  for (int64_t row = 0; row < range.rows; ++row) buffers.rows[row] = 1;
  if (grad_kl_) read_rows(grad_kl_, range, buffers.rows);
  for (int64_t row = 0; row < range.rows; ++row) buffers.rows[row] *= scale;
  Range filled = range;
  if (repeated && filled.count > kNoiseBlock) filled.count = kNoiseBlock;
  fill_rows(buffers.rows, filled, buffers.coefficient);
  return buffers.coefficient;
}

template <typename T>
void LatentWork<T>::reduce_nats(const Range& range, LatentBuffers<T>& buffers) const {
  if (partials_) {
    // A unit has several rows only where a row has one segment.
    sum_rows(buffers.nats, range.rows, range.count,
             partials_ + range.row * units_.segments + range.first / units_.segment);
  } else {
    sum_rows(buffers.nats, range.rows, range.count, buffers.rows);
    write_rows(kl_, range, buffers.rows);
  }
}

template <typename T>
void LatentWork<T>::forward_unit(const NoiseGenerator& first, const Range& range, LatentBuffers<T>& buffers) const {
  const int64_t count = whole_groups(range.rows * range.count);
  const bool nats = wants_nats(args_, pass_);
  const bool elementwise = nats && args_.reduction == Reduction::kNone;
  LatentArrays<T> arrays;
  add_inputs(range, buffers, arrays);
  arrays.nats = elementwise ? output(kl_, range, buffers.nats) : buffers.nats;
  arrays.std = buffers.second;
  const int64_t samples = z_ ? args_.shape.samples : 0;
  if (samples == 1) {
    arrays.z = output(z_, range, buffers.first);
    run_loop(first, range, arrays, buffers);
    if (mask_) keep_counted(buffers.keep, arrays.z, count, arrays.z);
    store_output(z_, range, arrays.z, buffers.first);
  } else {
    loop_(arrays, 0, count);
    for (int64_t k = 0; k < samples; ++k) {
      Range one = range;
      one.sample = k;
      const T* const eps = noise(NoiseGenerator(noise_, static_cast<uint32_t>(k)), range, buffers);
      T* const z = output(z_, one, buffers.first);
      for (int64_t group = 0; group < count; group += kLanes) {
        FUSED_ELBO_INDEPENDENT
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t i = group + lane;
          z[i] = math::sample(arrays.mean[i], buffers.second[i], eps[i]);
        }
      }
      if (mask_) keep_counted(buffers.keep, z, count, z);
      store_output(z_, one, z, buffers.first);
    }
  }
  if (elementwise) {
    store_output(kl_, range, arrays.nats, buffers.nats);
  } else if (nats) {
    reduce_nats(range, buffers);
  }
}

template <typename T>
void LatentWork<T>::backward_unit(const NoiseGenerator& first, const Range& range, LatentBuffers<T>& buffers) const {
  const int64_t count = whole_groups(range.rows * range.count);
  LatentArrays<T> arrays;
  arrays.grad_mean = output(grad_mean_, range, buffers.first);
  arrays.grad_logvar = output(grad_logvar_, range, buffers.second);
  arrays.grad_prior_mean = output(grad_prior_mean_, range, buffers.grad_prior_mean);
  arrays.grad_prior_logvar = output(grad_prior_logvar_, range, buffers.grad_prior_logvar);
  arrays.nats = buffers.nats;
  if (loop_) {
    add_inputs(range, buffers, arrays);
    if (grad_z_ && args_.shape.samples == 1) {
      arrays.grad_z = input(grad_z_, range, buffers.grad_z);
      run_loop(first, range, arrays, buffers);
    } else if (grad_z_) {
      T *const total = buffers.grad_z_sum, *const total_eps = buffers.grad_z_eps;
      for (int64_t i = 0; i < count; ++i) total[i] = total_eps[i] = 0;
      for (int64_t k = 0; k < args_.shape.samples; ++k) {
        Range one = range;
        one.sample = k;
        const T* const grad_z = input(grad_z_, one, buffers.grad_z);
        const T* const eps = noise(NoiseGenerator(noise_, static_cast<uint32_t>(k)), range, buffers);
        for (int64_t group = 0; group < count; group += kLanes) {
          FUSED_ELBO_INDEPENDENT
          for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t i = group + lane;
            total[i] += grad_z[i];
            total_eps[i] = math::fma(grad_z[i], eps[i], total_eps[i]);
          }
        }
      }
      arrays.grad_z_sum = total;
      arrays.grad_z_eps = total_eps;
    }
    if (!grad_z_ || args_.shape.samples > 1) {
      if (args_.has_grad_kl) arrays.coefficient = coefficients(range, false, buffers);
      loop_(arrays, 0, count);
    }
    finish_gradients(arrays, count, buffers);
  } else {
    for (int64_t i = 0; i < count; ++i) arrays.grad_mean[i] = arrays.grad_logvar[i] = 0;
  }
  if (!args_.has_grad_kl && grad_prior_mean_) {
    for (int64_t i = 0; i < count; ++i) arrays.grad_prior_mean[i] = arrays.grad_prior_logvar[i] = 0;
  }
  store_output(grad_mean_, range, arrays.grad_mean, buffers.first);
  store_output(grad_logvar_, range, arrays.grad_logvar, buffers.second);
  store_output(grad_prior_mean_, range, arrays.grad_prior_mean, buffers.grad_prior_mean);
  store_output(grad_prior_logvar_, range, arrays.grad_prior_logvar, buffers.grad_prior_logvar);
  if (wants_nats(args_, pass_)) reduce_nats(range, buffers);
}

template <typename T>
void LatentWork<T>::run(int64_t begin, int64_t end) const {
  if (pass_ == Pass::kForward && !loop_) return;
  LatentBuffers<T> buffers;
  const NoiseGenerator first(noise_, 0);
  for (int64_t unit = begin; unit < end; ++unit) {
    if (pass_ == Pass::kForward) {
      forward_unit(first, units_.range(unit), buffers);
    } else {
      backward_unit(first, units_.range(unit), buffers);
    }
  }
}

template <typename T>
double LatentWork<T>::total(int64_t row) const {
  return units_.event == 0 ? 0.0 : sum(partials_ + row * units_.segments, units_.segments);
}

template <typename T>
void LatentWork<T>::finish() const {
  if (!wants_nats(args_, pass_) || args_.reduction == Reduction::kNone) return;
  if (args_.reduction == Reduction::kSample) {
    if (!partials_ && units_.event != 0) return;  // the units have written it
    for (int64_t row = 0; row < units_.rows; ++row) write(kl_, 0, row, 0, total(row));
    return;
  }
  // Rows first, so that the sum's order does not depend on how long a row is in segments.
  if (units_.event != 0) {
    for (int64_t row = 0; row < units_.rows; ++row) partials_[row] = total(row);
  }
  const double all = units_.event == 0 ? 0.0 : sum(partials_, units_.rows);
  write(kl_, 0, 0, 0, args_.kl_scale * all);
}

template class LatentWork<float>;
template class LatentWork<double>;

namespace {

template <typename T>
void run_latent(const LatentArgs& args, Pass pass, void* workspace, const Context& context) {
  LatentWork<T> work(args, pass, static_cast<double*>(workspace), false);
  for_units(
      context, work.units(),
      [](void* user, int64_t begin, int64_t end) { static_cast<LatentWork<T>*>(user)->run(begin, end); }, &work);
  work.finish();
}

}  // namespace

void latent(const LatentArgs& args, Pass pass, void* workspace, const Context& context) {
  if (args.dtype == DType::kFloat64) {
    run_latent<double>(args, pass, workspace, context);
  } else {
    run_latent<float>(args, pass, workspace, context);
  }
}

int64_t latent_workspace_bytes(const LatentArgs& args, Pass pass) {
  return LatentWork<float>::partials_needed(args, pass, false) * static_cast<int64_t>(sizeof(double));
}

}  // namespace FUSED_ELBO_ISA
}  // namespace cpu
}  // namespace fused_elbo
