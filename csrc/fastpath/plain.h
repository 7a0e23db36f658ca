// Which calls take the fast path: those that torch, too, would run without asking anyone. Everything else (subclasses,
// modes, transforms, tracing, tangents) goes to Python, which owns every special case and every error message.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <initializer_list>

namespace fused_elbo::fastpath {

using at::Tensor;

// Nothing on this thread wants to see or replace the operations inside a call.
inline bool nobody_watches() {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set() || torch::jit::tracer::isTracing()) return false;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  constexpr c10::DispatchKeySet kWatching({c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                           c10::DispatchKey::FuncTorchDynamicLayerBackMode,
                                           c10::DispatchKey::Functionalize, c10::DispatchKey::PreDispatch});
  return !local.included_.has_any(kWatching);
}

// The keys of an ordinary dense tensor: a batched, functional, conjugated, sparse or fake one has others.
inline c10::DispatchKeySet plain_keys(c10::DeviceType type) {
  if (type == c10::DeviceType::CPU) {
    static const c10::DispatchKeySet cpu = at::empty({0}, at::device(at::kCPU)).key_set();
    return cpu;
  }
  static const c10::DispatchKeySet cuda = at::empty({0}, at::device(at::kCUDA)).key_set();
  return cuda;
}

inline bool is_plain(const Tensor& t) {
  const c10::DeviceType type = t.device().type();
  return (type == c10::DeviceType::CPU || type == c10::DeviceType::CUDA) && t.key_set() == plain_keys(type) &&
         !torch::autograd::isFwGradDefined(t);
}

// An argument that is a plain tensor (or a Parameter), or None if that is allowed: false for anything else.
inline bool take(PyObject* argument, Tensor& to) {
  if (!THPVariable_CheckExact(argument)) return false;
  to = THPVariable_Unpack(argument);
  return is_plain(to);
}
inline bool take_optional(PyObject* argument, Tensor& to) { return argument == Py_None || take(argument, to); }

inline std::optional<Tensor> optional(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

inline bool is_floating(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
      return true;
    default:
      return false;
  }
}

// Batched tensors of one shape, dtype and device: what needs no check but this one.
inline bool are_alike(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.device() == b.device();
}
inline bool is_batched(const Tensor& t) { return is_floating(t) && t.dim() > 0 && t.dim() <= 25; }

}  // namespace fused_elbo::fastpath
