// Kernels: every operator that has one on the CPU, run on the same memory.
//
//     tensors of the device ──► aliases on the CPU ──► the CPU's kernel ──► results, as tensors of the device
//     refused: another device, a CPU generator           noted: launch, reads, writes, whether the host waits
#pragma once
#include <ATen/Context.h>
#include <ATen/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>

#include "streams.h"

namespace emulated {
using at::Tensor;

inline bool is_on_device(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == DeviceType::CUDA;
}

// While it lives, memory is allocated on this device.
class OnDevice {
 public:
  explicit OnDevice(int device) : before_(current_device) {
    if (device >= 0) current_device = device;
  }
  ~OnDevice() { current_device = before_; }

 private:
  int before_;
};

// One call of an operator: which tensors it got and gave, and which blocks it used.
class Call {
 public:
  std::string operation;
  int device = -1;
  std::vector<std::pair<Block*, bool>> used;  // and whether it writes them

  // The same memory as a tensor of the CPU; other tensors as they are.
  Tensor alias(const Tensor& tensor, bool writes) {
    if (!is_on_device(tensor)) return tensor;
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    auto found = to_cpu_.find(storage);
    if (found == to_cpu_.end()) {
      c10::DataPtr shared(storage->mutable_data(), Device(DeviceType::CPU));
      const auto sized = c10::Storage::use_byte_size_t();
      c10::Storage same(sized, storage->nbytes(), std::move(shared), c10::GetCPUAllocator(), true);
      found = to_cpu_.emplace(storage, same).first;
      to_device_.emplace(same.unsafeGetStorageImpl(), tensor.storage());
    }
    used.emplace_back(block_at(storage->data()), writes);
    Tensor made = view_of(tensor, found->second, c10::DispatchKey::CPU);
    if (tensor.is_conj()) made._set_conj(true);
    if (tensor.is_neg()) made._set_neg(true);
    originals_.emplace(made.unsafeGetTensorImpl(), tensor);
    if (writes) written_.emplace_back(tensor, made);
    return made;
  }

  // What the kernel gave, as a tensor of the device: one that it got, a view of one, or fresh memory.
  Tensor result(const Tensor& given) {
    if (!given.defined()) return given;
    if (auto found = originals_.find(given.unsafeGetTensorImpl()); found != originals_.end()) return found->second;
    auto* storage = given.storage().unsafeGetStorageImpl();
    auto found = to_device_.find(storage);
    if (found == to_device_.end()) {
      OnDevice here(device);
      const size_t size = storage->nbytes();
      const auto sized = c10::Storage::use_byte_size_t();
      c10::Storage fresh(sized, size, device_allocator.allocate(size), &device_allocator, true);
      std::memcpy(fresh.mutable_data(), storage->data(), size);
      used.emplace_back(block_at(fresh.data()), true);
      kept_.push_back(given.storage());  // its address must not come back within this call
      found = to_device_.emplace(storage, fresh).first;
    }
    return view_of(given, found->second, c10::DispatchKey::CUDA);
  }

  // An `out=` tensor that the kernel made larger, or gave another shape.
  void resize_originals() {
    for (auto& [original, made] : written_) {
      auto* storage = original.storage().unsafeGetStorageImpl();
      const c10::Storage& now = made.storage();
      if (now.data() != storage->data()) {
        if (storage->nbytes() < now.nbytes()) {
          OnDevice here(original.device().index());
          storage->set_data_ptr(device_allocator.allocate(now.nbytes()));
          storage->set_nbytes(now.nbytes());
          used.emplace_back(block_at(storage->data()), true);
        }
        std::memcpy(storage->mutable_data(), now.data(), now.nbytes());
      }
      auto* tensor = original.unsafeGetTensorImpl();
      if (original.sizes() != made.sizes() || original.strides() != made.strides()) {
        tensor->set_sizes_and_strides(made.sizes(), made.strides());
        tensor->set_storage_offset(made.storage_offset());
      }
    }
  }

