// Runs the emulated kernels on buffers of exactly their size, so that AddressSanitizer sees every access beyond an end,
// at offsets that misalign them, in three resume orders; compares with the formulas in float64 and, bit by bit, the
// orders with each other.
//
//   driver                all of it
//   driver quick          few sizes, for many builds in a row
//   driver once           fewer still and in one order, for ThreadSanitizer, whose order is the system's
#include <emulated_intrinsics.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "cuda/types.cuh"
#include "math/philox.h"

using namespace fused_elbo;

namespace {

int g_failures = 0;
bool g_once = false;

void expect(bool good, const std::string& what, double actual, double expected) {
  if (good) return;
  if (++g_failures <= 20) std::fprintf(stderr, "%s: %.9g, expected %.9g\n", what.c_str(), actual, expected);
}

struct Rounding {
  DType dtype;
  double relative;
};
const Rounding kDTypes[] = {
    {DType::kFloat32, 3e-6}, {DType::kFloat64, 1e-12}, {DType::kBFloat16, 1.0 / 128}, {DType::kFloat16, 1.0 / 1024}};

size_t size_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

// `count` elements in memory of their exact size, the first one `offset` elements after an aligned address.
class Buffer {
 public:
  Buffer(DType dtype, int64_t count, int64_t offset)
      : dtype_(dtype),
        count_(count),
        bytes_((count + offset) * size_of(dtype)),
        base_(new char[bytes_]),
        offset_(offset) {
    std::memset(base_.get(), 0xff, bytes_);
  }
  void* data() const { return base_.get() + offset_ * size_of(dtype_); }
  double get(int64_t i) const {
    switch (dtype_) {
      case DType::kFloat32:
        return static_cast<float*>(data())[i];
      case DType::kFloat64:
        return static_cast<double*>(data())[i];
      case DType::kBFloat16:
        return cuda::to_acc(static_cast<cuda::BFloat16*>(data())[i]);
      default:
        return cuda::to_acc(static_cast<cuda::Float16*>(data())[i]);
    }
  }
  void set(int64_t i, double v) {
    const auto f = static_cast<float>(v);
    switch (dtype_) {
      case DType::kFloat32:
        static_cast<float*>(data())[i] = f;
        break;
      case DType::kFloat64:
        static_cast<double*>(data())[i] = v;
        break;
      case DType::kBFloat16:
        static_cast<cuda::BFloat16*>(data())[i] = cuda::from_acc<cuda::BFloat16>(f);
        break;
      default:
        static_cast<cuda::Float16*>(data())[i] = cuda::from_acc<cuda::Float16>(f);
    }
  }
  void fill(uint64_t salt) {
    for (int64_t i = 0; i < count_; ++i) {
      const uint64_t h = math::mix64(salt * 1000003 + static_cast<uint64_t>(i));
      set(i, static_cast<double>(h >> 11) / 9007199254740992.0 * 4 - 2);
    }
  }
  Operand operand(int64_t row, int64_t element = 1) const {
    Operand o;
    o.data = data();
    o.dtype = dtype_;
    o.row_stride = row;
    o.stride[0] = element;
    return o;
  }
  std::string bytes() const { return std::string(base_.get(), bytes_); }

