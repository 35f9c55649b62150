// Copies between the host and the device, and those of pinned memory that are late.
#pragma once

#include "operators.h"

namespace emulated {

// Copies between pinned memory and the device that the host does not wait for are late: a copy to
// the device reads when something needs it, one to the host has written when the host has waited.
// One to the device that comes after one to the host, as the device knows, reads what that brings.
struct Pending {
  at::Tensor to, from;  // on the CPU
  at::Tensor device;  // the device's tensor, if it is the one written
  int stream;
  uint64_t tick;
  Clock known;  // to the stream
};

inline std::vector<Pending>& pending() {
  static auto* found = new std::vector<Pending>;
  return *found;
}

inline void copy_on_cpu(const at::Tensor& to, const at::Tensor& from) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  Stack stack{to, from, false};
  run_on_cpu(op, &stack);
}

inline void spoil(const at::Tensor& host) {
  if (host.is_non_overlapping_and_dense())
    std::memset(host.unsafeGetTensorImpl()->mutable_data(), GARBAGE, host.numel() * host.itemsize());
}

inline bool overlap(const at::Tensor& a, const at::Tensor& b) {
  const auto end = [](const at::Tensor& tensor) {
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    return static_cast<const char*>(tensor.const_data_ptr()) + (last + 1) * tensor.itemsize();
  };
  return a.const_data_ptr() < end(b) && b.const_data_ptr() < end(a);
}

// To the device; what the host has not waited for stays hidden from it.
inline void run_pending_to_device(const Pending& copy) {
  std::vector<at::Tensor> hidden;
  for (const Pending& earlier : pending()) {
    if (earlier.device.defined() || at(copy.known, earlier.stream) < earlier.tick) continue;
    if (!overlap(earlier.to, copy.from)) continue;
    copy_on_cpu(earlier.to, earlier.from);
    hidden.push_back(earlier.to);
  }
  copy_on_cpu(copy.to, copy.from);
  for (const at::Tensor& host : hidden) spoil(host);
  let_go(std::move(hidden));
}

template <class Test>
inline void run_pending_if(Test test) {
  std::vector<Pending> left, due;
  for (Pending& copy : pending()) (test(copy) ? due : left).push_back(std::move(copy));
  pending().swap(left);
  for (const Pending& copy : due) {
    if (copy.device.defined()) run_pending_to_device(copy);
    else copy_on_cpu(copy.to, copy.from);
  }
  let_go(std::move(due));
}

inline void run_pending(const Block& block) {
  if (pending().empty()) return;
  run_pending_if([&](const Pending& copy) {
    return copy.device.defined() &&
           memory().find(copy.device.unsafeGetTensorImpl()->data()) == &block;
  });
}

inline void flush_host(const Clock& known) {
  if (pending().empty()) return;
  run_pending_if([&](const Pending& copy) { return at(known, copy.stream) >= copy.tick; });
}

inline at::Tensor tensor_at(Stack* stack, size_t count, size_t i) {
  return (*stack)[stack->size() - count + i].toTensor();
}

inline void finish(Stack* stack, size_t count, at::Tensor result) {
  stack->resize(stack->size() - count);
  stack->emplace_back(std::move(result));
}

inline bool is_pinned(const at::Tensor& tensor) {
  Guard guard;
  return tensor.device().is_cpu() && pinned().holds(tensor.unsafeGetTensorImpl()->data());
}

inline void copy(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  constexpr size_t count = 3;
  const at::Tensor to = tensor_at(stack, count, 0), from = tensor_at(stack, count, 1);
  const bool is_late = (*stack)[stack->size() - 1].toBool();
  if (to.is_cuda() && from.is_cuda()) return run(op, keys, stack);
  const at::Tensor& host = to.is_cuda() ? from : to;
  TORCH_CHECK(host.device().is_cpu(), "copy_ between ", to.device(), " and ", from.device());
  if (to.numel() == 0) return finish(stack, count, to);
  Call call("aten::copy_");
  const at::Tensor cpu_to = to.is_cuda() ? call.to_cpu(to, true, false, "self") : to;
  const at::Tensor cpu_from = from.is_cuda() ? call.to_cpu(from, false, false, "src") : from;
  const std::string name = to.is_cuda() ? "copy to the device" : "copy to the host";
  if (!is_late) wait_for_stream(name);
  Guard guard;
  const int64_t graph = current_graph();
  if (to.is_cuda() && graph >= 0) back_up(graph, to.unsafeGetTensorImpl()->data());
  const at::Tensor& device = to.is_cuda() ? to : from;
  run_pending(*memory().find(device.unsafeGetTensorImpl()->data()));
  note(call.touched, stream_of_thread, name);
  const Clock& known = streams().all[stream_of_thread].clock;
  const uint64_t now = known[stream_of_thread];
  if (graph >= 0) {
    Entry entry;
    entry.op = op;
    entry.name = name;
    entry.arguments = {cpu_to, cpu_from, false};
    entry.uses = uses_of(call.touched, name);
    graphs().all.at(graph).entries.push_back(std::move(entry));
    if (to.is_cuda()) copy_on_cpu(cpu_to, cpu_from);
  } else if (!is_late || !is_pinned(host)) {
    copy_on_cpu(cpu_to, cpu_from);
  } else if (to.is_cuda()) {
    pending().push_back({cpu_to, from, to, stream_of_thread, now, known});
  } else {
    at::Tensor value = at::detail::empty_cpu(to.sizes(), to.scalar_type());
    copy_on_cpu(value, cpu_from);
    spoil(to);
    pending().push_back({to, value, {}, stream_of_thread, now, known});
  }
  finish(stack, count, to);
}

}  // namespace emulated
