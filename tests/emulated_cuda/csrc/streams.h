// Streams and events, as torch asks for them, and generators of random numbers.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.h"

namespace emulated {
using c10::Stream;

inline int actor_of(const Stream& stream) { return actor_of(stream.device_index(), (int)stream.id()); }

struct Event {
  Clock clock;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, (DeviceIndex)current_device); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < device_count(), "CUDA error: invalid device ordinal");
    if (device.index() >= 0) current_device = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  Stream getStream(Device device) const override { return stream(index(device), stream_on(index(device))); }
  Stream getDefaultStream(Device device) const override { return stream(index(device), 0); }
  Stream getNewStream(Device device, int = 0) const override {
    Lock lock(mutex);
    static int made[kMostDevices] = {0};
    return stream(index(device), 1 + made[index(device)]++ % (kStreams - 1));
  }
  Stream getStreamFromGlobalPool(Device device, bool = false) const override { return getNewStream(device); }
  Stream exchangeStream(Stream wanted) const override {
    auto before = getStream(wanted.device());
    current_stream[wanted.device_index()] = (int)wanted.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return (DeviceIndex)device_count(); }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete (Event*)event; }
  void record(void** event, const Stream& on, const DeviceIndex, const c10::EventFlag) const override {
    Lock lock(mutex);
    if (!*event) *event = new Event();
    ((Event*)*event)->clock = known_to(on);
  }
  void block(void* event, const Stream& waiting) const override {
    Lock lock(mutex);
    if (event) learn(clocks[actor_of(waiting)], ((Event*)event)->clock);
  }
  bool queryEvent(void* event) const override {  // a device as fast as can be: it has happened
    Lock lock(mutex);
    if (event) host_learns(((Event*)event)->clock, "");
    return true;
  }
  bool queryStream(const Stream& asked) const override {
    Lock lock(mutex);
    host_learns(clocks[actor_of(asked)], "");
    return true;
  }
  void synchronizeStream(const Stream& awaited) const override {
    Lock lock(mutex);
    host_learns(clocks[actor_of(awaited)], "stream.synchronize");
  }
  void synchronizeEvent(void* event) const override {
    Lock lock(mutex);
    if (event) host_learns(((Event*)event)->clock, "event.synchronize");
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    Lock lock(mutex);
    Clock all;
    for (int number = 0; number < kStreams; number++) learn(all, clocks[emulated::actor_of(device, number)]);
    host_learns(all, "device.synchronize");
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const Stream& using_it) const override {
    Lock lock(mutex);
    if (auto* block = block_at(data.get())) block->recorded.insert(actor_of(using_it));
  }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 1.0; }

 private:
  static int actor_of(const Stream& stream) { return emulated::actor_of(stream); }
  static int index(Device device) { return device.index() < 0 ? current_device : device.index(); }
  static Stream stream(int device, int number) {
    return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, (DeviceIndex)device), number);
  }
  static Clock known_to(const Stream& stream) {
    Clock clock = clocks[actor_of(stream)];
    learn(clock, clocks[kHost]);
    return clock;
  }
};

// Its numbers are those of a CPU's generator, so that results can be held against a CPU's; a CPU's own is refused.
struct Generator final : c10::GeneratorImpl {
  at::Generator of_cpu;
  Generator(DeviceIndex device, uint64_t seed)
      : GeneratorImpl(Device(DeviceType::CUDA, device), c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        of_cpu(at::detail::createCPUGenerator(seed)) {}
  void set_current_seed(uint64_t seed) override { of_cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return of_cpu.current_seed(); }
  uint64_t seed() override { return of_cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    auto* shared = const_cast<c10::TensorImpl*>(&state);
    of_cpu.set_state(at::Tensor::wrap_tensor_impl(
        c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(shared)));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return of_cpu.get_state().getIntrusivePtr(); }
  GeneratorImpl* clone_impl() const override {
    auto* copy = new Generator(device_.index(), 0);
    copy->of_cpu = of_cpu.clone();
    return copy;
  }
};

inline at::Generator& default_generator(int device) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int index = 0; index < kMostDevices; index++)
      made.push_back(at::make_generator<Generator>((DeviceIndex)index, c10::default_rng_seed_val));
    return made;
  }();
  return all[device < 0 ? current_device : device];
}
}  // namespace emulated
