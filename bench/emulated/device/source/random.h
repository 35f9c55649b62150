// The device's random numbers: a seed and an offset, as there, made by the CPU's generator.
//
// Each drawing operation seeds the CPU's generator with both, and moves the offset on. So a state is
// the 16 bytes that it is on a device, and replays of a captured operation draw what follows from
// the state of then.
#pragma once

#include "memory.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GeneratorImpl.h>

namespace emulated {

struct DeviceGenerator final : c10::GeneratorImpl {
  uint64_t seed_ = 67280421310721, offset_ = 0;

  DeviceGenerator() : GeneratorImpl(DEVICE, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}

  void set_current_seed(uint64_t seed) override { seed_ = seed, offset_ = 0; }
  void set_offset(uint64_t offset) override { offset_ = offset; }
  uint64_t get_offset() const override { return offset_; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom(false));
    return seed_;
  }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.numel() == 16 && state.device().is_cpu(),
                "RNG state is wrong size or not on the CPU");
    std::memcpy(&seed_, state.data(), 8);
    std::memcpy(&offset_, static_cast<const char*>(state.data()) + 8, 8);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    at::Tensor state = at::detail::empty_cpu({16}, c10::ScalarType::Byte);
    std::memcpy(state.data_ptr(), &seed_, 8);
    std::memcpy(static_cast<char*>(state.data_ptr()) + 8, &offset_, 8);
    return state.getIntrusivePtr();
  }
  void graphsafe_set_state(const c10::intrusive_ptr<c10::GeneratorImpl>& other) override {
    const auto& state = static_cast<const DeviceGenerator&>(*other);
    seed_ = state.seed_, offset_ = state.offset_;
  }
  c10::intrusive_ptr<c10::GeneratorImpl> graphsafe_get_state() const override { return clone(); }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator;
    copy->seed_ = seed_, copy->offset_ = offset_;
    return copy;
  }
  // The seed of the CPU's generator for one operation (splitmix64 of both numbers).
  uint64_t draw() {
    uint64_t z = seed_ + 0x9e3779b97f4a7c15 * (++offset_);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    offset_ += 3;  // offsets are multiples of 4
    return z ^ (z >> 31);
  }
};

inline const at::Generator& default_generator() {
  static auto* found = new at::Generator(c10::make_intrusive<DeviceGenerator>());
  return *found;
}

inline DeviceGenerator& generator_of(const at::Generator* given) {
  const at::Generator& found = given != nullptr ? *given : default_generator();
  return *static_cast<DeviceGenerator*>(found.unsafeGetGeneratorImpl());
}

}  // namespace emulated
