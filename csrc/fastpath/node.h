// What the autograd nodes of the fast path share.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <string>
#include <type_traits>

#include "plain.h"

namespace fused_elbo::fastpath {

using torch::autograd::GradMode;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Nodes are counted by shared_ptr or by intrusive_ptr, depending on the release of torch.
using NodePointer = decltype(torch::autograd::Edge::function);

template <class T>
auto make_node() {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<Node>>) {
    // Found in the namespace of Node, by those releases alone that have it.
    return std::shared_ptr<T>(new T(), [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

// The tensors of a call, kept until backward; version counters and saved-tensor hooks apply to them as to any other.
template <size_t kCount>
struct Saved {
  SavedVariable variable[kCount];

  void save(const std::array<Tensor, kCount>& tensors) {
    for (size_t i = 0; i < kCount; ++i) {
      if (tensors[i].defined()) variable[i] = SavedVariable(tensors[i], false);
    }
  }
  std::array<Tensor, kCount> unpack() const {
    std::array<Tensor, kCount> tensors;
    for (size_t i = 0; i < kCount; ++i) tensors[i] = variable[i].unpack();
    return tensors;
  }
  void release() {
    for (SavedVariable& each : variable) each.reset_data();
  }
};

// While kernels run, other Python threads may.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// For backward, which the engine runs without the lock.
class WithGil {
 public:
  WithGil() : state_(PyGILState_Ensure()) {}
  ~WithGil() { PyGILState_Release(state_); }
  WithGil(const WithGil&) = delete;

 private:
  PyGILState_STATE state_;
};

// A reference to a Python object that is owned here.
struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Object = std::unique_ptr<PyObject, Release>;

inline Object own(PyObject* object) {
  if (object == nullptr) throw python_error();
  return Object(object);
}

inline PyObject* wrap(const Tensor& t) {
  if (t.defined()) return THPVariable_Wrap(t);
  Py_RETURN_NONE;
}

template <size_t kCount>
Object wrap_all(const std::array<Tensor, kCount>& tensors) {
  Object result = own(PyTuple_New(kCount));
  for (size_t i = 0; i < kCount; ++i) PyTuple_SET_ITEM(result.get(), i, own(wrap(tensors[i])).release());
  return result;
}

// The formulas in differentiable PyTorch, set by Python: backward runs them where a graph of it is wanted.
struct Formulas {
  PyObject *latent = nullptr, *likelihood = nullptr, *elbo = nullptr;
};
inline Formulas& formulas() {
  static Formulas all;
  return all;
}

// Gradients from a formula's tuple; None and what is not needed are left undefined.
inline variable_list gradients_of(PyObject* result, const Node& node, size_t count) {
  variable_list grads(count);
  for (size_t i = 0; i < count; ++i) {
    PyObject* const grad = PyTuple_GetItem(result, static_cast<Py_ssize_t>(i));
    if (grad == nullptr) throw python_error();
    if (grad != Py_None && node.task_should_compute_output(i)) grads[i] = THPVariable_Unpack(grad);
  }
  return grads;
}

[[noreturn]] inline void raise_python_error() {
  python_error error;
  error.persist();
  throw std::move(error);
}

}  // namespace fused_elbo::fastpath
