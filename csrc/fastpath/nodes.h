// The operations with autograd: each saves its inputs and, in backward, runs one raw operation.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "kernels.h"
#include "node.h"

namespace fused_elbo::fastpath {

// Writes fields into a tuple, in order.
class Writer {
 public:
  void operator()(int64_t field) { append(own(PyLong_FromLongLong(field))); }
  void operator()(double field) { append(own(PyFloat_FromDouble(field))); }
  void operator()(Scale& field) {
    Writer inner;
    field.each(inner);
    append(inner.tuple());
  }
  Object tuple() const { return own(PyList_AsTuple(list_.get())); }

 private:
  void append(const Object& value) {
    if (PyList_Append(list_.get(), value.get()) != 0) throw python_error();
  }

  Object list_ = own(PyList_New(0));
};

template <class Params>
Object to_python(Params params) {
  Writer writer;
  params.each(writer);
  return writer.tuple();
}

// A formula's gradients for saved inputs and upstream gradients; its arguments are (inputs, params, *upstream).
template <size_t kInputs, class Params, size_t kUpstream>
variable_list run_formula(PyObject* formula, const std::array<Tensor, kInputs>& inputs, const Params& params,
                          const std::array<Tensor, kUpstream>& upstream, Wanted wanted) {
  const WithGil gil;
  try {
    const Object arguments = own(PyTuple_New(2 + kUpstream));
    PyTuple_SET_ITEM(arguments.get(), 0, wrap_all(inputs).release());
    PyTuple_SET_ITEM(arguments.get(), 1, to_python(params).release());
    for (size_t i = 0; i < kUpstream; ++i) {
      PyTuple_SET_ITEM(arguments.get(), static_cast<Py_ssize_t>(2 + i), own(wrap(upstream[i])).release());
    }
    const Object result = own(PyObject_Call(formula, arguments.get(), nullptr));
    return gradients_of(result.get(), wanted);
  } catch (python_error& error) {
    error.persist();
    throw;
  }
}

struct LatentBackward final : Operation<LatentBackward, LatentParams, 6> {
  static constexpr const char* kName = "LatentBackward";

  static variable_list backward(const LatentTensors& inputs, const LatentParams& params, variable_list&& upstream,
                                Wanted wanted) {
    if (GradMode::is_enabled()) {  // create_graph=True
      return run_formula<6, LatentParams, 2>(formulas().latent, inputs, params,
                                             {std::move(upstream[0]), std::move(upstream[1])}, wanted);
    }
    auto [mean, logvar, prior_mean, prior_logvar] =
        latent_backward(inputs, upstream[0], upstream[1], params, wanted[2] || wanted[3]);
    variable_list grads(4);
    if (wanted[0]) grads[0] = std::move(mean);
    if (wanted[1]) grads[1] = std::move(logvar);
    if (wanted[2]) grads[2] = std::move(prior_mean);
    if (wanted[3]) grads[3] = std::move(prior_logvar);
    return grads;
  }
};

inline std::tuple<Tensor, Tensor> latent(LatentTensors inputs, const LatentParams& params) {
  const auto& [mean, logvar, prior_mean, prior_logvar, seed, mask] = inputs;
  const bool graph = torch::autograd::compute_requires_grad(mean, logvar, prior_mean, prior_logvar);
  std::tuple<Tensor, Tensor> outputs;
  {
    const WithoutGil no_gil;
    const at::AutoDispatchBelowADInplaceOrView raw;
    outputs = latent_forward(inputs, params);
  }
  if (graph) {
    auto node = make_node<LatentBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(mean, logvar, prior_mean, prior_logvar));
    node->params = params;
    node->saved.save(inputs);
    torch::autograd::set_history(std::get<0>(outputs), node);
    torch::autograd::set_history(std::get<1>(outputs), node);
  }
  return outputs;
}

struct LikelihoodBackward final : Operation<LikelihoodBackward, LikelihoodParams, 4> {
  static constexpr const char* kName = "LikelihoodBackward";

  static variable_list backward(const LikelihoodTensors& inputs, const LikelihoodParams& params,
                                variable_list&& upstream, Wanted wanted) {
    if (!upstream[0].defined()) return variable_list(3);
    if (GradMode::is_enabled()) {
      return run_formula<4, LikelihoodParams, 1>(formulas().likelihood, inputs, params, {std::move(upstream[0])},
                                                 wanted);
    }
    auto [mean, logvar] = likelihood_backward(inputs, upstream[0], wanted[0] || wanted[1], wanted[2], params);
    variable_list grads(3);
    if (wanted[0]) grads[0] = -mean;
    if (wanted[1]) grads[1] = std::move(mean);
    if (wanted[2]) grads[2] = std::move(logvar);
    return grads;
  }
};