 private:
  std::unordered_map<c10::StorageImpl*, c10::Storage> to_cpu_, to_device_;
  std::unordered_map<c10::TensorImpl*, Tensor> originals_;
  std::vector<std::pair<Tensor, Tensor>> written_;  // the original, and the alias that the kernel wrote
  std::vector<c10::Storage> kept_;

  static Tensor view_of(const Tensor& like, const c10::Storage& storage, c10::DispatchKey key) {
    const c10::DispatchKeySet keys(key);
    Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, like.dtype());
    auto* tensor = made.unsafeGetTensorImpl();
    tensor->set_sizes_and_strides(like.sizes(), like.strides());
    tensor->set_storage_offset(like.storage_offset());
    if (like.unsafeGetTensorImpl()->is_wrapped_number()) tensor->set_wrapped_number(true);
    return made;
  }
};

using Names = std::set<std::string>;
// The host has to know a number of the device's memory before it can go on.
inline const Names kWaiting = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero.out", "aten::equal", "aten::masked_select",
    "aten::masked_select.out", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::linalg_eigh", "aten::_linalg_eigh", "aten::_linalg_eigh.eigenvalues", "aten::_linalg_svd",
    "aten::_linalg_svd.U", "aten::repeat_interleave.Tensor", "aten::histc"};
// They take indices of the CPU, which are copied over, and masks, whose true places are counted first.
inline const Names kIndexing = {"aten::index.Tensor", "aten::index.Tensor_out", "aten::_index_put_impl_",
                                "aten::index_put_", "aten::index_put", "aten::_unsafe_index.Tensor"};
// Torch refuses them on a GPU where it is told to be deterministic; `cumsum` of floats only.
inline const Names kRefusedIfDeterministic = {
    "aten::cumsum", "aten::cumsum.out", "aten::kthvalue", "aten::kthvalue.values", "aten::median.dim",
    "aten::median.dim_values", "aten::histc", "aten::put_"};
// On a GPU they add floats in any order; `cumsum` and `index_add` among them.
inline const Names kInAnyOrder = {
    "aten::index_add", "aten::index_add_", "aten::index_add.out", "aten::scatter_add", "aten::scatter_add_",
    "aten::scatter_add.out", "aten::scatter_reduce.two", "aten::scatter_reduce.two_out", "aten::cumsum",
    "aten::cumsum.out", "aten::_index_put_impl_", "aten::embedding_dense_backward", "aten::put_"};

// What a call is made of, found out before anything runs; refuses what a GPU refuses.
struct Arguments {
  bool mask = false, index_of_cpu = false, floating = false;

  Arguments(Call& call, const c10::FunctionSchema& schema, const torch::jit::Stack& stack, size_t first) {
    for (size_t i = first; i < stack.size(); i++)
      if (stack[i].isTensor() && is_on_device(stack[i].toTensor())) call.device = stack[i].toTensor().device().index();
    const bool indexes = kIndexing.count(call.operation);
    for (size_t i = first; i < stack.size(); i++) {
      const auto& value = stack[i];
      if (value.isTensor()) {
        look(call, value.toTensor(), indexes);
      } else if (value.isList()) {
        for (const c10::IValue& one : value.toListRef())
          if (one.isTensor()) {
            look(call, one.toTensor(), indexes);
            mask |= indexes && i > first && is_on_device(one.toTensor()) && one.toTensor().scalar_type() == at::kBool;
          }
      } else if (value.isDevice() && value.toDevice().is_cuda() && call.device < 0) {
        call.device = value.toDevice().index();
      }
    }
    if (call.device < 0) call.device = current_device;
  }

