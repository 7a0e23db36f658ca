// z = mean + exp(logvar/2) * eps, KL(q || p) and their gradients.
//
// Memory: forward reads 2 numbers per element and writes 1, backward reads 3 and writes 2; noise is generated where it
// is used, in both directions. One exponential serves the standard deviation, the KL and its gradient.
#include <initializer_list>

#include "elements.h"
#include "latent.h"
#include "latent_buffers.h"

namespace fused_elbo {
namespace cpu {
namespace FUSED_ELBO_ISA {
namespace {

// Channels of a channels_last event that are interleaved in a buffer: with more of them, the runs of consecutive noise
// indices in a unit get too short for the generator.
constexpr int64_t kMaxInterleaved = 32;
// Elements whose noise is made at a time. Backward, with five or nine arrays in motion, waits for memory in each block
// where they exceed the nearer caches; in shorter blocks more of that passes beside the noise.
constexpr int64_t kNoiseBlock = 256;
constexpr int64_t kShortNoiseBlock = 128;
constexpr int64_t kCachedBytes = int64_t{8} << 20;

bool is_channels_last(const LatentArgs& args) {
  return args.shape.event_dims == 2 && args.mean.stride[0] != 0 && args.mean.stride[0] < args.mean.stride[1] &&
         args.shape.size[0] <= kMaxInterleaved;
}

Units cut(const LatentArgs& args) {
  return Units(1, args.shape.rows, args.shape.event, kUnit, is_channels_last(args) ? args.shape.size[0] : 1);
}

}  // namespace

template <typename T>
LatentLoops<T> LatentWork<T>::choose_loops() const {
  const Samples several = args_.shape.samples == 1 ? Samples::kOne : Samples::kSeveral;
  LoopChoice wanted{args_.clamp, static_cast<bool>(prior_mean_), args_.has_grad_kl, Samples::kNone, Nats::kNone};
  if (wants_nats(args_, pass_)) wanted.nats = sums_nats() ? Nats::kSummed : Nats::kStored;
  if (pass_ == Pass::kForward) {
    if (z_) wanted.samples = several;
    if (wanted.nats == Nats::kNone && wanted.samples == Samples::kNone) return {};
    return forward_loops<T>(wanted);
  }
  if (grad_z_) wanted.samples = several;
  if (!wanted.grad_kl && wanted.samples == Samples::kNone) return {};
  return backward_loops<T>(wanted);
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
  loops_ = choose_loops();
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

// For channels_last: to[j * step + k] = runs[k][j] for four runs.
template <typename T>
FUSED_ELBO_INLINE void interleave_four(const T* const* runs, int64_t count, int64_t step, T* to) {
  const T *const r0 = runs[0], *const r1 = runs[1], *const r2 = runs[2], *const r3 = runs[3];
  int64_t j = 0;
#if defined(__SSE2__)
  if constexpr (sizeof(T) == 4) {
    for (; j + 4 <= count; j += 4) {
      __m128 a = _mm_loadu_ps(r0 + j), b = _mm_loadu_ps(r1 + j), c = _mm_loadu_ps(r2 + j), d = _mm_loadu_ps(r3 + j);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(to + j * step, a);
      _mm_storeu_ps(to + (j + 1) * step, b);
      _mm_storeu_ps(to + (j + 2) * step, c);
      _mm_storeu_ps(to + (j + 3) * step, d);
    }
  }
#endif
  for (; j < count; ++j) {
    to[j * step] = r0[j];
    to[j * step + 1] = r1[j];
    to[j * step + 2] = r2[j];
    to[j * step + 3] = r3[j];
  }
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

// Whether the forward loop sums the nats itself: where a unit is never more than one row, and what is masked or pads
// the last group has a mean and a logvar of 0, and so no nats.
template <typename T>
bool LatentWork<T>::sums_nats() const {
  if (pass_ != Pass::kForward || args_.reduction == Reduction::kNone || units_.rows_per_unit != 1) return false;
  const bool padded = units_.event % kLanes != 0 || units_.segment % kLanes != 0;
  if (padded && (args_.clamp || args_.scale.kind != ScaleKind::kPlain)) return false;
  return !(mask_ && args_.clamp);
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
    loops_.run(arrays, 0, count);
    return;
  }
  const uint64_t index = noise_index(range);
  const int64_t bytes = units_.rows * units_.event * (prior_mean_ ? 9 : 5) * static_cast<int64_t>(sizeof(T));
  const int64_t block = pass_ == Pass::kForward || bytes <= kCachedBytes ? kNoiseBlock : kShortNoiseBlock;
  const bool repeated = repeats_coefficients(range);
  const T* const all = coefficients_wanted ? coefficients(range, repeated, buffers) : nullptr;
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = count < begin + block ? count : begin + block;
    if (pass_ == Pass::kForward) {
      fetch_for_writing(arrays.z + begin, end - begin);
    } else {
      fetch_for_writing(arrays.grad_mean + begin, end - begin);
      fetch_for_writing(arrays.grad_logvar + begin, end - begin);
    }
    arrays.eps = normals(generator, index + begin, end - begin, buffers.noise);
    arrays.coefficient = coefficients_wanted && !repeated ? all + begin : all;
    loops_.run(arrays, begin, end);
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
  if (sums_nats()) {
    const double total = sum_tree(buffers.nats_lanes);
    if (partials_) {
      partials_[range.row * units_.segments + range.first / units_.segment] = total;
    } else {
      write_rows(kl_, range, &total);
    }
  } else if (partials_) {
    // A unit has several rows only where a row has one segment.
    sum_rows(buffers.nats, range.rows, range.count,
             partials_ + range.row * units_.segments + range.first / units_.segment);
  } else {
    sum_rows(buffers.nats, range.rows, range.count, buffers.rows);
    write_rows(kl_, range, buffers.rows);
  }
}

template <typename T>
void LatentWork<T>::run(int64_t begin, int64_t end) const {
  if (pass_ == Pass::kForward && !loops_) return;
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
