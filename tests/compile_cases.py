"""What launches the Triton kernels that `make compile-check` compiles, as dispatch does.

`configurations()` is the table: a name, and a function that calls launchers with tensors that have
no memory. Dtypes, shapes, strides and alignment decide which code is compiled, so sizes are those
of training, with few rows and with many, some divisible by 16 and some not. A new kernel file
adds its file to `compiled/` and a function of its configurations to FAMILIES.
"""

from collections.abc import Iterator
from functools import partial

import torch
from compiled.alignment import alignment_configurations
from compiled.common import EVERY, Configuration, coefficient
from compiled.consensus import consensus_configurations
from compiled.divergence import divergence_configurations
from compiled.gaussian import gaussian_configurations
from compiled.layers import linear_gaussian_configurations
from compiled.votes import votes_configurations

from mtkd.triton import common


def scale_configurations() -> Iterator[Configuration]:
    """The factor of a reduction, for gradients of every dtype."""
    for dtype in EVERY:
        x = torch.empty(8192, 8192, dtype=dtype, device="meta")
        factor = coefficient((None, (1,), x))[0, 0]
        yield f"scale {str(dtype).removeprefix('torch.')}", partial(common.scale_, [x], factor)


FAMILIES = (
    gaussian_configurations,
    linear_gaussian_configurations,
    alignment_configurations,
    consensus_configurations,
    divergence_configurations,
    votes_configurations,
    scale_configurations,
)


def configurations() -> Iterator[Configuration]:
    """Yield names, and what launches kernels."""
    for family in FAMILIES:
        yield from family()
