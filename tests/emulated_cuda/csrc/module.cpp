// An emulated CUDA device, as an extension of a CPU build of torch: it fills the empty CUDA dispatch key. Kernels are
// the CPU's; everything else is as strict as a GPU. See `tests/emulated_cuda/__init__.py`.
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "hooks.h"
#include "tensors.h"

namespace emulated {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

torch::CppFunction on_cpu() { return torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>(); }

// Where the CPU has a kernel of its own beside a composite one, a GPU has one too, nearly always.
void register_kernels() {
  static torch::Library aten(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  using Key = c10::DispatchKey;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    auto operation = dispatcher.findOp(name);
    if (!operation || !operation->hasSchema() || !operation->hasKernelForDispatchKey(Key::CPU)) continue;
    if (operation->hasKernelForDispatchKey(Key::CUDA)) continue;
    const bool composite = operation->hasKernelForDispatchKey(Key::CompositeExplicitAutograd) ||
                           operation->hasKernelForDispatchKey(Key::CompositeExplicitAutogradNonFunctional) ||
                           operation->hasKernelForDispatchKey(Key::CompositeImplicitAutograd);
    const std::string full_name = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
    if (composite) aten.impl(full_name.c_str(), on_cpu());
  }
}

py::dict report() {
  Lock lock(mutex);
  py::dict all;
  all["waits"] = notes.waits;
  all["launches"] = notes.launches;
  all["races"] = notes.races;
  all["nondeterministic"] = notes.nondeterministic;
  all["allocations"] = notes.allocations;
  return all;
}
}  // namespace emulated

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(emulated::on_cpu()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", emulated::copy_);
  m.impl("empty.memory_format", emulated::empty);
  m.impl("empty_strided", emulated::empty_strided);
  m.impl("set_.source_Storage_storage_offset", emulated::set_storage);
  m.impl("set_.source_Storage", emulated::set_whole_storage);
  m.impl("set_.source_Tensor", emulated::set_tensor);
  m.impl("set_", emulated::set_nothing);
  m.impl("resize_", emulated::resize_);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<at::Tensor (*)(const at::Tensor&, c10::IntArrayRef)>(at::native::view));
  m.impl("unfold", at::native::unfold);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("record_stream", emulated::record_stream);
  m.impl("is_pinned", emulated::never_pinned);
  m.impl("histc", emulated::histc);
  m.impl("scaled_dot_product_attention", emulated::attention);
  m.impl("convolution", emulated::on_cpu());
  m.impl("convolution_backward", emulated::on_cpu());
}
TORCH_LIBRARY_IMPL(aten, AutogradCUDA, m) { m.impl("scaled_dot_product_attention", emulated::attention); }

PYBIND11_MODULE(_emulated_cuda, m) {
  namespace py = pybind11;
  emulated::install_hooks();
  emulated::register_kernels();
  c10::SetAllocator(c10::DeviceType::CUDA, &emulated::device_allocator, 100);
  at::setHostAllocator(c10::DeviceType::CUDA, &emulated::pinned_allocator, 100);
  m.def("device_count", &emulated::device_count);
  m.def("current_device", [] { return emulated::current_device; });
  m.def("set_device", [](int device) {
    emulated::Guard().setDevice({c10::DeviceType::CUDA, (c10::DeviceIndex)device});
  });
  m.def("current_stream", &emulated::stream_on);
  m.def("set_stream", [](int device, int stream) { emulated::current_stream[device] = stream; });
  m.def("synchronize", [](int device) { emulated::Guard().synchronizeDevice((c10::DeviceIndex)device); },
        py::call_guard<py::gil_scoped_release>());
  m.def("manual_seed", [](uint64_t seed) {
    for (int device = 0; device < emulated::device_count(); device++)
      emulated::default_generator(device).set_current_seed(seed);
  });
  m.def("allocated_bytes", [](int device) { return emulated::allocated[device]; });
  m.def("peak_bytes", [](int device) { return emulated::peak[device]; });
  m.def("reserved_bytes", [](int device) { return emulated::reserved[device]; });
  m.def("empty_cache", [](int device) { emulated::reserved[device] = emulated::allocated[device]; });
  m.def("reset_peak", [](int device) { emulated::peak[device] = emulated::allocated[device]; });
  m.def("report", &emulated::report);
  m.def("forget", [] {
    emulated::Lock lock(emulated::mutex);
    emulated::notes = {};
  });
}
