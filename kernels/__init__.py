"""Triton kernels of the public operations: plain tensors in, plain tensors out.

Arguments are validated by ``hubpath_fast.functional``; nothing here checks them again.
"""
