// The module `_C_autograd`: autograd of the training operator as a node in C++, for the torch that the package is built
// with. It speaks to torch's own C++ interface, which no release promises to the next; sn_ops loads it beside that very
// version, and has the same in Python for every other (`_EagerLoss` in sn_ops/ops.py).
//
// A small batch feels it: an autograd.Function costs more than the kernels, and so do the arguments of an operator that
// Python calls.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/op_registration/adaption.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Optional = std::optional<Tensor>;
using LossSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&, const Optional&,
                                                         const Optional&, c10::SymInt, c10::SymInt, double, double,
                                                         std::int64_t, std::int64_t);
using BackwardSignature = std::vector<Tensor>(const Tensor&, const Tensor&, const Optional&, const Tensor&,
                                              const Tensor&, c10::SymInt, std::int64_t, bool, bool);

// The operators of one namespace, and what raises the error for what they cannot do. They live as long as the process,
// and so does what names them.
struct Operators {
  Operators(const std::string& space, PyObject* refuse)
      : loss(find<LossSignature>(space + "::loss")),
        backward(find<BackwardSignature>(space + "::loss_backward")),
        refuse_(refuse) {
    Py_INCREF(refuse);
  }
  [[noreturn]] void refuse(const char* what) const {
    const pybind11::gil_scoped_acquire locked;
    const THPObjectPtr nothing(PyObject_CallFunction(refuse_, "s", what));
    throw python_error();
  }

  c10::TypedOperatorHandle<LossSignature> loss;
  c10::TypedOperatorHandle<BackwardSignature> backward;

 private:
  PyObject* refuse_;

  template <class Signature>
  static c10::TypedOperatorHandle<Signature> find(const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").typed<Signature>();
  }
};

// The arguments of a call, see LossArguments in sn_ops/reference.py.
struct Call {
  const Operators* operators;
  Tensor feats;
  Tensor labels;
  Optional candidates;
  Optional candidate_labels;
  Optional self_index;
  std::int64_t self_offset;
  std::int64_t k;
  double alpha;
  double weight;
  std::int64_t squeeze;
  std::int64_t reduction;

  bool wants_gradient() const {
    return at::GradMode::is_enabled() &&
           (feats.requires_grad() || (candidates.has_value() && candidates->requires_grad()));
  }
  // The loss, the graph and the statistics, by the kernels and not by autograd.
  std::tuple<Tensor, Tensor, Tensor> run() const {
    const at::AutoDispatchBelowAutograd below;
    return operators->loss.call(feats, labels, candidates, candidate_labels, self_index, self_offset, k, alpha, weight,
                                squeeze, reduction);
  }
};

// ---- the node -------------------------------------------------------------------------------------------------------

// What a backward needs besides the tensors that were saved.
struct Kept {
  const Operators* operators;
  std::int64_t k;
  std::int64_t reduction;
};

// The gradients of the features and, if there are any, of the candidates.
variable_list gradients(AutogradContext& context, const Kept& kept, const Tensor& upstream) {
  const variable_list saved = context.get_saved_variables();
  const bool banked = saved[1].defined();
  variable_list grads(banked ? 2 : 1);
  if (!upstream.defined()) return grads;
  if (upstream._fw_grad(0).defined()) kept.operators->refuse("forward-mode derivatives are");
  const bool need_feats = context.needs_input_grad(0);
  const bool need_candidates = banked && context.needs_input_grad(1);
  // With create_graph=True the operator's own autograd takes part, and refuses the next derivative.
  std::optional<at::AutoDispatchBelowAutograd> below;
  if (!at::GradMode::is_enabled()) below.emplace();
  std::vector<Tensor> found;
  try {
    found = kept.operators->backward.call(upstream, saved[0], banked ? Optional(saved[1]) : std::nullopt, saved[2],
                                          saved[3], kept.k, kept.reduction, need_feats, need_candidates);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());  // torch's engine would make a RuntimeError of it
  }
  if (need_candidates) grads[1] = std::move(found.back());
  if (need_feats) grads[0] = std::move(found.front());
  return grads;
}