 private:
  DType dtype_;
  int64_t count_;
  size_t bytes_;
  std::unique_ptr<char[]> base_;
  int64_t offset_;
};

// The noise contract in float64.
double reference_noise(uint64_t seed, uint32_t stream, uint32_t sample, uint64_t index, bool wide) {
  const math::PhiloxWords w = math::philox4x32(index / 4, sample, stream, seed);
  const bool second = (index & 2) != 0;
  const uint32_t even = second ? w.w2 : w.w0, odd = second ? w.w3 : w.w1;
  const double u = wide ? even * 0x1p-32 + 0x1p-33 : std::fma(static_cast<float>(even), 0x1p-32f, 0x1p-33f);
  const double v = wide ? odd * 0x1p-32 + 0x1p-33 : std::fma(static_cast<float>(odd), 0x1p-32f, 0x1p-33f);
  const double r = std::sqrt(-2 * std::log(u)), angle = 6.283185307179586476925 * v;
  return (index & 1) != 0 ? r * std::sin(angle) : r * std::cos(angle);
}

struct Case {
  DType dtype;
  double tolerance;
  int64_t rows, event, offset;
  ScaleKind scale = ScaleKind::kPlain;
  bool masked = false;
  std::string name() const {
    return "dtype " + std::to_string(static_cast<int>(dtype)) + " [" + std::to_string(rows) + ", " +
           std::to_string(event) + "] offset " + std::to_string(offset) +
           (scale != ScaleKind::kPlain ? " scale " + std::to_string(static_cast<int>(scale)) : "") +
           (masked ? " masked" : "");
  }
  DType acc() const { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
};

// Half of the kinds with a floor, the other half clamped softly; the parameters lie in [-2, 2], and a variance's floor
// cuts them.
Scale make_scale(ScaleKind kind) {
  Scale scale;
  scale.kind = kind;
  scale.floor = kind == ScaleKind::kLogStd ? 0 : 0.25;
  scale.soft_clamp = kind == ScaleKind::kLogStd || kind == ScaleKind::kSoftplusStd;
  scale.clamp_min = scale.soft_clamp ? -3 : -HUGE_VAL;
  scale.clamp_max = scale.soft_clamp ? 2.5 : HUGE_VAL;
  return scale;
}

struct LogVar {
  double value, slope;
};
LogVar reference_logvar(ScaleKind kind, double p) {
  if (kind == ScaleKind::kPlain) return {p, 1};
  const Scale s = make_scale(kind);
  double slope = 1;
  if (s.soft_clamp) {
    const double half = (s.clamp_max - s.clamp_min) / 2, middle = (s.clamp_max + s.clamp_min) / 2;
    const double tanh = std::tanh((p - middle) / half);
    p = middle + half * tanh;
    slope = 1 - tanh * tanh;
  }
  if (kind == ScaleKind::kVar) return {std::log(std::fmax(p, s.floor)), 1 / std::fmax(p, s.floor)};
  if (kind == ScaleKind::kSoftplusStd) {
    const double std = std::log1p(std::exp(p)) + s.floor;
    return {2 * std::log(std), 2 * slope / (1 + std::exp(-p)) / std};
  }
  const double factor = kind == ScaleKind::kLogStd ? 2 : 1, sum = std::exp(p) + s.floor;
  return {factor * std::log(sum), factor * slope * std::exp(p) / sum};
}

// Bytes of a mask of exactly their size; the elements that do not count hold NaN in the buffers that are spoiled.
class Mask {
 public:
  explicit Mask(int64_t count) : bytes_(new uint8_t[count]), count_(count) {
    for (int64_t i = 0; i < count; ++i) bytes_[i] = math::mix64(static_cast<uint64_t>(i) + 77) % 3 != 0;
  }
  bool counts(int64_t i) const { return bytes_[i] != 0; }
  void spoil(std::initializer_list<Buffer*> buffers) const {
    for (Buffer* const buffer : buffers) {
      for (int64_t i = 0; i < count_; ++i) {
        if (!counts(i)) buffer->set(i, NAN);
      }
    }
  }
  Operand operand(int64_t row, int64_t element) const {
    Operand o;
    o.data = bytes_.get();
    o.row_stride = row;
    o.stride[0] = element;
    return o;
  }

