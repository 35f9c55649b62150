// Captured graphs: the operators that ran while a stream was captured, run again by a replay.
//
// A capture runs what it records, since shapes follow from it. When it ends, everything that it
// wrote outside of its own memory is put back, and its own memory is overwritten with no numbers:
// as if nothing had run, which is so on a device.
#pragma once

#include "random.h"
#include "streams.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <atomic>

namespace emulated {

using torch::jit::Stack;

// Of memory by an operator of a graph. The memory is the program's to keep: a graph does not.
struct Use {
  char* address;  // of the block
  int64_t serial;
  Access access;
  bool written;
};

struct Entry {
  std::optional<c10::OperatorHandle> op;  // none: a launch of the program's own, by its number
  int64_t launch = -1;
  Stack arguments;  // on the CPU, aliases of the device's memory
  std::vector<std::pair<size_t, at::Tensor>> created;  // results that were new: which, and where
  std::vector<Use> uses;
  bool draws = false;
  at::Generator generator;
  std::string name;
};

struct Backup {
  char* address;
  std::vector<char> bytes;
};

struct Graph {
  int origin = 0;  // stream
  bool is_capturing = true;
  std::string broken;
  std::vector<Entry> entries;
  std::map<char*, Backup> backups;
  std::vector<c10::Storage> kept;  // the pool's: as long as the graph, its memory stays in place
  uint64_t seed = 0, offset = 0;  // of the default generator, when it began
  int64_t bytes = 0;
};

struct Graphs {
  std::map<int64_t, Graph> all;
  int64_t next = 0;
  int64_t capturing = 0;  // how many are
};

inline Graphs& graphs() {
  static auto* found = new Graphs;
  return *found;
}

inline bool any_capture() { return graphs().capturing > 0; }

inline void invalidate(int64_t graph, const char* why) {
  Graph& broken = graphs().all.at(graph);
  if (broken.broken.empty()) broken.broken = why;
}

inline void check_not_capturing(const char* what) {
  Guard guard;
  if (!any_capture()) return;
  for (auto& [id, graph] : graphs().all)
    if (graph.is_capturing) invalidate(id, what);
  TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing (", what, ")");
}

// Keeps the bytes of what is about to be written, unless the graph owns them.
inline void back_up(int64_t graph, const void* pointer) {
  Block* block = memory().find(pointer);
  if (block == nullptr || block->graph == graph) return;
  auto& backups = graphs().all.at(graph).backups;
  if (backups.count(block->address)) return;
  backups[block->address] = {block->address,
                             std::vector<char>(block->address, block->address + block->bytes)};
}

inline int64_t begin_capture() {
  Guard guard;
  TORCH_CHECK(stream_of_thread != 0, "CUDA error: operation not permitted: the default stream "
                                     "cannot be captured");
  TORCH_CHECK(current_graph() < 0, "this stream is captured already");
  const int64_t id = graphs().next++;
  Graph& graph = graphs().all[id];
  graph.origin = stream_of_thread;
  DeviceGenerator& generator = generator_of(nullptr);
  graph.seed = generator.seed_, graph.offset = generator.offset_;
  streams().all[stream_of_thread].graph = id;
  ++graphs().capturing;
  return id;
}

inline void end_capture(int64_t id) {
  Guard guard;
  Graph& graph = graphs().all.at(id);
  TORCH_CHECK(graph.is_capturing, "the capture has ended");
  graph.is_capturing = false;
  --graphs().capturing;
  const Clock& known = streams().all[graph.origin].clock;
  for (size_t i = 0; i < streams().all.size(); ++i) {
    Stream& stream = streams().all[i];
    if (stream.graph != id) continue;
    stream.graph = -1;
    if (int(i) != graph.origin && at(known, int(i)) < at(stream.clock, int(i)))
      invalidate(id, "a stream that joined it was not joined back (unjoined work)");
  }
  for (auto& [address, backup] : graph.backups) {
    Block* block = memory().find(address);
    if (block != nullptr && block->bytes == backup.bytes.size())
      std::memcpy(address, backup.bytes.data(), backup.bytes.size());
  }
  graph.backups.clear();
  for (auto& [address, block] : memory().blocks)
    for (auto* accesses : {&block.reads, &block.writes})
      accesses->erase(std::remove_if(accesses->begin(), accesses->end(),
                                     [&](const Access& access) { return access.graph == id; }),
                      accesses->end());
  for (const c10::Storage& storage : graph.kept) {
    std::memset(const_cast<void*>(storage.data()), GARBAGE, storage.nbytes());
    graph.bytes += rounded(storage.nbytes());
  }
  DeviceGenerator& generator = generator_of(nullptr);
  generator.seed_ = graph.seed, generator.offset_ = graph.offset;
  TORCH_CHECK(stream_of_thread == graph.origin, "the capture must end on the stream it began on");
  TORCH_CHECK(graph.broken.empty(), "CUDA error: operation failed due to a previous error during "
                                    "capture: ", graph.broken);
}

}  // namespace emulated
