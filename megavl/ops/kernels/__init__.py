"""Triton kernels. Modules here import triton, so `ops/dispatch.py` imports them only where a device may use them."""
