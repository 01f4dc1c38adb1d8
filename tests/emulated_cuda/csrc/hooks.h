// What torch asks "CUDA" about: whether it is there, its devices, its allocators.
#pragma once
#include <ATen/detail/CUDAHooksInterface.h>

#include "streams.h"

namespace emulated {
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasMAGMA() const override { return true; }
  bool hasCuSOLVER() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex device = -1) const override { return default_generator(device); }
  at::Generator getNewGenerator(DeviceIndex device = -1) const override {
    return at::make_generator<Generator>(device < 0 ? (DeviceIndex)current_device_() : device,
                                         c10::default_rng_seed_val);
  }
  Device getDeviceFromPtr(void* address) const override {
    auto* block = block_at(address);
    return Device(DeviceType::CUDA, block && !block->pinned ? (DeviceIndex)block->device : 0);
  }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  DeviceIndex current_device() const override { return current_device_(); }
  int getNumGPUs() const override { return device_count(); }
  DeviceIndex deviceCount() const override { return (DeviceIndex)device_count(); }
  void setCurrentDevice(DeviceIndex device) const override { emulated::current_device = device; }
  DeviceIndex getCurrentDevice() const override { return current_device_(); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    auto before = current_device_();
    emulated::current_device = device;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  void deviceSynchronize(DeviceIndex device) const override { Guard().synchronizeDevice(device); }
  std::string showConfig() const override { return "emulated"; }

 private:
  static DeviceIndex current_device_() { return (DeviceIndex)emulated::current_device; }
};

// `import torch` has asked for the hooks already and found those of a build without CUDA; they have no state.
inline void install_hooks() {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
}
}  // namespace emulated
