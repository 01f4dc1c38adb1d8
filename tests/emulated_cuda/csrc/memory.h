// Memory: blocks of the device and pinned blocks of the host, both in host memory, with a detector of races.
//
// Fresh memory is NaN. A use that has not happened before another one, of which at least one writes, is a race. So is a
// block that goes back to its stream's pool while another stream still uses it and `record_stream` was not called.
#pragma once
#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/Allocator.h>

#include <cstring>
#include <unordered_map>

#include "clocks.h"

namespace emulated {
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

constexpr size_t kGranularity = 512;
constexpr int kNotANumber = 0xFF;  // in every byte: NaN in all floating dtypes

struct Use {
  uint64_t step = 0;
  std::string operation;
};
struct Block {
  char* start;
  size_t size;
  int device;  // -1 for pinned memory
  int owner;   // the actor in whose pool it is
  bool pinned;
  int writer = -1;
  Use written;
  std::map<int, Use> reads;  // since it was last written
  std::map<int, Use> uses;   // the last of each actor
  std::set<int> recorded;    // actors for which `record_stream` was called

  size_t held() const { return std::max((size + kGranularity - 1) / kGranularity * kGranularity, kGranularity); }
};

inline std::unordered_map<void*, Block*> blocks;  // by the address where they start
inline std::set<Block*> freed_but_used;           // a copy that is not carried out yet reads or writes them
// Bytes held now, at most since `reset_peak`, and at most since `empty_cache`: freed memory is kept until then.
inline size_t allocated[kMostDevices], peak[kMostDevices], reserved[kMostDevices];

inline Block* block_at(const void* address) {
  Lock lock(mutex);  // weights are fetched on a thread of their own: blocks come and go meanwhile
  auto found = blocks.find(const_cast<void*>(address));
  return found == blocks.end() ? nullptr : found->second;
}
inline bool is_awaited(const Block* block) {
  for (auto& one : pending)
    for (auto* used : one.blocks)
      if (used == block) return true;
  return false;
}
inline void destroy(Block* block) {
  std::free(block->start);
  delete block;
}
inline void free_what_nothing_uses() {
  for (auto one = freed_but_used.begin(); one != freed_but_used.end();) {
    if (is_awaited(*one)) {
      ++one;
    } else {
      destroy(*one);
      one = freed_but_used.erase(one);
    }
  }
}

inline std::string on_stream(const std::string& operation, int actor) {
  return operation + " on stream " + std::to_string((actor - 1) % kStreams);
}
inline void note_race(const Block& block, const std::string& kind, const std::string& what, const std::string& other) {
  const std::string memory = block.pinned ? "pinned memory, " : "device memory, ";
  notes.races[memory + kind + ": " + what + " against " + other + " @ " + line_of_code()]++;
}

// An actor uses a block, in its step `step`.
inline void use(Block* block, int actor, uint64_t step, bool writes, const std::string& operation) {
  if (!block) return;
  const Clock& clock = clocks[actor];
  if (is_awaited(block)) carry_out(clock);
  const std::string here = on_stream(operation, actor);
  if (block->writer >= 0 && block->writer != actor && !known(block->writer, block->written.step, clock))
    note_race(*block, writes ? "write after write" : "read after write", here,
              on_stream(block->written.operation, block->writer));
  if (writes) {
    for (auto& [reader, read] : block->reads)
      if (reader != actor && !known(reader, read.step, clock))
        note_race(*block, "write after read", here, on_stream(read.operation, reader));
    block->reads.clear();
    block->writer = actor;
    block->written = {step, operation};
  } else {
    block->reads[actor] = {step, operation};
  }
  block->uses[actor] = {step, operation};
}

inline Block* allocate(size_t size, bool pinned) {
  Lock lock(mutex);
  const int device = pinned ? -1 : current_device, owner = pinned ? kHost : actor_on(current_device);
  auto* block = new Block{nullptr, size, device, owner, pinned};
  block->start = (char*)std::aligned_alloc(kGranularity, block->held());
  std::memset(block->start, kNotANumber, block->held());
  blocks[block->start] = block;
  if (!pinned) {
    allocated[block->device] += block->held();
    for (size_t* most : {peak, reserved}) most[block->device] = std::max(most[block->device], allocated[block->device]);
    notes.allocations++;
  }
  return block;
}

inline void release(void* address) {
  Lock lock(mutex);
  Block* block = block_at(address);
  if (!block) return;
  blocks.erase(address);
  if (!block->pinned) {
    allocated[block->device] -= block->held();
    // The allocator hands a block out again to its own stream at once.
    Clock of_owner = clocks[block->owner];
    learn(of_owner, clocks[kHost]);
    for (auto& [actor, last] : block->uses)
      if (actor != block->owner && !block->recorded.count(actor) && !known(actor, last.step, of_owner)) {
        note_race(*block, "freed in use, without record_stream", on_stream("free", block->owner),
                  on_stream(last.operation, actor));
        std::memset(block->start, kNotANumber, block->held());
      }
  }
  if (is_awaited(block)) {
    freed_but_used.insert(block);
  } else {
    destroy(block);
  }
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto* block = emulated::allocate(size, false);
    return {block->start, block->start, &release, Device(DeviceType::CUDA, (DeviceIndex)block->device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
inline DeviceAllocator device_allocator;

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t size) override {
    auto* block = emulated::allocate(size, true);
    return {block->start, block->start, &release, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
inline PinnedAllocator pinned_allocator;

inline bool is_pinned(const void* address) {
  Lock lock(mutex);
  for (auto& [start, block] : blocks)
    if (block->pinned && address >= start && address < (char*)start + std::max<size_t>(block->size, 1)) return true;
  return false;
}
}  // namespace emulated
