// The device's memory: the CPU's, taken under the name of the device, and filled with no numbers.
//
// Every allocation is a block. A block knows which streams read and wrote which of its bytes when
// (see streams.h), so that work that was not ordered is found, and so that freeing memory under
// another stream's work is.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>
#include <c10/core/TensorImpl.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace emulated {

inline const c10::Device DEVICE(c10::DeviceType::CUDA, 0);
constexpr int64_t TOTAL_MEMORY = int64_t(80) << 30;
constexpr size_t GRANULE = 512;  // bytes: what the caching allocator rounds to, and aligns to
constexpr uint8_t GARBAGE = 0xff;  // every float type's NaN; whole numbers are overwritten by dtype

using Clock = std::vector<uint64_t>;  // by stream: how many of its operations are known to be done

// One operation's use of some of a block's bytes; the shape is kept to tell strided views apart.
struct Access {
  int64_t low, high;  // bytes from the block's beginning
  int stream;
  uint64_t tick = 0;
  int64_t graph;  // whose capture recorded it, and nothing ran; -1: none
  std::string name;
  bool dense;
  int64_t offset, itemsize;
  std::vector<int64_t> sizes, strides;  // strides in bytes
};

struct Block {
  char* address;
  size_t bytes;
  int stream;  // that it was taken on
  int64_t serial;  // no two allocations have one
  int64_t graph;  // whose capture it was taken in; -1: none
  std::set<int> recorded;  // streams of record_stream
  std::vector<Access> reads, writes;
};

// One lock for everything here: correct first, and operators are few. Python makes streams, among
// other things, with its own global lock held, and takes this one; so nothing may wait for Python's
// under this one. Letting go of a tensor that Python has seen does: such values are given to
// `let_go`, and go once the thread has left the lock.
inline std::recursive_mutex& lock() {
  static auto* mutex = new std::recursive_mutex;
  return *mutex;
}

struct Held {
  int depth = 0;  // guards of this thread, one inside the other
  std::vector<std::shared_ptr<void>> leaving;
};
inline thread_local Held held;

class Guard {
 public:
  Guard() {
    lock().lock();
    ++held.depth;
  }
  Guard(const Guard&) = delete;
  ~Guard() {
    std::vector<std::shared_ptr<void>> leaving;  // destroyed last
    if (--held.depth == 0) leaving.swap(held.leaving);
    lock().unlock();
  }
};

// Under a guard.
template <class Value>
inline void let_go(Value&& value) {
  held.leaving.push_back(std::make_shared<std::decay_t<Value>>(std::forward<Value>(value)));
}

struct Memory {
  std::map<uintptr_t, Block> blocks;  // by address
  int64_t allocated = 0, peak = 0, allocations = 0;
  int64_t limit = TOTAL_MEMORY;

  Block* find(const void* pointer) {
    auto at = blocks.upper_bound(reinterpret_cast<uintptr_t>(pointer));
    if (at == blocks.begin()) return nullptr;
    Block& block = (--at)->second;
    return static_cast<const char*>(pointer) < block.address + std::max<size_t>(block.bytes, 1) ? &block
                                                                                             : nullptr;
  }
};

inline Memory& memory() {
  static auto* found = new Memory;
  return *found;
}

inline int64_t rounded(size_t bytes) { return (bytes + GRANULE - 1) / GRANULE * GRANULE; }

int current_stream();
int64_t current_graph();
void leave(const Block& block);
void inherit(Block& block);

inline void register_block(void* address, size_t bytes) {
  Guard guard;
  Memory& all = memory();
  TORCH_CHECK_WITH(
      OutOfMemoryError, all.allocated + rounded(bytes) <= all.limit,
      "CUDA out of memory. Tried to allocate ", bytes, " bytes; ", all.allocated, " of ", all.limit,
      " bytes are allocated (emulated device)");
  Block block{static_cast<char*>(address), bytes, current_stream(), all.allocations,
              current_graph(), {}, {}, {}};
  inherit(block);
  all.blocks[reinterpret_cast<uintptr_t>(address)] = std::move(block);
  all.allocated += rounded(bytes);
  all.peak = std::max(all.peak, all.allocated);
  ++all.allocations;
}

inline void forget_block(void* address) {
  Guard guard;
  auto at = memory().blocks.find(reinterpret_cast<uintptr_t>(address));
  if (at == memory().blocks.end()) return;
  leave(at->second);
  memory().allocated -= rounded(at->second.bytes);
  memory().blocks.erase(at);
}

inline void free_block(void* address) {
  forget_block(address);
  std::free(address);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &free_block, DEVICE};
    void* address = std::aligned_alloc(GRANULE, rounded(bytes));
    TORCH_CHECK(address != nullptr, "no memory of this machine for the emulated device");
    std::memset(address, GARBAGE, bytes);
    try {
      register_block(address, bytes);
    } catch (...) {
      std::free(address);
      throw;
    }
    return {address, address, &free_block, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t count) const override {
    std::memcpy(to, from, count);
  }
};

inline DeviceAllocator& device_allocator() {
  static auto* found = new DeviceAllocator;
  return *found;
}

// Memory of the host that the device could copy from at any time. Registered memory (which
// cudaHostRegister pins where it lies) counts too.
struct Pinned {
  std::map<uintptr_t, size_t> ranges;
  bool holds(const void* pointer) {
    auto at = ranges.upper_bound(reinterpret_cast<uintptr_t>(pointer));
    if (at == ranges.begin()) return false;
    --at;
    return reinterpret_cast<uintptr_t>(pointer) < at->first + at->second;
  }
};

inline Pinned& pinned() {
  static auto* found = new Pinned;
  return *found;
}

inline void free_pinned(void* address) {
  {
    Guard guard;
    pinned().ranges.erase(reinterpret_cast<uintptr_t>(address));
  }
  std::free(address);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device host(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &free_pinned, host};
    void* address = std::aligned_alloc(GRANULE, rounded(bytes));
    std::memset(address, GARBAGE, bytes);
    Guard guard;
    pinned().ranges[reinterpret_cast<uintptr_t>(address)] = bytes;
    return {address, address, &free_pinned, host};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t count) const override {
    std::memcpy(to, from, count);
  }
};

inline PinnedAllocator& pinned_allocator() {
  static auto* found = new PinnedAllocator;
  return *found;
}

// What a CPU kernel allocated, under the device's name. It keeps the CPU's storage alive.
inline void free_adopted(void* context) {
  auto* storage = static_cast<c10::Storage*>(context);
  forget_block(const_cast<void*>(storage->data()));
  delete storage;
}

inline c10::DataPtr adopted(const c10::Storage& storage) {
  void* address = storage.mutable_data();
  if (address == nullptr) return {nullptr, nullptr, &free_block, DEVICE};
  register_block(address, storage.nbytes());
  return {address, new c10::Storage(storage), &free_adopted, DEVICE};
}

}  // namespace emulated
