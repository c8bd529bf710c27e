"""What a module is called with, whatever wraps it."""

import inspect
from collections.abc import Mapping

from torch import nn

_PASSES_ON = [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def forward_arguments(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of `forward`; those of the one module in a wrapper that passes all on.

    Such are the wrappers of torch.compile, torch.nn.parallel and PEFT.
    """
    named = inspect.signature(module.forward).parameters
    kinds = [parameter.kind for parameter in named.values()]
    inside = list(module.children())
    return forward_arguments(inside[0]) if kinds == _PASSES_ON and len(inside) == 1 else named