// The loss as torch's own C++ functions are written. Compiled autograd calls this backward, by its name, with what
// LossNode::describe() has written down; everything else calls LossNode.
struct SupportNeighborLoss : public torch::autograd::Function<SupportNeighborLoss> {
  static constexpr bool is_traceable = false;  // compiled autograd runs it as it is
  static constexpr const char* kOperators = "operators";
  static constexpr const char* kNeighbours = "k";
  static constexpr const char* kReduction = "reduction";

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const auto number = [context](const char* name) { return context->saved_data[name].toInt(); };
    const Kept kept{reinterpret_cast<const Operators*>(number(kOperators)), number(kNeighbours), number(kReduction)};
    variable_list grads = gradients(*context, kept, upstream[0]);
    grads.resize(2);  // one for each input, given or not
    return grads;
  }
};

using FunctionNode = torch::autograd::CppNode<SupportNeighborLoss>;

// A node made by hand: what torch does for any function of any arguments takes longer than the loss of a small batch.
struct LossNode final : public FunctionNode {
  Kept kept{};

  std::string name() const override { return "SupportNeighborLossBackward"; }
  variable_list apply(variable_list&& upstream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return gradients(ctx_, kept, upstream[0]);
  }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const_cast<LossNode*>(this)->describe();
    FunctionNode::compiled_args(args);
  }

 private:
  void describe() {
    ctx_.saved_data[SupportNeighborLoss::kOperators] = reinterpret_cast<std::intptr_t>(kept.operators);
    ctx_.saved_data[SupportNeighborLoss::kNeighbours] = kept.k;
    ctx_.saved_data[SupportNeighborLoss::kReduction] = kept.reduction;
    if (input_info_.empty()) {
      for (const Tensor& input : ctx_.get_saved_variables()) {
        if (input_info_.size() < is_variable_input_.size() && input.defined()) input_info_.emplace_back(input);
      }
    }
  }
};

// How torch holds a node, which changed: an intrusive pointer or a shared one.
template <class Pointer>
Pointer pointer_to_node(void (FunctionNode::*)(Pointer));
using NodePointer = decltype(pointer_to_node(&FunctionNode::set_ctx_grad_fn));

template <class Pointer, class Node>
Pointer make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    // torch's own, which is looked up only where it exists
    return Pointer(new Node(), [](Node* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>();
  }
}

// The loss, differentiable if its inputs are, and the statistics.
std::pair<Tensor, Tensor> differentiable_loss(const Call& call) {
  if (!call.wants_gradient()) {
    auto [loss, graph, stats] = call.run();
    return {std::move(loss), std::move(stats)};
  }
  const NodePointer pointer = make_node<NodePointer, LossNode>();
  auto& node = static_cast<LossNode&>(*pointer);
  node.kept = {call.operators, call.k, call.reduction};
  node.set_ctx_grad_fn(pointer);
  node.ctx_.set_materialize_grads(false);
  node.is_variable_input_ = {true, call.candidates.has_value()};
  if (call.candidates.has_value()) {
    node.set_next_edges(torch::autograd::collect_next_edges(call.feats, *call.candidates));
  } else {
    node.set_next_edges(torch::autograd::collect_next_edges(call.feats));
  }
  auto [loss, graph, stats] = call.run();
  torch::autograd::set_history(loss, pointer);
  node.output_info_.emplace_back(loss);
  node.ctx_.save_for_backward({call.feats, call.candidates.value_or(Tensor()), std::move(graph), stats});
  node.save_variables_to_ctx();
  return {std::move(loss), std::move(stats)};
}

// ---- Python ---------------------------------------------------------------------------------------------------------

constexpr Py_ssize_t kArguments = 12;

