// Operators that are about memory itself: making tensors, copies between host and device, views.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/zeros_like.h>

#include "kernels.h"

namespace emulated {
// A copy from or to pinned memory that the host does not wait for is carried out as late as the rules allow.
inline Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool to_device = is_on_device(self), from_device = is_on_device(source), across = to_device != from_device;
  Call call;
  call.operation = !across ? "copy on the device" : to_device ? "copy to the device" : "copy to the host";
  call.device = to_device ? self.device().index() : source.device().index();
  const int actor = actor_on(call.device);
  Tensor to = call.alias(self, true), from = call.alias(source, false);
  Block* in_host = across ? block_at((to_device ? source : self).storage().data()) : nullptr;
  const bool pinned = in_host && in_host->pinned;
  if (pinned) call.used.emplace_back(in_host, !to_device);
  const bool as_it_is = self.scalar_type() == source.scalar_type() && self.sizes() == source.sizes() &&
                        self.is_non_overlapping_and_dense() && self.strides() == source.strides();
  std::unique_lock<Mutex> lock(mutex);
  const uint64_t step = begin(actor);
  notes.launches[call.operation]++;
  for (auto& [block, writes] : call.used) use(block, actor, step, writes, call.operation);
  if (non_blocking && pinned && as_it_is && self.numel()) {
    Pending later{actor, step, {}, {}};
    for (auto& [block, writes] : call.used)
      if (block) later.blocks.push_back(block);
    later.run = [target = self.data_ptr(), start = source.const_data_ptr(), size = self.nbytes()] {
      std::memcpy(target, start, size);
    };
    pending.push_back(std::move(later));
    return self;
  }
  // From pageable memory the bytes are taken before the call returns; what comes to the host is waited for.
  if (across && self.numel() && !(to_device && non_blocking)) host_learns(clocks[actor], call.operation);
  lock.unlock();
  to.copy_(from);
  return self;
}

using Ints = c10::IntArrayRef;
template <typename T>
using Maybe = std::optional<T>;

inline OnDevice made_on(Maybe<Device> device, Maybe<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  const int index = device ? device->index() : -1;
  TORCH_CHECK(index < device_count(), "CUDA error: invalid device ordinal");
  return OnDevice(index);
}
inline Tensor empty(Ints size, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<Device> device, Maybe<bool> pinned,
                    Maybe<at::MemoryFormat> format) {
  auto here = made_on(device, pinned);
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(size, &device_allocator, keys, c10::dtype_or_default(dtype), format);
}
inline Tensor empty_strided(Ints size, Ints stride, Maybe<at::ScalarType> dtype, Maybe<at::Layout>,
                            Maybe<Device> device, Maybe<bool> pinned) {
  auto here = made_on(device, pinned);
  const c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, keys, c10::dtype_or_default(dtype));
}

inline Tensor& set_storage(Tensor& self, c10::Storage source, int64_t offset, Ints size, Ints stride) {
  TORCH_CHECK(source.device().is_cuda(), "Attempted to set the storage of a tensor on device \"", self.device(),
              "\" to a storage on different device \"", source.device(), "\"");
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(source);
  tensor->set_storage_offset(offset);
  if (stride.size() == size.size() && size.size()) {
    tensor->set_sizes_and_strides(size, stride);
  } else {
    tensor->set_sizes_contiguous(size);
  }
  return self;
}
inline Tensor& set_whole_storage(Tensor& self, c10::Storage source) {
  const int64_t count = source.nbytes() / self.element_size();
  return set_storage(self, source, 0, {count}, {1});
}
inline Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
inline Tensor& set_nothing(Tensor& self) {
  return set_storage(self, at::empty({0}, self.options()).storage(), 0, {0}, {1});
}
inline const Tensor& resize_(const Tensor& self, Ints size, Maybe<at::MemoryFormat>) {
  auto* storage = self.storage().unsafeGetStorageImpl();
  const size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.element_size();
  if (storage->nbytes() < bytes) {
    OnDevice here(self.device().index());
    auto larger = device_allocator.allocate(bytes);
    std::memcpy(larger.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr(std::move(larger));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

inline void record_stream(Tensor& self, Stream stream) {
  Lock lock(mutex);
  if (auto* block = block_at(self.storage().data())) block->recorded.insert(actor_of(stream));
}
inline bool never_pinned(const Tensor&, Maybe<Device>) { return false; }
inline Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  // A GPU counts integers too, the CPU only floats.
  const bool integers = at::isIntegralType(self.scalar_type(), false);
  Tensor counted = at::histc(integers ? self.cpu().to(at::kDouble) : self.cpu(), bins, low, high);
  return counted.to(self.device(), self.scalar_type());
}
// One kernel, as the fused attention of a GPU is; here that of the CPU. With gradients, the parts it is made of.
inline Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe<Tensor>& mask,
                        double dropout, bool causal, Maybe<double> scale, bool grouped) {
  const bool differentiated = query.requires_grad() || key.requires_grad() || value.requires_grad();
  if (at::GradMode::is_enabled() && differentiated) {
    // The parts add a mask to the scores: what may not be seen is minus infinity there.
    Maybe<Tensor> added = mask;
    if (mask && mask->scalar_type() == at::kBool)
      added = at::zeros_like(*mask, query.options()).masked_fill(mask->logical_not(), -INFINITY);
    return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, added, dropout, causal, std::nullopt,
                                                              scale, grouped));
  }
  at::AutoDispatchBelowADInplaceOrView without_gradients;
  static auto operation = c10::Dispatcher::singleton().findSchemaOrThrow("aten::scaled_dot_product_attention", "");
  torch::jit::Stack stack;
  torch::jit::push(stack, query, key, value, mask, dropout, causal, scale, grouped);
  run_on_cpu(operation, {}, &stack);
  return stack.back().toTensor();
}
}  // namespace emulated