 private:
  void look(Call& call, const Tensor& tensor, bool indexes) {
    if (!tensor.defined()) return;
    if (is_on_device(tensor)) {
      if (call.device < 0) call.device = tensor.device().index();
      refuse_if(call.device != tensor.device().index(), call, tensor);
      floating |= tensor.is_floating_point();
    } else if (tensor.dim() > 0) {
      const auto dtype = tensor.scalar_type();
      const bool is_index = indexes && (dtype == at::kLong || dtype == at::kInt || dtype == at::kBool);
      refuse_if(!is_index, call, tensor);
      index_of_cpu = true;
    }
  }
  static void refuse_if(bool differs, const Call& call, const Tensor& tensor) {
    TORCH_CHECK(!differs, "Expected all tensors to be on the same device, but found at least two devices, cuda:",
                std::max(call.device, 0), " and ", tensor.device(), "! (", call.operation, ")");
  }
};

// The arguments as the CPU's kernel wants them, in place on the stack.
inline void put_aliases(Call& call, const c10::FunctionSchema& schema, torch::jit::Stack* stack, size_t first) {
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    auto& value = (*stack)[first + i];
    const auto& argument = schema.arguments()[i];
    const bool writes = argument.alias_info() && argument.alias_info()->isWrite();
    if (value.isTensor()) {
      value = call.alias(value.toTensor(), writes);
    } else if (value.isTensorList()) {
      c10::List<Tensor> aliases;
      for (const Tensor& tensor : value.toTensorVector()) aliases.push_back(call.alias(tensor, writes));
      value = aliases;
    } else if (value.isList() && value.toListRef().size() &&
               (value.toListRef()[0].isTensor() || value.toListRef()[0].isNone())) {
      c10::List<std::optional<Tensor>> aliases;
      for (const c10::IValue& one : value.toListRef())
        aliases.push_back(one.isTensor() ? std::optional<Tensor>(call.alias(one.toTensor(), writes)) : std::nullopt);
      value = aliases;
    } else if (value.isDevice()) {
      value = Device(DeviceType::CPU);
    } else if (value.isGenerator()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().type() == DeviceType::CUDA,
                  "Expected a 'cuda' device type for generator but found 'cpu' (", call.operation, ")");
      value = generator.get<Generator>()->of_cpu;
    } else if (argument.name() == "generator" && value.isNone()) {
      value = default_generator(call.device).get<Generator>()->of_cpu;
    }
  }
}

inline void refuse_if_not_deterministic(const Call& call, const Arguments& arguments) {
  const bool sums = call.operation.rfind("aten::cumsum", 0) == 0;
  if (kRefusedIfDeterministic.count(call.operation) && (arguments.floating || !sums))
    at::globalContext().alertNotDeterministic(call.operation);
}

inline void note_call(Call& call, const Arguments& arguments, int actor, uint64_t step) {
  notes.launches[call.operation]++;
  for (bool writes : {false, true})
    for (auto& [block, written] : call.used)
      if (written == writes) use(block, actor, step, writes, call.operation);
  call.used.clear();
  if (arguments.floating && kInAnyOrder.count(call.operation))
    notes.nondeterministic[call.operation + " @ " + line_of_code()]++;
  if (kWaiting.count(call.operation)) host_learns(clocks[actor], call.operation);
  if (arguments.mask) host_learns(clocks[actor], call.operation + " by a mask");
  if (arguments.index_of_cpu) host_learns(clocks[actor], call.operation + " by an index of the CPU");
}

inline void run_on_cpu(const c10::OperatorHandle& operation, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  Call call;
  call.operation = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const size_t first = stack->size() - schema.arguments().size();
  const Arguments arguments(call, schema, *stack, first);
  refuse_if_not_deterministic(call, arguments);
  put_aliases(call, schema, stack, first);
  const int actor = actor_on(call.device);
  uint64_t step;
  {
    Lock lock(mutex);
    step = begin(actor);
    note_call(call, arguments, actor, step);
  }
  operation.callBoxed(stack);
  call.resize_originals();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.result(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> results;
      for (const Tensor& tensor : value.toTensorVector()) results.push_back(call.result(tensor));
      value = results;
    }
  }
  Lock lock(mutex);
  for (auto& [block, writes] : call.used) use(block, actor, step, writes, call.operation);
}
}  // namespace emulated