// Takes a tensor as it is. Subclasses are left to Python, where their __torch_function__ has its say.
bool take(PyObject* object, Tensor* tensor) {
  if (!THPVariable_CheckExact(object)) return false;
  *tensor = THPVariable_Unpack(object);
  return true;
}
bool take(PyObject* object, Optional* tensor) {
  if (object == Py_None) return true;
  return take(object, &tensor->emplace());
}
// Symbols are left to Python.
bool take(PyObject* object, std::int64_t* value) {
  if (!PyLong_Check(object)) return false;
  *value = PyLong_AsLongLong(object);
  if (*value != -1 || PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}
bool take(PyObject* object, double* value) {
  if (!PyFloat_CheckExact(object)) return false;
  *value = PyFloat_AS_DOUBLE(object);
  return true;
}

// loss(*LossArguments, want_stats) -> loss, or (loss, stats), or None for a call that Python must serve. The
// operators are in `capsule`.
PyObject* loss(PyObject* capsule, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == kArguments, "sn_ops: loss: expected ", kArguments, " arguments, got ", count);
  Call call{};
  call.operators = static_cast<const Operators*>(PyCapsule_GetPointer(capsule, nullptr));
  if (call.operators == nullptr) return nullptr;
  const bool plain =
      take(arguments[0], &call.feats) && take(arguments[1], &call.labels) && take(arguments[2], &call.candidates) &&
      take(arguments[3], &call.candidate_labels) && take(arguments[4], &call.self_index) &&
      take(arguments[5], &call.self_offset) && take(arguments[6], &call.k) && take(arguments[7], &call.alpha) &&
      take(arguments[8], &call.weight) && take(arguments[9], &call.squeeze) && take(arguments[10], &call.reduction);
  if (!plain || at::impl::torch_function_mode_enabled()) Py_RETURN_NONE;
  std::pair<Tensor, Tensor> results;
  try {
    const pybind11::gil_scoped_release unlocked;
    results = differentiable_loss(call);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());  // as the backward's
  }
  if (arguments[11] != Py_True) return THPVariable_Wrap(std::move(results.first));
  PyObject* pair = PyTuple_New(2);
  if (pair == nullptr) return nullptr;
  PyTuple_SET_ITEM(pair, 0, THPVariable_Wrap(std::move(results.first)));
  PyTuple_SET_ITEM(pair, 1, THPVariable_Wrap(std::move(results.second)));
  if (PyTuple_GET_ITEM(pair, 0) != nullptr && PyTuple_GET_ITEM(pair, 1) != nullptr) return pair;
  Py_DECREF(pair);
  return nullptr;
  END_HANDLE_TH_ERRORS
}

PyMethodDef loss_method = {"loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&loss)), METH_FASTCALL,
                           "loss or (loss, stats) of LossArguments, or None where Python must serve the call."};

// bind(namespace, refuse) -> the function above for the operators of a namespace. refuse(what) raises.
PyObject* bind(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  static std::deque<Operators> known;  // nodes point into it
  const char* name = nullptr;
  PyObject* refuse = nullptr;
  if (PyArg_ParseTuple(arguments, "sO", &name, &refuse) == 0) return nullptr;
  PyObject* capsule = PyCapsule_New(&known.emplace_back(name, refuse), nullptr, nullptr);
  if (capsule == nullptr) return nullptr;
  PyObject* function = PyCFunction_NewEx(&loss_method, capsule, nullptr);
  Py_DECREF(capsule);
  return function;
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMODINIT_FUNC PyInit__C_autograd() {
  static std::array<PyMethodDef, 2> methods = {{
      {"bind", &bind, METH_VARARGS, "The loss with autograd by the operators of a namespace."},
      {nullptr, nullptr, 0, nullptr},
  }};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_C_autograd",
                               "Autograd of the training operators in C++.",
                               -1,
                               methods.data(),
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
