// What the autograd nodes of the fast path share.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <bitset>
#include <cstring>
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

// Which gradients of a node are asked for; which tensors are defined.
using Wanted = std::bitset<8>;
using Defined = std::bitset<16>;

// Gradients from a formula's tuple; None and what is not wanted are left undefined.
inline variable_list gradients_of(PyObject* tuple, Wanted wanted) {
  variable_list grads(static_cast<size_t>(PyTuple_GET_SIZE(tuple)));
  for (size_t i = 0; i < grads.size(); ++i) {
    PyObject* const grad = PyTuple_GET_ITEM(tuple, i);
    if (grad != Py_None && wanted[i]) grads[i] = THPVariable_Unpack(grad);
  }
  return grads;
}

// A node that computes gradients from saved tensors, parameters and upstream gradients, by
//   static variable_list Self::backward(tensors, params, upstream, wanted)
// It keeps nothing else, so that compiled autograd (torch._dynamo.config.compiled_autograd) can call it from a graph.
template <class Self, class Params, size_t kTensors>
struct Operation : Node {
  using Tensors = std::array<Tensor, kTensors>;

  Params params;
  Saved<kTensors> saved;

  std::string name() const override { return Self::kName; }
  void release_variables() override { saved.release(); }

  variable_list apply(variable_list&& upstream) override {
    return Self::backward(saved.unpack(), params, std::move(upstream), wanted());
  }

  // Parameters go into the graph as a tensor: another seed is no reason to compile again.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    if (!words_.defined()) words_ = to_words(params);
    args.collect(words_);
    for (const SavedVariable& each : saved.variable) args.collect(each, false);
  }

  variable_list apply_with_saved(const variable_list& upstream,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    namespace dynamo = torch::dynamo::autograd;
    swap.before(words_);
    for (SavedVariable& each : saved.variable) swap.before(each);

    // A list of tensors may not hold an undefined one.
    variable_list defined{words_};
    Defined is_defined;
    const Tensors tensors = saved.unpack();
    for (size_t i = 0; i < kTensors; ++i) {
      is_defined[i] = tensors[i].defined();
      if (is_defined[i]) defined.push_back(tensors[i]);
    }
    dynamo::PackedArgs arguments;
    arguments.pack(defined);
    arguments.pack(static_cast<int64_t>(is_defined.to_ulong()));
    arguments.pack(static_cast<int64_t>(wanted().to_ulong()));
    std::vector<c10::TypePtr> types;
    for (const c10::IValue& each : arguments.vec()) types.push_back(each.type());

    const auto& python = dynamo::getPyCompilerInterface();
    const std::string function = python->bind_function(swap.get_py_compiler(), Self::kName, apply_packed, types,
                                                       /*is_custom_function=*/true, /*is_traceable=*/false);
    using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
    const c10::IValue outputs = dynamo::IValuePacker<Metadata>::pack(dynamo::get_input_metadata(this->next_edges()));
    variable_list grads =
        python->call_function(swap.get_py_compiler(), "apply_functional", function, upstream, arguments.vec(), outputs);

    swap.after(words_);
    for (SavedVariable& each : saved.variable) swap.after(each);
    return grads;
  }

 private:
  Wanted wanted() const {
    Wanted result;
    for (size_t i = 0; i < this->num_outputs(); ++i) result[i] = this->task_should_compute_output(i);
    return result;
  }

  static variable_list apply_packed(const variable_list& upstream, const std::vector<c10::IValue>& packed) {
    torch::dynamo::autograd::PackedArgs arguments(packed);
    const auto defined = arguments.unpack<variable_list>();
    const Defined is_defined(static_cast<uint64_t>(arguments.unpack<int64_t>()));
    const Wanted wanted(static_cast<uint64_t>(arguments.unpack<int64_t>()));
    Tensors tensors;
    for (size_t i = 0, next = 1; i < kTensors; ++i) {
      if (is_defined[i]) tensors[i] = defined[next++];
    }
    return Self::backward(tensors, from_words(defined[0]), variable_list(upstream), wanted);
  }

  static Tensor to_words(const Params& params) {
    static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) % sizeof(int64_t) == 0);
    const Tensor words = at::empty({static_cast<int64_t>(sizeof(Params) / sizeof(int64_t))}, at::kLong);
    std::memcpy(words.mutable_data_ptr(), &params, sizeof(Params));
    return words;
  }
  static Params from_words(const Tensor& words) {
    Params params;
    std::memcpy(&params, words.const_data_ptr(), sizeof(Params));
    return params;
  }

  mutable Tensor words_;
};

}  // namespace fused_elbo::fastpath
