"""Triton kernels, a file a family of losses; `ops` registers them for GPUs."""
