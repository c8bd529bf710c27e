"""Triton kernels, a file a family of losses; none yet: `ops` registers them when there are."""
