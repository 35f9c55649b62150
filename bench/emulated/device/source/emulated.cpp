// The library that is loaded: operators of the device that are not the CPU's, and what Python calls.
#include "copies.h"

#include <ATen/Context.h>

namespace emulated {

namespace {

std::vector<int64_t> numbers(const c10::IValue& value) {
  if (value.isIntList()) return value.toIntVector();
  std::vector<int64_t> found;
  for (const c10::IValue& one : value.toListRef()) found.push_back(one.toInt());
  return found;
}

void fill_with_garbage(const at::Tensor& tensor) {
  const c10::ScalarType type = tensor.scalar_type();
  const bool is_whole = c10::isIntegralType(type, false);
  if (!is_whole && type != c10::ScalarType::Bool) return;  // NaN already
  void* data = const_cast<void*>(tensor.storage().data());
  if (data != nullptr) std::memset(data, is_whole ? 0x6b : 1, tensor.storage().nbytes());
}

void keep_if_captured(const at::Tensor& tensor) {
  Guard guard;
  if (current_graph() >= 0) graphs().all.at(current_graph()).kept.push_back(tensor.storage());
}

c10::ScalarType type_of(const c10::IValue& value) {
  return value.isNone() ? c10::typeMetaToScalarType(c10::get_default_dtype()) : value.toScalarType();
}

void empty(const c10::OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
  constexpr size_t count = 6;
  const auto* args = &(*stack)[stack->size() - count];
  TORCH_CHECK(args[4].isNone() || !args[4].toBool(), "Only dense CPU tensors can be pinned");
  std::optional<c10::MemoryFormat> format;
  if (!args[5].isNone()) format = args[5].toMemoryFormat();
  at::Tensor made(at::detail::empty_generic(numbers(args[0]), &device_allocator(),
                                            c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                            type_of(args[1]), format));
  fill_with_garbage(made);
  keep_if_captured(made);
  finish(stack, count, made);
}

void empty_strided(const c10::OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
  constexpr size_t count = 6;
  const auto* args = &(*stack)[stack->size() - count];
  at::Tensor made(at::detail::empty_strided_generic(
      numbers(args[0]), numbers(args[1]), &device_allocator(),
      c10::DispatchKeySet(c10::DispatchKey::CUDA), type_of(args[2])));
  fill_with_garbage(made);
  keep_if_captured(made);
  finish(stack, count, made);
}

void set_storage(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const auto* args = &(*stack)[stack->size() - count];
  at::Tensor self = args[0].toTensor();
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  if (count == 1) {
    impl->set_storage_keep_dtype(c10::Storage(c10::Storage::use_byte_size_t(), 0,
                                              device_allocator().allocate(0), &device_allocator(),
                                              true));
    impl->set_storage_offset(0);
    impl->set_sizes_contiguous({0});
  } else if (args[1].isTensor()) {
    const at::Tensor source = args[1].toTensor();
    TORCH_CHECK(source.is_cuda(), "Attempted to set the storage of a tensor on device cuda:0 to a "
                                  "storage on different device ", source.device());
    impl->set_storage_keep_dtype(source.storage());
    impl->set_storage_offset(source.storage_offset());
    impl->set_sizes_and_strides(source.sizes(), source.strides());
  } else {
    const c10::Storage source = args[1].toStorage();
    TORCH_CHECK(source.device() == DEVICE, "Attempted to set the storage of a tensor on device "
                "cuda:0 to a storage on different device ", source.device());
    impl->set_storage_keep_dtype(source);
    if (count == 2) {
      impl->set_storage_offset(0);
      impl->set_sizes_contiguous({int64_t(source.nbytes() / impl->itemsize())});
    } else {
      impl->set_storage_offset(args[2].toInt());
      const auto sizes = numbers(args[3]), strides = numbers(args[4]);
      if (strides.empty()) impl->set_sizes_contiguous(sizes);  // none are given
      else impl->set_sizes_and_strides(sizes, strides);
    }
  }
  finish(stack, count, self);
}

void record_stream(const c10::OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
  const at::Tensor self = tensor_at(stack, 2, 0);
  const int stream = int(stack->back().toStream().id());
  Guard guard;
  if (self.numel() > 0)
    if (Block* block = memory().find(self.unsafeGetTensorImpl()->data()))
      block->recorded.insert(stream);
  stack->resize(stack->size() - 2);
}

// softmax of half precision to single: the CPU's kernels only know one type.
void softmax(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  c10::IValue* args = &(*stack)[stack->size() - op.schema().arguments().size()];
  if (args[2].toBool()) {
    args[0] = args[0].toTensor().to(c10::ScalarType::Float);
    args[2] = false;
  }
  run(op, keys, stack);
}

// Graphs' replays stop at each launch of the program's own, which Python carries out.
int64_t replay(int64_t id, int64_t start) {
  Guard guard;
  Graph& graph = graphs().all.at(id);
  TORCH_CHECK(!graph.is_capturing && graph.broken.empty(), "the graph has no finished capture");
  for (size_t i = size_t(start); i < graph.entries.size(); ++i) {
    Entry& entry = graph.entries[i];
    const uint64_t now = tick(stream_of_thread);
    ++launches()[entry.name];
    for (Use& use : entry.uses) {
      Block* block = memory().find(use.address);
      TORCH_CHECK(block != nullptr && block->serial == use.serial, "a replay's ", entry.name,
                  use.written ? " writes" : " reads", " memory that was freed since its capture");
      run_pending(*block);
      use.access.stream = stream_of_thread;
      use.access.tick = now;
      use.access.graph = -1;
      touch(*block, use.access, use.written);
    }
    if (entry.launch >= 0) return int64_t(i);
    Stack stack = entry.arguments;
    if (entry.draws) run_drawing(*entry.op, &stack, stack.size(), entry.generator);
    else run_on_cpu(*entry.op, &stack);
    std::vector<at::Tensor> results;
    for (const c10::IValue& value : stack) {
      if (value.isTensor()) results.push_back(value.toTensor());
      else if (value.isTensorList())
        for (const at::Tensor& tensor : value.toTensorVector()) results.push_back(tensor);
    }
    for (const auto& [which, tensor] : entry.created) copy_on_cpu(tensor, results.at(which));
  }
  return -1;
}

void drop_graph(int64_t id) {
  Guard guard;
  auto at = graphs().all.find(id);
  if (at == graphs().all.end()) return;
  if (at->second.is_capturing) --graphs().capturing;
  for (Stream& stream : streams().all)
    if (stream.graph == id) stream.graph = -1;
  let_go(std::move(at->second));
  graphs().all.erase(at);
}

void begin_launch(const std::vector<at::Tensor>& tensors) {
  Guard guard;
  for (const at::Tensor& tensor : tensors) {
    const void* data = tensor.unsafeGetTensorImpl()->data();
    Block* block = memory().find(data);
    if (block == nullptr) continue;
    run_pending(*block);
    if (current_graph() >= 0) back_up(current_graph(), data);
  }
}

void end_launch(const std::string& name, const std::vector<at::Tensor>& reads,
                const std::vector<at::Tensor>& writes, int64_t launch) {
  Guard guard;
  std::vector<std::pair<at::Tensor, bool>> touched;
  for (const at::Tensor& tensor : reads) touched.emplace_back(tensor, false);
  for (const at::Tensor& tensor : writes) touched.emplace_back(tensor, true);
  note(touched, stream_of_thread, name);
  if (current_graph() < 0) return;
  Entry entry;
  entry.launch = launch;
  entry.name = name;
  entry.uses = uses_of(touched, name);
  graphs().all.at(current_graph()).entries.push_back(std::move(entry));
}

at::Tensor on_cpu(const at::Tensor& tensor) {
  return Call("launch").to_cpu(tensor, false, true, "tensor");
}

// The block that holds an address, as bytes from the address on; it keeps nothing alive.
at::Tensor memory_at(int64_t address) {
  Guard guard;
  Block* block = memory().find(reinterpret_cast<const void*>(address));
  TORCH_CHECK(block != nullptr, "a kernel was given ", address, ", where the device has no memory");
  c10::Storage storage(c10::Storage::use_byte_size_t(), block->bytes,
                       c10::DataPtr(block->address, DEVICE), nullptr, false);
  at::Tensor bytes = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::scalarTypeToTypeMeta(c10::ScalarType::Byte));
  const int64_t offset = address - reinterpret_cast<int64_t>(block->address);
  bytes.unsafeGetTensorImpl()->set_storage_offset(offset);
  bytes.unsafeGetTensorImpl()->set_sizes_contiguous({int64_t(block->bytes) - offset});
  return bytes;
}

std::string lines(const std::map<std::string, int64_t>& counts) {
  Guard guard;
  std::string text;
  for (const auto& [name, count] : counts) text += std::to_string(count) + " " + name + "\n";
  return text;
}

int64_t statistic(const std::string& name) {
  Guard guard;
  if (name == "allocated") return memory().allocated;
  if (name == "peak") return memory().peak;
  if (name == "allocations") return memory().allocations;
  if (name == "limit") return memory().limit;
  TORCH_CHECK(false, "statistic: ", name);
}

void pin_range(int64_t address, int64_t bytes) {
  Guard guard;
  if (bytes > 0) pinned().ranges[uintptr_t(address)] = size_t(bytes);
  else pinned().ranges.erase(uintptr_t(address));
}

std::string take_races() {
  Guard guard;
  std::string text;
  for (const auto& race : races().found) text += race + "\n";
  races().found.clear();
  return text;
}

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, DeviceGuardImpl);

}  // namespace emulated


