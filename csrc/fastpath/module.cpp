// Python's way around Python: the commonest calls as C++ functions with C++ autograd nodes.
//
// An autograd.Function in Python costs more than the kernels of a small latent, and several times that once other work
// has displaced it from the caches. The stable ABI has no autograd nodes, so this one file is compiled against the
// torch and the Python at hand and is used with no other; wherever it cannot be loaded, kernels/fused_elbo/ops.py does
// the same.
//
// Every function returns None where the call is not one for it, and has then done nothing: the caller goes on in
// Python.

#include <torch/csrc/Exceptions.h>

#include "nodes.h"

namespace fused_elbo::fastpath {
namespace {

// The devices whose tensors the extension's kernels serve when nobody asks for a backend.
bool serves_cpu = false, serves_cuda = false;

bool is_served(const Tensor& t) { return t.is_cpu() ? serves_cpu : serves_cuda; }

PyObject* pass() { Py_RETURN_NONE; }

PyObject* pair(const Tensor& first, const Tensor& second) { return wrap_all<2>({first, second}).release(); }

int64_t integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}
double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

// A plain number, and no NaN; false for anything else.
bool take_number(PyObject* argument, double& to) {
  if (!PyFloat_CheckExact(argument) && !PyLong_CheckExact(argument)) return false;
  to = number(argument);
  return to == to;
}

// Reads fields from a NamedTuple, in order.
class Reader {
 public:
  explicit Reader(PyObject* tuple) : tuple_(tuple) {}
  void operator()(int64_t& field) { field = integer(next()); }
  void operator()(double& field) { field = number(next()); }
  void operator()(Scale& field) { field.each(Reader(next())); }

 private:
  PyObject* next() { return PyTuple_GET_ITEM(tuple_, at_++); }

