"""Triton kernels of the engine's hot path, each with its PyTorch reference.

Importing this package or its modules needs no triton; calling a kernel does.
"""
