"""Triton programs; the only modules of this package that import triton."""