namespace {

// In place of those that a torch with CUDA has registered already.
struct TakeOver {
  TakeOver() {
    c10::SetAllocator(c10::DeviceType::CUDA, &emulated::device_allocator(), 255);
    // torch keeps the hooks that it asked for first, and has asked by now: neither class has data,
    // so the object that it keeps becomes one of ours with our table of functions.
    static const emulated::Hooks ours{at::CUDAHooksArgs()};
    const at::CUDAHooksInterface& kept = at::detail::getCUDAHooks();
    std::memcpy(const_cast<void*>(static_cast<const void*>(&kept)), &ours, sizeof(void*));
  }
} take_over;

template <c10::BoxedKernel::BoxedKernelFunction_withDispatchKeys* function>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<function>();
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(boxed<&emulated::run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  std::set<std::string> own{"aten::copy_", "aten::empty.memory_format", "aten::empty_strided",
                            "aten::record_stream"};
  const auto set = [&](const std::string& name, torch::CppFunction function) {
    own.insert("aten::" + name);
    m.impl(name.c_str(), std::move(function));
  };
  set("empty.memory_format", boxed<&emulated::empty>());
  set("empty_strided", boxed<&emulated::empty_strided>());
  set("copy_", boxed<&emulated::copy>());
  for (const char* name : {"set_", "set_.source_Storage", "set_.source_Storage_storage_offset",
                           "set_.source_Tensor"})
    set(name, boxed<&emulated::set_storage>());
  set("record_stream", boxed<&emulated::record_stream>());
  for (const char* name : {"_softmax", "_softmax.out", "_log_softmax", "_log_softmax.out"})
    set(name, boxed<&emulated::softmax>());
  // Composed of others, but of kernels that only CUDA has.
  for (const char* name : {"convolution", "convolution_backward"})
    set(name, boxed<&emulated::run>());
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& op : dispatcher.getAllOpNames()) {
    if (op.name.rfind("aten::", 0) != 0) continue;
    const std::string name =
        op.name.substr(6) + (op.overload_name.empty() ? "" : "." + op.overload_name);
    if (own.count("aten::" + name)) continue;
    const auto found = dispatcher.findSchema(op);
    const bool is_foreach = op.name.rfind("aten::_foreach_", 0) == 0 &&
                            op.overload_name.find("out") == std::string::npos;
    if (found && (is_foreach || found->hasKernelForDispatchKey(c10::DispatchKey::CUDA)))
      m.impl(name.c_str(), boxed<&emulated::run>());
  }
}