inline Tensor likelihood(const LikelihoodTensors& inputs, const LikelihoodParams& params) {
  const auto& [x, mean, logvar, mask] = inputs;
  const bool graph = torch::autograd::compute_requires_grad(x, mean, logvar);
  Tensor output;
  {
    const WithoutGil no_gil;
    const at::AutoDispatchBelowADInplaceOrView raw;
    output = likelihood_forward(inputs, params);
  }
  if (graph) {
    auto node = make_node<LikelihoodBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, mean, logvar));
    node->params = params;
    node->saved.save(inputs);
    torch::autograd::set_history(output, node);
  }
  return output;
}

// Saves its inputs and their gradients, which forward has computed, and scales these.
using ElboSaved = std::array<Tensor, 12>;

inline ElboSaved elbo_saved(const ElboTensors& inputs, const std::array<Tensor, 4>& grads) {
  ElboSaved all;
  std::copy(inputs.begin(), inputs.end(), all.begin());
  std::copy(grads.begin(), grads.end(), all.begin() + inputs.size());
  return all;
}

struct ElboBackward final : Operation<ElboBackward, ElboParams, 12> {
  static constexpr const char* kName = "ELBOBackward";

  static variable_list backward(const ElboSaved& tensors, const ElboParams& params, variable_list&& upstream,
                                Wanted wanted) {
    constexpr size_t kReconX = 0, kX = 1, kReconLogvar = 2, kMean = 3, kLogvar = 4, kKl = 5;
    variable_list result(6);
    const Tensor grad_loss = std::move(upstream[0]);
    if (!grad_loss.defined()) return result;
    ElboTensors inputs;
    std::copy_n(tensors.begin(), inputs.size(), inputs.begin());
    const Tensor* const kept = &tensors[inputs.size()];  // of recon_x, recon_logvar, mean and logvar
    const auto formula = [&] {
      return run_formula<8, ElboParams, 1>(formulas().elbo, inputs, params, {grad_loss}, wanted);
    };
    if (GradMode::is_enabled()) return formula();
    const bool as_they_are = is_one(grad_loss);
    const auto scaled = [&](const Tensor& grad) {
      if (as_they_are) return grad;
      if (grad_loss.dim() == 0) return grad * grad_loss;
      std::vector<int64_t> shape(static_cast<size_t>(grad.dim()), 1);
      shape[0] = -1;
      return grad * grad_loss.view(shape).to(grad.scalar_type());
    };
    if (wanted[kReconX] || wanted[kX]) {
      Tensor grad = scaled(kept[0]);
      if (wanted[kX]) result[kX] = -grad;
      if (wanted[kReconX]) result[kReconX] = std::move(grad);
    }
    if (wanted[kReconLogvar]) {
      // Summed over the batch before it could be scaled per sample: that one gradient is computed anew.
      result[kReconLogvar] = grad_loss.dim() == 1 ? formula()[kReconLogvar] : scaled(kept[1]);
    }
    if (wanted[kMean]) result[kMean] = scaled(kept[2]);
    if (wanted[kLogvar]) result[kLogvar] = scaled(kept[3]);
    if (wanted[kKl]) result[kKl] = of_kl(grad_loss, inputs, params);
    return result;
  }

 private:
  // Whether scaling can be left out: where reading the number is free, and no one keeps the graph.
  static bool is_one(const Tensor& grad_loss) {
    return grad_loss.dim() == 0 && is_plain(grad_loss) && grad_loss.is_cpu() &&
           !torch::autograd::get_current_graph_task_keep_graph() && grad_loss.item<double>() == 1.0;
  }

  static Tensor of_kl(const Tensor& grad_loss, const ElboTensors& inputs, const ElboParams& params) {
    const int64_t batch = inputs[0].size(0);
    Tensor grad = grad_loss;
    if (params.reduction == kBatchmean) grad = grad / batch;
    if (params.reduction != kSample) grad = grad.expand({batch});
    return inputs[6].defined() ? grad * inputs[6] : grad * params.beta_value;
  }
};

inline std::array<Tensor, 3> elbo(const ElboTensors& inputs, const ElboParams& params) {
  const auto& [recon_x, x, recon_logvar, mean, logvar, kl, beta, mask] = inputs;
  const bool graph = torch::autograd::compute_requires_grad(recon_x, x, recon_logvar, mean, logvar, kl);
  ElboResult outputs;
  {
    const WithoutGil no_gil;
    const at::AutoDispatchBelowADInplaceOrView raw;
    outputs = elbo_forward(inputs, params, graph);
  }
  auto& [loss, ll, kl_out, grad_recon, grad_recon_logvar, grad_mean, grad_logvar] = outputs;
  if (graph) {
    auto node = make_node<ElboBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(recon_x, x, recon_logvar, mean, logvar, kl));
    node->params = params;
    node->saved.save(elbo_saved(inputs, {grad_recon, grad_recon_logvar, grad_mean, grad_logvar}));
    torch::autograd::set_history(loss, node);
  }
  return {loss, ll, kl_out};
}

}  // namespace fused_elbo::fastpath
