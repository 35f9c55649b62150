// Every operator of torch on the device's tensors: the CPU's kernel, on the same memory.
//
// What torch composes of other operators is composed here as on a device, since only operators
// without such a definition come to `run`. There tensors of the device become tensors of the CPU in
// place, the CPU's kernel is called, and what it made is renamed. Checked and noted on the way:
// devices that differ, waits of the host, order between streams, captures, random numbers.
#pragma once

#include "graphs.h"
#include "hooks.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

namespace emulated {

// What the host waited for, by what made it: see torch.cuda.set_sync_debug_mode.
struct Waits {
  std::map<std::string, int64_t> counts;
  int64_t mode = 0;  // 1: warn, 2: raise
};

inline Waits& waits() {
  static auto* found = new Waits;
  return *found;
}

inline std::map<std::string, int64_t>& launches() {
  static auto* found = new std::map<std::string, int64_t>;
  return *found;
}

inline void count_wait(const std::string& name) {
  Guard guard;
  check_not_capturing(name.c_str());
  ++waits().counts[name];
  TORCH_CHECK(waits().mode != 2, "called a synchronizing CUDA operation (", name, ")");
  if (waits().mode == 1) TORCH_WARN("called a synchronizing CUDA operation (", name, ")");
}

inline void wait_for_stream(const std::string& name) {
  Guard guard;
  count_wait(name);
  wait_on_host(streams().all[stream_of_thread].clock);
}

// Operators whose results' shapes or values the host needs.
inline bool is_waiting(const std::string& name) {
  static const std::set<std::string> names{
      "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2",
      "aten::unique_dim", "aten::unique_consecutive", "aten::equal", "aten::bincount"};
  return names.count(name) > 0;
}

inline bool takes_cpu_indices(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
         name == "aten::_index_put_impl_" || name == "aten::_unsafe_index" ||
         name == "aten::_unsafe_index_put";
}

// Those of `like` under the other backend: an inference tensor has none of autograd, and a view of
// another that is made in inference mode has them, as on a device.
inline c10::DispatchKeySet keys_of(c10::DispatchKey backend, const c10::TensorImpl& like) {
  const auto component = c10::toBackendComponent(backend);
  c10::DispatchKeySet keys =
      c10::DispatchKeySet(backend) | c10::getAutocastRelatedKeySetFromBackend(component);
  if (like.key_set().has_any(c10::inplace_or_view_ks))
    keys = keys | c10::getAutogradRelatedKeySetFromBackend(component);
  for (auto bit : {c10::DispatchKey::Conjugate, c10::DispatchKey::Negative})
    if (like.key_set().has(bit)) keys = keys.add(bit);
  return keys;
}

inline at::Tensor with_storage(const c10::TensorImpl& like, c10::Storage storage,
                               c10::DispatchKey backend) {
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, std::move(storage), keys_of(backend, like), like.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  if (like.is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

// One operator's tensors under both names.
class Call {
 public:
  explicit Call(std::string name) : name_(std::move(name)) {}

  std::vector<std::pair<at::Tensor, bool>> touched;  // of the device; whether it is written

  at::Tensor to_cpu(const at::Tensor& tensor, bool written, bool may_be_cpu,
                    const std::string& argument) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      const bool is_allowed = may_be_cpu || (tensor.device().is_cpu() && tensor.dim() == 0);
      TORCH_CHECK(is_allowed, "Expected all tensors to be on the same device, but found at least "
                  "two devices, cuda:0 and ", tensor.device(), "! (when checking argument ",
                  argument, " of ", name_, ")");
      return tensor;
    }
    touched.emplace_back(tensor, written);
    for (const auto& [device, cpu] : pairs_)
      if (device.is_same(tensor)) return cpu;
    at::Tensor cpu = with_storage(*tensor.unsafeGetTensorImpl(), storage(tensor.storage()),
                                  c10::DispatchKey::CPU);
    pairs_.emplace_back(tensor, cpu);
    return cpu;
  }

  // The device's tensor of a result. created: whether it has memory of its own.
  at::Tensor to_device(const at::Tensor& cpu, bool* created) {
    *created = false;
    if (!cpu.defined()) return cpu;
    for (const auto& [device, alias] : pairs_)
      if (alias.is_same(cpu)) return device;
    c10::StorageImpl* impl = cpu.storage().unsafeGetStorageImpl();
    for (const auto& [device, alias] : storages_)
      if (alias.unsafeGetStorageImpl() == impl)
        return with_storage(*cpu.unsafeGetTensorImpl(), device, c10::DispatchKey::CUDA);
    *created = true;
    c10::Storage device(c10::Storage::use_byte_size_t(), cpu.storage().nbytes(),
                        adopted(cpu.storage()), &device_allocator(), true);
    storages_.emplace_back(device, cpu.storage());
    return with_storage(*cpu.unsafeGetTensorImpl(), device, c10::DispatchKey::CUDA);
  }

  // Arguments that the kernel resized, as those called `out` may be.
  void follow_resizes() {
    for (auto& [device, alias] : storages_) {
      if (alias.data() == device.data()) continue;
      if (alias.unsafeGetStorageImpl()->data_ptr().get() == nullptr) continue;
      device.unsafeGetStorageImpl()->set_data_ptr_noswap(adopted(alias));
      device.unsafeGetStorageImpl()->set_nbytes(alias.nbytes());
    }
    for (auto& [device, alias] : pairs_) {
      c10::TensorImpl* impl = device.unsafeGetTensorImpl();
      if (impl->sizes() != alias.sizes() || impl->strides() != alias.strides())
        impl->set_sizes_and_strides(alias.sizes(), alias.strides());
    }
  }

 private:
  c10::Storage storage(const c10::Storage& device) {
    for (const auto& [known, alias] : storages_)
      if (known.unsafeGetStorageImpl() == device.unsafeGetStorageImpl()) return alias;
    const auto& data = device.unsafeGetStorageImpl()->data_ptr();
    c10::Storage alias(c10::Storage::use_byte_size_t(), device.nbytes(),
                       c10::DataPtr(data.get(), c10::Device(c10::DeviceType::CPU)),
                       c10::GetCPUAllocator(), true);
    storages_.emplace_back(device, alias);
    return alias;
  }

  std::string name_;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

// The CPU's kernel, as if nothing above it were there.
inline void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard cast(c10::DispatchKey::AutocastCPU);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

// With random numbers that follow from the device's generator.
inline void run_drawing(const c10::OperatorHandle& op, Stack* stack, size_t count,
                        const at::Generator& given) {
  Guard guard;
  const uint64_t seed = generator_of(given.defined() ? &given : nullptr).draw();
  at::Generator cpu = at::detail::createCPUGenerator(seed);
  bool is_argument = false;
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    if ((*stack)[i].isGenerator()) {
      (*stack)[i] = cpu;
      is_argument = true;
    }
  }
  if (is_argument) return run_on_cpu(op, stack);
  at::Generator shared = at::detail::getDefaultCPUGenerator();
  const at::Tensor before = shared.get_state();
  shared.set_state(cpu.get_state());
  try {
    run_on_cpu(op, stack);
  } catch (...) {
    shared.set_state(before);
    throw;
  }
  shared.set_state(before);
}

void run_pending(const Block& block);

inline void note(const std::vector<std::pair<at::Tensor, bool>>& touched, int stream,
                 const std::string& name) {
  const uint64_t now = tick(stream);
  ++launches()[name];
  for (const auto& [tensor, written] : touched)
    touch(*tensor.unsafeGetTensorImpl(), written, stream, now, name);
}

inline std::vector<Use> uses_of(const std::vector<std::pair<at::Tensor, bool>>& touched,
                                const std::string& name) {
  std::vector<Use> uses;
  for (const auto& [tensor, written] : touched) {
    if (tensor.numel() == 0) continue;
    const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    if (Block* block = memory().find(impl.data()))
      uses.push_back({block->address, block->serial, access_of(*block, impl, 0, 0, name), written});
  }
  return uses;
}

// BatchNorm's schema does not say that it changes the running statistics.
inline bool changes_silently(const std::string& name, const std::string& argument) {
  return name == "aten::native_batch_norm" && argument.rfind("running_", 0) == 0;
}

inline void run(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::string& name = schema.name();
  const auto& parameters = schema.arguments();
  const size_t count = parameters.size(), first = stack->size() - count;
  Call call(name);
  const bool may_be_cpu = takes_cpu_indices(name);
  bool wrote = false, waits_for_indices = false;
  at::Generator generator;
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& value = (*stack)[first + i];
    const auto* alias = parameters[i].alias_info();
    const std::string& argument = parameters[i].name();
    const bool written = (alias != nullptr && alias->isWrite()) || changes_silently(name, argument);
    wrote |= written;
    const bool is_index = may_be_cpu && argument == "indices";
    const auto is_bool = [](const at::Tensor& t) {
      return t.defined() && (t.scalar_type() == c10::ScalarType::Bool ||
                             t.scalar_type() == c10::ScalarType::Byte || t.device().is_cpu());
    };
    if (value.isTensor()) {
      value = call.to_cpu(value.toTensor(), written, false, argument);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> cpu;
      for (const at::Tensor& tensor : value.toTensorVector())
        cpu.push_back(call.to_cpu(tensor, written, false, argument));
      value = cpu;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> cpu;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        waits_for_indices |= is_index && tensor.has_value() && is_bool(*tensor);
        cpu.push_back(tensor.has_value()
                          ? std::optional(call.to_cpu(*tensor, written, is_index, argument))
                          : std::nullopt);
      }
      value = cpu;
    } else if (value.isDevice()) {
      value = c10::Device(c10::DeviceType::CPU);
    } else if (value.isGenerator()) {
      generator = value.toGenerator();
    }
  }
  if (is_waiting(name) || waits_for_indices) wait_for_stream(name);
  const bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
  const int stream = stream_of_thread;
  int64_t graph = -1;
  Entry entry;
  {
    Guard guard;
    graph = current_graph();
    if (any_capture()) {
      if (graph >= 0) {
        entry.arguments.assign(stack->begin() + first, stack->end());
        for (const auto& [tensor, written] : call.touched)
          if (written && tensor.numel() > 0) back_up(graph, tensor.unsafeGetTensorImpl()->data());
      }
    }
    for (const auto& touched : call.touched)
      if (touched.first.numel() > 0)
        if (Block* block = memory().find(touched.first.unsafeGetTensorImpl()->data()))
          run_pending(*block);
  }
  if (draws) run_drawing(op, stack, count, generator);
  else run_on_cpu(op, stack);

  const size_t returned = schema.returns().size(), start = stack->size() - returned;
  std::vector<at::Tensor> created;
  size_t position = 0;  // among all tensors returned
  for (size_t i = 0; i < returned; ++i) {
    c10::IValue& value = (*stack)[start + i];
    bool is_new = false;
    if (value.isTensor()) {
      const at::Tensor cpu = value.toTensor();
      const at::Tensor device = call.to_device(cpu, &is_new);
      if (is_new) {
        created.push_back(device);
        entry.created.emplace_back(position, cpu);
      }
      ++position;
      value = device;
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> all;
      for (const at::Tensor& cpu : value.toTensorVector()) {
        const at::Tensor device = call.to_device(cpu, &is_new);
        if (is_new) {
          created.push_back(device);
          entry.created.emplace_back(position, cpu);
        }
        ++position;
        all.push_back(device);
      }
      value = all;
    }
  }
  call.follow_resizes();
  if (created.empty() && !wrote && !is_waiting(name)) return;  // a view: nothing is launched
  for (const at::Tensor& tensor : created) call.touched.emplace_back(tensor, true);
  Guard guard;
  note(call.touched, stream, name);
  if (graph < 0) return;
  for (const at::Tensor& tensor : created) graphs().all.at(graph).kept.push_back(tensor.storage());
  entry.op = op;
  entry.draws = draws;
  entry.generator = generator;
  entry.name = name;
  entry.uses = uses_of(call.touched, name);
  graphs().all.at(graph).entries.push_back(std::move(entry));
}

}  // namespace emulated
