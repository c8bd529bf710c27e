"""Shared settings: two threads, repeatable hypothesis examples, a quick interpreter."""

import os

import torch
from hypothesis import settings

settings.register_profile("mtkd", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("mtkd")
torch.set_num_threads(2)

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    def patch_once(function):
        """Leave alone what is patched: calls inside of kernels would look it all through."""
        seen = [m for m in function.__globals__.values() if m is tl or m is tl.core]
        if any(tl.core.is_builtin(module.load) for module in seen):
            return patch_language(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
