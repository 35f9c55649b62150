"""The kernels as compiled for a GPU, and the emulator that runs them, on a CPU."""