 private:
  std::unique_ptr<uint8_t[]> bytes_;
  int64_t count_;
};

constexpr uint64_t kSeed = 0x0123456789abcdefu;
constexpr uint32_t kStream = 7;
constexpr int64_t kRowOffset = 4;

class Memory {
 public:
  explicit Memory(int64_t bytes) : data_(bytes > 0 ? std::aligned_alloc(16, (bytes + 15) / 16 * 16) : nullptr) {
    if (data_ != nullptr) std::memset(data_, 0xa5, bytes);
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() { return data_; }

 private:
  void* data_;
};

std::string latent(const Case& c, bool transposed) {
  const int64_t n = c.rows * c.event;
  Buffer mean(c.dtype, n, c.offset), logvar(c.dtype, n, c.offset), z(c.dtype, n, c.offset), kl(c.acc(), c.rows, 0);
  Buffer grad_z(c.dtype, n, c.offset), grad_kl(c.acc(), c.rows, 0), dm(c.dtype, n, c.offset), dl(c.dtype, n, c.offset);
  mean.fill(1), logvar.fill(2), grad_z.fill(3), grad_kl.fill(4);
  const Mask mask(n);
  if (c.masked) mask.spoil({&mean, &logvar, &grad_z});

  LatentArgs a;
  a.shape.rows = c.rows;
  a.shape.event = a.shape.size[0] = c.event;
  a.dtype = c.dtype;
  const int64_t row = transposed ? 1 : c.event, element = transposed ? c.rows : 1;
  a.mean = mean.operand(row, element), a.logvar = logvar.operand(row, element), a.z = z.operand(row, element);
  a.key.seed_value = static_cast<int64_t>(kSeed);
  a.key.stream = kStream, a.key.row_offset = kRowOffset;
  a.reduction = Reduction::kSample;
  a.kl = kl.operand(1, 0);
  if (c.scale != ScaleKind::kPlain) a.scale = make_scale(c.scale);
  if (c.masked) a.mask = mask.operand(row, element);
  Memory forward(cuda::latent_workspace_bytes(a, Pass::kForward));
  cuda::latent(a, Pass::kForward, forward.data(), Context());

  a.grad_z = grad_z.operand(row, element), a.grad_kl = grad_kl.operand(1, 0), a.has_grad_kl = true;
  a.grad_mean = dm.operand(row, element), a.grad_logvar = dl.operand(row, element);
  Memory backward(cuda::latent_workspace_bytes(a, Pass::kBackward));
  cuda::latent(a, Pass::kBackward, backward.data(), Context());

  for (int64_t b = 0; b < c.rows; ++b) {
    double sum = 0;
    for (int64_t i = 0; i < c.event; ++i) {
      const int64_t at = b * row + i * element;
      if (c.masked && !mask.counts(at)) {
        expect(z.get(at) == 0, "z " + c.name(), z.get(at), 0);
        expect(dm.get(at) == 0, "grad_mean " + c.name(), dm.get(at), 0);
        expect(dl.get(at) == 0, "grad_logvar " + c.name(), dl.get(at), 0);
        continue;
      }
      const LogVar scale = reference_logvar(c.scale, logvar.get(at));
      const double m = mean.get(at), lv = scale.value, g = grad_z.get(at), gk = grad_kl.get(b);
      const auto index = static_cast<uint64_t>((kRowOffset + b) * c.event + i);
      const double eps = reference_noise(kSeed, kStream, 0, index, c.dtype == DType::kFloat64);
      const double s = std::exp(lv / 2), expected = m + s * eps;
      const double e_dl = scale.slope * (g * s * eps / 2 + gk * std::expm1(lv) / 2);
      sum += (m * m + std::expm1(lv) - lv) / 2;
      const double bound = c.tolerance * (std::fabs(m) + s * (1 + std::fabs(eps)));
      const double bound_dl =
          scale.slope * c.tolerance * (std::fabs(g) * s * (1 + std::fabs(eps)) + std::fabs(gk) * (1 + std::exp(lv)));
      expect(std::fabs(z.get(at) - expected) <= bound, "z " + c.name(), z.get(at), expected);
      expect(std::fabs(dm.get(at) - (g + gk * m)) <= c.tolerance * 5, "grad_mean " + c.name(), dm.get(at), g + gk * m);
      expect(std::fabs(dl.get(at) - e_dl) <= bound_dl, "grad_logvar " + c.name(), dl.get(at), e_dl);
    }
    expect(std::fabs(kl.get(b) - sum) <= 3e-6 * sum, "kl " + c.name(), kl.get(b), sum);
  }
  return z.bytes() + kl.bytes() + dm.bytes() + dl.bytes();
}

// scale: 0 none, 1 one learned number per row, 2 one per element.
std::string elbo(const Case& c, int scale, Reduction reduction) {
  const int64_t n = c.rows * c.event, latents = 12;
  Buffer x(c.dtype, n, c.offset), recon(c.dtype, n, c.offset), logvar(c.dtype, scale == 2 ? n : c.rows, c.offset);
  Buffer dr(c.dtype, n, c.offset),
      dv(scale == 2 ? c.dtype : c.acc(), scale == 2 ? n : c.rows, scale == 2 ? c.offset : 0);
  Buffer m(c.dtype, c.rows * latents, c.offset), lv(c.dtype, c.rows * latents, c.offset);
  Buffer dm(c.dtype, c.rows * latents, c.offset), dl(c.dtype, c.rows * latents, c.offset);
  Buffer ll(c.acc(), c.rows, 0), kl(c.acc(), c.rows, 0);
  const bool per_row = reduction == Reduction::kSample;
  Buffer loss(c.acc(), per_row ? c.rows : 1, 0);
  x.fill(11), recon.fill(12), logvar.fill(13), m.fill(14), lv.fill(15);
  const Mask mask(n);
  if (c.masked) mask.spoil({&x, &recon});
  if (c.masked && scale == 2) mask.spoil({&logvar});
  const double beta = 0.5;

  ElboArgs a;
  LikelihoodArgs& r = a.reconstruction;
  r.shape.rows = c.rows;
  r.shape.event = r.shape.size[0] = c.event;
  r.dtype = c.dtype;
  r.x = x.operand(c.event), r.mean = recon.operand(c.event), r.grad_mean = dr.operand(c.event);
  if (scale != 0) {
    r.logvar = scale == 2 ? logvar.operand(c.event) : logvar.operand(1, 0);
    r.logvar_inner = scale == 2 ? 1 : c.event;
    r.grad_logvar = scale == 2 ? dv.operand(c.event) : dv.operand(1);
  }
  if (c.scale != ScaleKind::kPlain) r.scale = make_scale(c.scale);
  if (c.masked) r.mask = mask.operand(c.event, 1);
  r.reduction = Reduction::kSample;
  r.ll = ll.operand(1, 0);
  r.grad_ll_scale = -1;
  a.latent.shape.rows = c.rows;
  a.latent.shape.event = a.latent.shape.size[0] = latents;
  a.latent.dtype = c.dtype;
  a.latent.mean = m.operand(latents), a.latent.logvar = lv.operand(latents);
  a.latent.grad_mean = dm.operand(latents), a.latent.grad_logvar = dl.operand(latents);
  a.latent.reduction = Reduction::kSample;
  a.latent.kl = kl.operand(1, 0);
  a.latent.has_grad_kl = true;
  a.latent.grad_kl_scale = beta;
  a.beta_value = beta;
  a.loss = loss.operand(per_row ? 1 : 0, 0);
  a.loss_per_row = per_row;
  Memory workspace(cuda::elbo_workspace_bytes(a, Pass::kBoth));
  cuda::elbo(a, Pass::kBoth, workspace.data(), Context());

  double total = 0, magnitude = 0;
  for (int64_t b = 0; b < c.rows; ++b) {
    double sum_ll = 0, sum_kl = 0, sum_dv = 0, size = 0;
    for (int64_t i = 0; i < c.event; ++i) {
      const int64_t at = b * c.event + i;
      if (c.masked && !mask.counts(at)) {
        expect(dr.get(at) == 0, "grad_recon " + c.name(), dr.get(at), 0);
        if (scale == 2) expect(dv.get(at) == 0, "grad_recon_logvar " + c.name(), dv.get(at), 0);
        continue;
      }
      const LogVar own = reference_logvar(c.scale, scale == 0 ? 0 : logvar.get(scale == 2 ? at : b));
      const double v = own.value;
      const double d = x.get(at) - recon.get(at), s = d * std::exp(-v);
      sum_ll -= (d * s + v + 1.8378770664093454836) / 2;
      size += (std::fabs(d * s) + std::fabs(v) + 2) / 2;
      sum_dv -= (d * s - 1) / 2;
      expect(std::fabs(dr.get(at) + s) <= c.tolerance * (1 + std::fabs(s)), "grad_recon " + c.name(), dr.get(at), -s);
      if (scale == 2) {
        const double expected = own.slope * -(d * s - 1) / 2;
        expect(std::fabs(dv.get(at) - expected) <= own.slope * c.tolerance * (1 + std::fabs(d * s)),
               "grad_recon_logvar " + c.name(), dv.get(at), expected);
      }
    }
    if (scale == 1)
      expect(std::fabs(dv.get(b) - sum_dv) <= 1e-5 * size * 8, "grad of a row's scale " + c.name(), dv.get(b), sum_dv);
    for (int64_t i = 0; i < latents; ++i) {
      const int64_t at = b * latents + i;
      const double mean = m.get(at), e = std::expm1(lv.get(at));
      sum_kl += (mean * mean + e - lv.get(at)) / 2;
      expect(std::fabs(dm.get(at) - beta * mean) <= c.tolerance * 2, "elbo grad_mean " + c.name(), dm.get(at),
             beta * mean);
      expect(std::fabs(dl.get(at) - beta * e / 2) <= c.tolerance * 4, "elbo grad_logvar " + c.name(), dl.get(at),
             beta * e / 2);
    }
    expect(std::fabs(ll.get(b) - sum_ll) <= 3e-6 * size, "ll " + c.name(), ll.get(b), sum_ll);
    expect(std::fabs(kl.get(b) - sum_kl) <= 3e-6 * sum_kl, "elbo kl " + c.name(), kl.get(b), sum_kl);
    const double row_loss = beta * sum_kl - sum_ll;
    if (per_row)
      expect(std::fabs(loss.get(b) - row_loss) <= 6e-6 * (size + sum_kl), "row loss " + c.name(), loss.get(b),
             row_loss);
    total += row_loss;
    magnitude += size + sum_kl;
  }
  if (!per_row) expect(std::fabs(loss.get(0) - total) <= 3e-6 * magnitude, "loss " + c.name(), loss.get(0), total);
  return ll.bytes() + kl.bytes() + loss.bytes() + dr.bytes() + dm.bytes() + dl.bytes() + (scale != 0 ? dv.bytes() : "");
}

template <typename F>
void in_every_order(const Case& c, const F& run) {
  const emulation::Order orders[] = {emulation::Order::kForward, emulation::Order::kReversed,
                                     emulation::Order::kShuffled};
  std::string first;
  for (const emulation::Order order : orders) {
    emulation::set_order(order, 17);
    const std::string result = run();
    if (order == emulation::Order::kForward) first = result;
    if (g_once) return;
    expect(result == first, "not the same bits in another order, " + c.name(), static_cast<double>(order), 0);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1;
  g_once = quick && std::strcmp(arguments[1], "once") == 0;
  const std::vector<int64_t> events =
      quick ? std::vector<int64_t>{3, 16, 4100} : std::vector<int64_t>{1, 3, 31, 33, 64, 1023, 4097, 8192};
  for (const Rounding& r : kDTypes) {
    if (quick && r.dtype == DType::kFloat16) continue;
    if (g_once && r.dtype != DType::kFloat32) continue;
    for (const int64_t event : events) {
      for (const int64_t offset : {int64_t{0}, int64_t{1}}) {
        if (quick && offset == 1 && event != 16) continue;
        const Case c{r.dtype, r.relative, event > 1000 ? 2 : 19, event, offset};
        in_every_order(c, [&] { return latent(c, false); });
        if (event < 100) in_every_order(c, [&] { return latent(c, true); });
        for (const int scale : {0, 1, 2}) {
          in_every_order(c, [&] { return elbo(c, scale, event % 2 != 0 ? Reduction::kSum : Reduction::kSample); });
        }
        if (offset == 1 || (quick && event > 1000)) continue;
        for (const ScaleKind kind :
             {ScaleKind::kPlain, ScaleKind::kLogVar, ScaleKind::kLogStd, ScaleKind::kSoftplusStd, ScaleKind::kVar}) {
          Case changed = c;
          changed.scale = kind;
          changed.masked = kind == ScaleKind::kPlain || kind == ScaleKind::kVar;
          in_every_order(changed, [&] { return latent(changed, event % 2 != 0); });
          in_every_order(changed, [&] { return elbo(changed, 2, Reduction::kSample); });
          if (kind != ScaleKind::kPlain) continue;
          for (const int scale : {0, 1}) {
            in_every_order(changed, [&] { return elbo(changed, scale, Reduction::kSum); });
          }
        }
      }
    }
    const Case one{r.dtype, r.relative, 1, 31, 0};  // a row that nothing follows
    in_every_order(one, [&] { return latent(one, false); });
    in_every_order(one, [&] { return elbo(one, 2, Reduction::kSum); });
    const Case many{r.dtype, r.relative, quick ? 600 : 3000, 8,
                    0};  // more blocks than fit one group would need 262 144 rows
    in_every_order(many, [&] { return elbo(many, 0, Reduction::kSum); });
  }
  if (g_failures != 0) {
    std::fprintf(stderr, "%d wrong\n", g_failures);
    return 1;
  }
  std::puts("ok");
  return 0;
}
