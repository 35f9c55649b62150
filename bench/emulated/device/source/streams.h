// Streams and events as vector clocks: what is known, where, to be done.
//
// Operations run at once, on the CPU, in the order in which they are given. Each takes a tick of its
// stream's clock; events carry clocks between streams. Two operations on the same bytes, one of them
// a write, whose order no event says are a race, whatever order they took here.
#pragma once

#include "memory.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>

namespace emulated {

struct Event {
  Clock clock;
  int64_t graph = -1;  // the capture that it was recorded in
  double time = 0;
  int asked = 0;  // how often the host asked for it in vain
  bool is_recorded = false;
};

struct Stream {
  Clock clock;
  int64_t graph = -1;  // the capture that it takes part in
};

struct Races {
  std::vector<std::string> found;
  void report(const std::string& text) {
    for (const auto& known : found)
      if (known == text) return;
    found.push_back(text);
  }
};

inline Races& races() {
  static auto* found = new Races;
  return *found;
}

inline void join(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

inline uint64_t at(const Clock& clock, int stream) {
  return size_t(stream) < clock.size() ? clock[stream] : 0;
}

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Streams {
  std::vector<Stream> all{1};  // 0: the default one
  Clock host;  // what the host has waited for
};

inline Streams& streams() {
  static auto* found = new Streams;
  return *found;
}

inline thread_local int stream_of_thread = 0;
inline int current_stream() { return stream_of_thread; }
inline int64_t current_graph() { return streams().all[stream_of_thread].graph; }

void invalidate(int64_t graph, const char* why);
bool any_capture();
void flush_host(const Clock& known);

// What the host may not do while anything is captured.
void check_not_capturing(const char* what);

// Advances the stream's clock by an operation given now; the tick that it got.
inline uint64_t tick(int stream) {
  Clock& clock = streams().all[stream].clock;
  join(clock, streams().host);
  if (clock.size() <= size_t(stream)) clock.resize(stream + 1);
  return ++clock[stream];
}

inline void record(Event& event, int stream) {
  Guard guard;
  const Stream& from = streams().all[stream];
  event.clock = from.clock;
  join(event.clock, streams().host);
  event.graph = from.graph;
  event.time = seconds();
  event.is_recorded = true;
  event.asked = 0;
}

inline void block(const Event& event, int stream) {
  Guard guard;
  if (!event.is_recorded) return;
  Stream& waiting = streams().all[stream];
  if (event.graph != waiting.graph) {
    if (event.graph >= 0 && stream == 0) {
      invalidate(event.graph, "the default stream waits for one that is captured");
      TORCH_CHECK(false, "CUDA error: operation would make the legacy stream depend on a capturing "
                         "blocking stream");
    }
    if (waiting.graph >= 0) {
      invalidate(waiting.graph, "it waits for work that is not captured");
      TORCH_CHECK(false, "CUDA error: dependency created on uncaptured work in another stream");
    }
    waiting.graph = event.graph;  // it joins the capture
  }
  join(waiting.clock, event.clock);
}

inline void wait_on_host(const Clock& clock) {
  Guard guard;
  join(streams().host, clock);
  flush_host(streams().host);
}

inline std::vector<int64_t> elements(const Access& access) {
  std::vector<int64_t> found{access.offset};
  for (size_t d = 0; d < access.sizes.size(); ++d) {
    std::vector<int64_t> next;
    for (int64_t start : found)
      for (int64_t i = 0; i < access.sizes[d]; ++i) next.push_back(start + i * access.strides[d]);
    found.swap(next);
  }
  std::sort(found.begin(), found.end());
  return found;
}

inline bool share_bytes(const Access& a, const Access& b) {
  if (a.high <= b.low || b.high <= a.low) return false;
  if (a.dense && b.dense) return true;
  const auto ours = elements(a), theirs = elements(b);
  for (size_t i = 0, j = 0; i < ours.size() && j < theirs.size();) {
    if (ours[i] + a.itemsize <= theirs[j]) ++i;
    else if (theirs[j] + b.itemsize <= ours[i]) ++j;
    else return true;
  }
  return false;
}

inline void check_order(const std::vector<Access>& earlier, const Access& now, const Clock& known,
                        const char* was, const char* is) {
  for (const Access& access : earlier) {
    if (access.graph != now.graph) continue;
    if (access.stream == now.stream || at(known, access.stream) >= access.tick) continue;
    if (!share_bytes(access, now)) continue;
    races().report(now.name + " on stream " + std::to_string(now.stream) + " " + is +
                   " memory that " + access.name + " on stream " + std::to_string(access.stream) +
                   " " + was + ", and nothing waits in between");
  }
}

// Those that every later operation which knows `now` also knows, and whose bytes it covers, go.
inline void keep(std::vector<Access>& accesses, const Access& now, const Clock& known, bool add) {
  size_t kept = 0;
  for (size_t i = 0; i < accesses.size(); ++i) {
    Access& access = accesses[i];
    const bool covered = now.dense && access.graph == now.graph && now.low <= access.low && access.high <= now.high;
    if (covered && at(known, access.stream) >= access.tick) continue;
    if (kept != i) accesses[kept] = std::move(access);
    ++kept;
  }
  accesses.resize(kept);
  if (add) accesses.push_back(now);
}

inline Access access_of(const Block& block, const c10::TensorImpl& tensor, int stream, uint64_t tick,
                        const std::string& name) {
  Access access;
  const int64_t item = tensor.itemsize();
  access.offset = static_cast<const char*>(tensor.data()) - block.address;
  access.itemsize = item;
  int64_t low = 0, high = 0, count = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    access.sizes.push_back(size);
    access.strides.push_back(stride * item);
    (stride < 0 ? low : high) += (size - 1) * stride;
    if (stride != 0) count *= size;
  }
  access.low = access.offset + low * item;
  access.high = access.offset + (high + 1) * item;
  access.dense = count * item == access.high - access.low;
  access.stream = stream;
  access.tick = tick;
  access.graph = streams().all[stream].graph;
  access.name = name;
  return access;
}

inline void touch(Block& block, const Access& access, bool write) {
  const Clock& known = streams().all[access.stream].clock;
  check_order(block.writes, access, known, "wrote", write ? "writes" : "reads");
  if (write) {
    check_order(block.reads, access, known, "reads", "writes");
    keep(block.writes, access, known, true);
    keep(block.reads, access, known, false);
  } else {
    keep(block.reads, access, known, true);
  }
}

inline void touch(const c10::TensorImpl& tensor, bool write, int stream, uint64_t tick,
                  const std::string& name) {
  if (tensor.numel() == 0 || !tensor.has_storage()) return;
  if (Block* block = memory().find(tensor.data()))
    touch(*block, access_of(*block, tensor, stream, tick, name), write);
}

// Freed memory is given again at once to the stream that it was taken on, whoever may still use it:
// what other streams do with it (and record_stream does not say) must be known to who gets it. Which
// memory that is depends on sizes; here it is all that the stream takes from then on.
// Of each other stream its last one counts: (stream, whether it writes).
using Left = std::map<std::pair<int, bool>, Access>;
inline std::map<int, Left>& left_behind() {
  static auto* found = new std::map<int, Left>;
  return *found;
}

inline void leave(const Block& block) {
  if (block.graph >= 0) return;  // a graph's pool is its own
  const Clock& known = streams().all[block.stream].clock;
  for (const auto* accesses : {&block.reads, &block.writes})
    for (const Access& access : *accesses) {
      if (access.graph >= 0 || access.stream == block.stream) continue;
      if (block.recorded.count(access.stream) || at(known, access.stream) >= access.tick) continue;
      Access& last = left_behind()[block.stream][{access.stream, accesses == &block.writes}];
      if (last.tick < access.tick) last = access;
    }
}

inline void inherit(Block& block) {
  auto found = left_behind().find(block.stream);
  if (found == left_behind().end() || block.graph >= 0) return;
  Clock known = streams().all[block.stream].clock;
  join(known, streams().host);
  Left& left = found->second;
  for (auto one = left.begin(); one != left.end();) {
    const Access& access = one->second;
    if (at(known, access.stream) >= access.tick) {
      one = left.erase(one);
      continue;
    }
    Access whole = access;
    whole.low = 0, whole.high = int64_t(block.bytes), whole.dense = true;
    if (whole.name.back() != ')') whole.name += " (before it was freed)";
    (one->first.second ? block.writes : block.reads).push_back(whole);
    ++one;
  }
}

struct DeviceGuardImpl final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream wrap(int stream) { return c10::Stream(c10::Stream::UNSAFE, DEVICE, stream); }

  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return wrap(stream_of_thread); }
  c10::Stream getDefaultStream(c10::Device) const override { return wrap(0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    Guard guard;
    streams().all.emplace_back();
    return wrap(int(streams().all.size()) - 1);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const int before = stream_of_thread;
    stream_of_thread = int(stream.id());
    return wrap(before);
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    emulated::record(*static_cast<Event*>(*event), int(stream.id()));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) emulated::block(*static_cast<Event*>(event), int(stream.id()));
  }
  // What the host has not waited for is not done when it asks first, and is when it asks again.
  bool queryEvent(void* pointer) const override {
    if (pointer == nullptr) return true;
    Guard guard;
    Event& event = *static_cast<Event*>(pointer);
    if (event.asked++ > 0) wait_on_host(event.clock);
    for (size_t i = 0; i < event.clock.size(); ++i)
      if (at(streams().host, int(i)) < event.clock[i]) return false;
    return true;
  }
  bool queryStream(const c10::Stream& stream) const override {
    Guard guard;
    check_not_capturing("a stream is asked");
    const int id = int(stream.id());
    return at(streams().host, id) >= at(streams().all[id].clock, id);
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    check_not_capturing("the host waits for a stream");
    Guard guard;
    wait_on_host(streams().all[int(stream.id())].clock);
  }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr) return;
    check_not_capturing("the host waits for an event");
    Guard guard;
    wait_on_host(static_cast<Event*>(event)->clock);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    check_not_capturing("the host waits for the device");
    Guard guard;
    for (const Stream& stream : streams().all) join(streams().host, stream.clock);
    flush_host(streams().host);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    Guard guard;
    if (Block* block = memory().find(data.get())) block->recorded.insert(int(stream.id()));
  }
  double elapsedTime(void* before, void* after, c10::DeviceIndex) const override {
    return 1e3 * (static_cast<Event*>(after)->time - static_cast<Event*>(before)->time);
  }
};

}  // namespace emulated
