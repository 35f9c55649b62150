// What torch asks of CUDA when it does not ask an operator: whether it is there, pinned memory,
// generators. cuDNN is not: convolutions and BatchNorm are then torch's own.
#pragma once

#include "random.h"
#include "streams.h"

#include <ATen/detail/CUDAHooksInterface.h>

namespace emulated {

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  long versionCuDNN() const override { return 91300; }
  long versionRuntimeCuDNN() const override { return 91300; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void* pointer) const override {
    Guard guard;
    return pinned().holds(pointer);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::Generator(c10::make_intrusive<DeviceGenerator>());
  }
  void deviceSynchronize(c10::DeviceIndex) const override {
    DeviceGuardImpl().synchronizeDevice(0);
  }
};

}  // namespace emulated
