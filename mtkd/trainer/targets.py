"""Where a batch's targets come from: rows of a store, or frozen teachers in the loop."""

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .encoders import as_encoder

ROW = "row"


class Targets(Protocol):
    """What the trainer asks for targets: any callable of a batch.

    Three attributes are read where there are any: `names` (the teachers', for logs), `dims` (a
    mapping name -> width, checked before training) and `keys` (the keys of the batch that it
    reads; without them the trainer keeps all columns of the data).
    """

    def __call__(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return packed targets ``(N, D)``, and a mask ``(N, T)`` bool or None."""


class StoreTargets:
    """The rows of a teacher store that a batch names by its key "row".

    Args:
        store: a `mtkd.teachers.TeacherStore`, or anything with its `names`, `dims` and
            ``store[rows] -> (packed, mask)``; its ``read(rows, device=...)`` is preferred where it
            has one.
        key: the key of the batch that holds row numbers, int64 ``(N,)``.

    Returns:
        Packed targets ``(N, D)`` and mask ``(N, T)``, on the device of the row numbers.

    Raises:
        ValueError: a batch without that key, or whose rows are no integers ``(N,)``.

    Example:
        >>> import torch
        >>> from mtkd.trainer import StoreTargets
        >>> class Store:
        ...     names, dims = ("cnn",), {"cnn": 3}
        ...
        ...     def __getitem__(self, rows):
        ...         return torch.randn(10, 3)[rows], torch.ones(len(rows), 1, dtype=torch.bool)
        >>> packed, mask = StoreTargets(Store())({"row": torch.tensor([4, 7])})
        >>> packed.shape, mask.shape
        (torch.Size([2, 3]), torch.Size([2, 1]))
    """

    def __init__(self, store: Any, key: str = ROW) -> None:
        self.store, self.key, self.keys = store, key, (key,)
        self.names, self.dims = tuple(store.names), dict(store.dims)

    def __call__(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the targets of a batch."""
        if self.key not in batch:
            raise ValueError(
                f"batch: expected key {self.key!r}, each sample's row in the store,"
                f" got {', '.join(map(str, batch))}; add it to the dataset as a column of integers"
            )
        rows = batch[self.key]
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in _INTEGERS:
            got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else repr(rows)
            raise ValueError(f"batch[{self.key!r}]: expected int64 of shape (N,), got {got}")
        if hasattr(self.store, "read"):  # through pinned memory, while the host goes on
            packed, mask = self.store.read(rows.cpu(), device=rows.device)
            return packed, mask
        packed, mask = self.store[rows.to(getattr(self.store, "device", "cpu"))]
        move = {"device": rows.device, "non_blocking": True}
        return packed.to(**move), mask.to(**move)


class TeacherModels:
    """Frozen teachers run in the loop, on the batch as it was augmented.

    Args:
        models: a mapping from a teacher's name to its model: an `Encoder`, or a module that returns
            embeddings. They are put into evaluation mode and frozen.
        dtype: what autocast computes in, such as torch.bfloat16; None: as the models are.

    Returns:
        Packed targets ``(N, D)``, float32 where teachers' dtypes differ, and no mask: all count.

    Raises:
        ValueError: no teacher, or an output that is not ``(N, D_t)``.

    Note:
        They move to the device of the batch. They are no part of the trainer's model: no
        checkpoint holds them, and no gradient reaches them.

    Example:
        >>> import torch
        >>> from mtkd.trainer import Encoder, TeacherModels
        >>> teacher = Encoder(torch.nn.Linear(8, 3), inputs=("x",))
        >>> packed, mask = TeacherModels({"linear": teacher})({"x": torch.randn(5, 8)})
        >>> packed.shape, packed.requires_grad
        (torch.Size([5, 3]), False)
    """

    def __init__(
        self, models: Mapping[str, nn.Module], dtype: torch.dtype | None = torch.bfloat16
    ) -> None:
        if not models:
            raise ValueError("models: expected at least one teacher, got none")
        self.names, self.dtype = tuple(models), dtype
        self.widths: tuple[int, ...] | None = None  # of the last outputs
        self.models = [as_encoder(name, model) for name, model in models.items()]
        self.keys = tuple({key: None for model in self.models for key in model.keys})
        for model in self.models:
            model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> tuple[Tensor, None]:
        """Return the targets of a batch."""
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        context: Any = contextlib.nullcontext()
        if self.dtype is not None:
            context = torch.autocast(device.type, self.dtype)
        with context:
            outputs = [model.to(device)(batch) for model in self.models]
        for name, output in zip(self.names, outputs, strict=True):
            if output.dim() != 2:
                shape = tuple(output.shape)
                raise ValueError(f"teacher {name}: expected embeddings (N, D), got shape {shape}")
        self.widths = tuple(output.shape[1] for output in outputs)
        equal = len({output.dtype for output in outputs}) == 1
        return torch.cat([x if equal else x.float() for x in outputs], 1), None


_INTEGERS = {torch.int64, torch.int32}


def as_targets(targets: Any) -> Targets:
    """Return a store as `StoreTargets`; leave what can be called as it is."""
    if all(hasattr(targets, name) for name in ("names", "dims", "__getitem__")):
        return StoreTargets(targets)
    if not callable(targets):
        kind = type(targets).__name__
        raise TypeError(f"targets: expected a store or a callable of a batch, got {kind}")
    return targets  # type: ignore[no-any-return]


def fetch(
    targets: Targets, batch: Mapping[str, Any], dims: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return a batch's targets and mask, checked."""
    given = targets(batch)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        kind = type(given).__name__
        raise TypeError(f"targets: expected a pair (packed, mask or None), got {kind}")
    packed, mask = given
    if not isinstance(packed, Tensor) or not packed.is_floating_point() or packed.dim() != 2:
        got = f"{packed.dtype} {tuple(packed.shape)}" if isinstance(packed, Tensor) else packed
        raise ValueError(f"targets: expected a floating-point tensor (N, D), got {got}")
    widths = getattr(targets, "widths", None)
    if packed.shape[1] != sum(dims) or (widths is not None and widths != dims):
        got = f"{packed.shape[1]} columns" if widths is None else f"outputs of widths {widths}"
        raise ValueError(f"targets: expected the columns of teachers of widths {dims}, got {got}")
    shape = (len(packed), len(dims))
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=packed.device)
    if mask.dtype != torch.bool or mask.shape != shape:
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"targets: expected a mask of bool {shape}, got {got}")
    return packed.detach(), mask