  PyObject* tuple_;
  Py_ssize_t at_ = 0;
};

template <class Params>
Params from_python(PyObject* tuple) {
  Params params;
  params.each(Reader(tuple));
  return params;
}

// A reduction by name; false for what is not one of them.
bool take_reduction(PyObject* name, int64_t& code) {
  if (!PyUnicode_Check(name)) return false;
  constexpr std::pair<const char*, int64_t> kCodes[] = {
      {"sample", kSample}, {"batchmean", kBatchmean}, {"sum", kSum}, {"none", kNone}};
  for (const auto& [text, value] : kCodes) {
    if (PyUnicode_CompareWithASCIIString(name, text) == 0) {
      code = value;
      return true;
    }
  }
  return false;
}

template <size_t kCount>
bool take_all(PyObject* const* arguments, std::array<Tensor, kCount>& tensors) {
  for (size_t i = 0; i < kCount; ++i) {
    if (!take_optional(arguments[i], tensors[i])) return false;
  }
  return true;
}

// Gradients in half precision that are divided by the batch size in forward would fall below the smallest float16:
// Python sums and divides afterwards.
bool divides_float16(const ElboTensors& t, const ElboParams& p) {
  return p.reduction == kBatchmean && GradMode::is_enabled() &&
         (t[0].scalar_type() == at::kHalf || (t[3].defined() && t[3].scalar_type() == at::kHalf));
}

PyObject* to_python(const std::array<Tensor, 3>& outputs) { return wrap_all(outputs).release(); }

// ------------------------------------------------------- checked calls: ops.latent, ops.likelihood and ops.elbo

// latent(mean, logvar, prior_mean, prior_logvar, seed, mask, LatentParams) -> (z, kl)
PyObject* checked_latent(PyObject* const* arguments) {
  LatentTensors inputs;
  if (!nobody_watches() || !take_all(arguments, inputs)) return pass();
  const auto [z, kl] = latent(inputs, from_python<LatentParams>(arguments[6]));
  return pair(z, kl);
}

// likelihood(x, mean, logvar, mask, LikelihoodParams) -> log-likelihood
PyObject* checked_likelihood(PyObject* const* arguments) {
  LikelihoodTensors inputs;
  if (!nobody_watches() || !take_all(arguments, inputs)) return pass();
  return wrap(likelihood(inputs, from_python<LikelihoodParams>(arguments[4])));
}

// elbo(*ELBOInputs, ELBOParams) -> (loss, log_likelihood, kl)
PyObject* checked_elbo(PyObject* const* arguments) {
  ElboTensors inputs;
  if (!nobody_watches() || !take_all(arguments, inputs)) return pass();
  const ElboParams params = from_python<ElboParams>(arguments[8]);
  if (divides_float16(inputs, params)) return pass();
  return to_python(elbo(inputs, params));
}

// ------------------------------------------- unchecked calls: the public functions with the arguments most often given

// From torch's generator of the device, by the one documented draw.
Tensor draw_seed(const Tensor& like) {
  Tensor seed = at::empty({}, like.options().dtype(at::kLong));
  seed.random_();
  return seed;
}

// mean, logvar, prior_mean and prior_logvar, the prior's both or neither: tensors that need no broadcasting.
bool take_gaussians(PyObject* const* arguments, LatentTensors& inputs) {
  const auto& [mean, logvar, prior_mean, prior_logvar, seed, mask] = inputs;
  if (!take(arguments[0], inputs[0]) || !take(arguments[1], inputs[1]) || !take_optional(arguments[2], inputs[2]) ||
      !take_optional(arguments[3], inputs[3]) || !is_batched(mean) || !are_alike(mean, logvar) || !is_served(mean)) {
    return false;
  }
  if (!prior_mean.defined()) return !prior_logvar.defined();
  return prior_logvar.defined() && are_alike(mean, prior_mean) && are_alike(mean, prior_logvar);
}

// reparameterize_kl(mean, logvar, prior_mean, prior_logvar, reduction) -> (z, kl), with a seed drawn from torch's
// generator; reduction=None: no KL.
PyObject* reparameterize_kl(PyObject* const* arguments) {
  LatentTensors inputs;
  LatentParams params;
  if (arguments[4] == Py_None) {
    params.reduction = kOff;
  } else if (!take_reduction(arguments[4], params.reduction)) {
    return pass();
  }
  if (!take_gaussians(arguments, inputs) || !nobody_watches()) return pass();
  inputs[4] = draw_seed(inputs[0]);
  const auto [z, kl] = latent(inputs, params);
  return pair(z, kl);
}

// gaussian_kl(mean, logvar, prior_mean, prior_logvar, reduction) -> kl
PyObject* gaussian_kl(PyObject* const* arguments) {
  LatentTensors inputs;
  LatentParams params;
  params.want_z = false;
  if (!take_reduction(arguments[4], params.reduction) || !take_gaussians(arguments, inputs) || !nobody_watches()) {
    return pass();
  }
  return wrap(std::get<1>(latent(inputs, params)));
}

// posterior(mean, logvar, chunk_dim, clamp_min, clamp_max, want_z, reduction) -> (z, kl) of a DiagonalGaussian with
// N(0, I): mean holds both where there is no logvar. Shapes were checked when it was made.
PyObject* posterior(PyObject* const* arguments) {
  LatentTensors inputs;
  LatentParams params;
  const auto& [mean, logvar, prior_mean, prior_logvar, seed, mask] = inputs;
  params.want_z = arguments[5] == Py_True;
  if (arguments[6] == Py_None) {
    params.reduction = kOff;
  } else if (!take_reduction(arguments[6], params.reduction)) {
    return pass();
  }
  if (!take(arguments[0], inputs[0]) || !take_optional(arguments[1], inputs[1]) || !is_batched(mean) ||
      (logvar.defined() && !are_alike(mean, logvar)) || !is_served(mean) || !nobody_watches()) {
    return pass();
  }
  params.chunk_dim = integer(arguments[2]);
  params.scale.clamp_min = number(arguments[3]);
  params.scale.clamp_max = number(arguments[4]);
  if (params.want_z) inputs[4] = draw_seed(mean);
  const auto [z, kl] = latent(inputs, params);
  return pair(z, kl);
}

// A decoder's variance as a number or a tensor that needs no conversion.
bool take_variance(PyObject* argument, const Tensor& mean, Tensor& logvar, double& value) {
  if (argument == Py_None) return true;
  if (take_number(argument, value)) return true;
  return take(argument, logvar) && is_floating(logvar) && logvar.device() == mean.device() &&
         (logvar.dim() == 0 || logvar.sizes() == mean.sizes());
}

// gaussian_log_likelihood(x, mean, logvar, reduction) -> log-likelihood
PyObject* log_likelihood(PyObject* const* arguments) {
  LikelihoodTensors inputs;
  LikelihoodParams params;
  const auto& [x, mean, logvar, mask] = inputs;
  if (!take(arguments[0], inputs[0]) || !take(arguments[1], inputs[1]) ||
      !take_variance(arguments[2], mean, inputs[2], params.logvar_value) ||
      !take_reduction(arguments[3], params.reduction)) {
    return pass();
  }
  if (!is_batched(mean) || !are_alike(x, mean) || !is_served(mean) || !nobody_watches()) return pass();
  return wrap(likelihood(inputs, params));
}

// elbo_loss(recon_x, x, mean, logvar, kl, recon_logvar, beta, reduction) -> (loss, log_likelihood, kl)
PyObject* elbo_loss(PyObject* const* arguments) {
  ElboTensors inputs;
  ElboParams params;
  const auto& [recon_x, x, recon_logvar, mean, logvar, kl, beta, mask] = inputs;
  if (!take(arguments[0], inputs[0]) || !take(arguments[1], inputs[1]) || !take_optional(arguments[2], inputs[3]) ||
      !take_optional(arguments[3], inputs[4]) || !take_optional(arguments[4], inputs[5]) ||
      !take_variance(arguments[5], recon_x, inputs[2], params.recon_logvar_value) ||
      !take_number(arguments[6], params.beta_value) || !take_reduction(arguments[7], params.reduction) ||
      params.reduction == kNone) {
    return pass();
  }
  if (!is_batched(recon_x) || !are_alike(recon_x, x)) return pass();
  // One dtype throughout: nats of a float64 latent beside a float32 reconstruction are Python's to convert.
  if (mean.defined() != logvar.defined() || mean.defined() == kl.defined()) return pass();
  if (mean.defined()) {
    if (!is_batched(mean) || !are_alike(mean, logvar) || mean.device() != recon_x.device() ||
        mean.size(0) != recon_x.size(0) || mean.scalar_type() != recon_x.scalar_type()) {
      return pass();
    }
  } else if (kl.dim() != 1 || kl.size(0) != recon_x.size(0) || kl.device() != recon_x.device() ||
             kl.scalar_type() != (recon_x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)) {
    return pass();
  }
  if (divides_float16(inputs, params) || !is_served(recon_x) || !nobody_watches()) return pass();
  return to_python(elbo(inputs, params));
}

// ------------------------------------------------------------------------------------------------------ settings

// serve(cpu, cuda): for which devices the unchecked calls may take the extension's kernels.
PyObject* serve(PyObject* const* arguments) {
  serves_cpu = arguments[0] == Py_True;
  serves_cuda = arguments[1] == Py_True;
  Py_RETURN_NONE;
}

// set_direct_calls(on): whether CPU operations are called without the dispatcher.
PyObject* set_direct_calls(PyObject* const* arguments) {
  direct_calls() = arguments[0] == Py_True;
  Py_RETURN_NONE;
}

// set_formulas(latent, likelihood, elbo): backward with a graph of its own.
PyObject* set_formulas(PyObject* const* arguments) {
  PyObject** const all[] = {&formulas().latent, &formulas().likelihood, &formulas().elbo};
  for (int i = 0; i < 3; ++i) {
    Py_INCREF(arguments[i]);
    Py_XSETREF(*all[i], arguments[i]);
  }
  Py_RETURN_NONE;
}

template <PyObject* (*kFunction)(PyObject* const*), Py_ssize_t kArguments>
PyObject* entry(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != kArguments) {
    PyErr_Format(PyExc_TypeError, "fused_elbo._fastpath: expected %zd arguments, got %zd", kArguments, count);
    return nullptr;
  }
  return kFunction(arguments);
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*kFunction)(PyObject* const*), Py_ssize_t kArguments>
constexpr PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<kFunction, kArguments>)),
          METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<checked_latent, 7>("latent"),
    method<checked_likelihood, 5>("likelihood"),
    method<checked_elbo, 9>("elbo"),
    method<reparameterize_kl, 5>("reparameterize_kl"),
    method<gaussian_kl, 5>("gaussian_kl"),
    method<posterior, 7>("posterior"),
    method<log_likelihood, 4>("gaussian_log_likelihood"),
    method<elbo_loss, 8>("elbo_loss"),
    method<serve, 2>("serve"),
    method<set_formulas, 3>("set_formulas"),
    method<set_direct_calls, 1>("set_direct_calls"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_fastpath", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace fused_elbo::fastpath

PyMODINIT_FUNC PyInit__fastpath() { return PyModule_Create(&fused_elbo::fastpath::definition); }
