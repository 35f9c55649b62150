"""An emulated CUDA device: tensors that are on ``cuda:0`` for torch, in the CPU's memory.

A library (``source/``) registers for torch's CUDA key what a build with CUDA would: an allocator,
streams and events, generators, hooks, and every operator. The operators' arithmetic is the CPU's,
in place; what surrounds it is a device's: tensors of two devices are refused, new memory holds no
numbers, host waits are counted and can be forbidden, graphs are captured and replayed, and work of
two streams whose order nothing says is found. All of torch above the kernels is its own: autograd,
which runs backward passes on the device's thread and streams, autocast, ``torch.cuda``, optimizers.
"""