TORCH_LIBRARY(emulated_cuda, m) {
  using namespace emulated;
  m.def("initialise() -> ()", [] {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  });
  m.def("current_stream() -> int", [] { return int64_t(stream_of_thread); });
  m.def("set_stream(int stream) -> ()", [](int64_t stream) { stream_of_thread = int(stream); });
  m.def("capture_of(int stream) -> int", [](int64_t stream) {
    Guard guard;
    return streams().all.at(stream).graph;
  });
  m.def("begin_capture() -> int", &begin_capture);
  m.def("end_capture(int graph) -> ()", &end_capture);
  m.def("drop_graph(int graph) -> ()", &drop_graph);
  m.def("graph_bytes(int graph) -> int", [](int64_t id) {
    Guard guard;
    return graphs().all.at(id).bytes;
  });
  m.def("replay(int graph, int start) -> int", &replay);
  m.def("launch_of(int graph, int entry) -> int", [](int64_t id, int64_t entry) {
    Guard guard;
    return graphs().all.at(id).entries.at(entry).launch;
  });
  m.def("begin_launch(Tensor[] tensors) -> ()", &begin_launch);
  m.def("end_launch(str name, Tensor[] reads, Tensor[] writes, int launch) -> ()", &end_launch);
  m.def("on_cpu(Tensor tensor) -> Tensor", &on_cpu);
  m.def("memory_at(int address) -> Tensor", &memory_at);
  m.def("synchronize() -> ()", [] { DeviceGuardImpl().synchronizeDevice(0); });
  m.def("wait_for_stream(str name) -> ()", &wait_for_stream);
  m.def("wait_for_events(str name) -> ()", &count_wait);
  m.def("count_allowed_wait(str name) -> ()", [](const std::string& name) {
    Guard guard;
    ++waits().counts[name];
  });
  m.def("default_generator() -> Generator?", [] { return default_generator(); });
  m.def("waits() -> str", [] { return lines(waits().counts); });
  m.def("launches() -> str", [] { return lines(launches()); });
  m.def("reset_counts() -> ()", [] {
    Guard guard;
    waits().counts.clear(), launches().clear();
  });
  m.def("sync_mode() -> int", [] { return waits().mode; });
  m.def("set_sync_mode(int mode) -> ()", [](int64_t mode) { waits().mode = mode; });
  m.def("take_races() -> str", &take_races);
  m.def("statistic(str name) -> int", &statistic);
  m.def("reset_peak() -> ()", [] { memory().peak = memory().allocated; });
  m.def("set_limit(int bytes) -> ()", [](int64_t bytes) { memory().limit = bytes; });
  m.def("pin_range(int address, int bytes) -> ()", &pin_range);
}
