"""Losses of many teachers as functions: check, pack, call the operator, reduce."""

from .gaussian import gaussian_nll, linear_gaussian_nll

__all__ = ["gaussian_nll", "linear_gaussian_nll"]
