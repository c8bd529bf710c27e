"""Fill a store from a model: in batches, resumed where a run was stopped, shared by processes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._signature import forward_arguments
from .encoding import check_values
from .reading import as_rows
from .store import TeacherStore


def embed(
    model: Callable[[Any], Any],
    dataset: Any,
    store: TeacherStore,
    teacher: str,
    *,
    batch_size: int = 64,
    rows: Any = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    pooling: Callable[[Any, Any], Tensor] | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    write_every: int = 8,
    num_workers: int = 0,
    progress: bool = True,
) -> int:
    """Write a model's embeddings of a dataset into a store, those that are not there yet.

    Args:
        model: a callable from a batch to embeddings ``(n, D_t)``, a tensor or an array. A module
            runs in evaluation mode, and is put back afterwards; one whose `forward` has arguments
            named like keys of the batch, as those of Hugging Face, gets the batch as keywords. A
            wrapper whose `forward` is ``(*args, **kwargs)``, such as torch.compile's, is called as
            the one module in it would be.
        dataset: has a length and gives an item for each number, as `DataLoader` takes it.
        store: the store, which may be filled in part.
        teacher: the teacher's name in the store.
        batch_size: items in a batch.
        rows: the store's row of each item; None if item i is row i and there are as many.
        collate_fn: makes a batch of a list of items; None for PyTorch's own.
        pooling: makes the embeddings of what the model returns and of the batch.
        device: where batches are moved; None leaves them. The model has to be there.
        revision: the model's revision, which has to be the one that the store was created with;
            None compares nothing.
        rank: which share of the batches this process takes; None asks torch.distributed, if
            initialised. Shares differ in length: the model must not wait for other ranks.
        world_size: the number of shares; likewise.
        write_every: batches that are written together: a process that is killed has computed at
            most these in vain. Each time costs a few waits for the disk.
        num_workers: processes that load items, as in `DataLoader`.
        progress: whether the first process shows a bar of its rows; needs tqdm.

    Returns:
        The number of rows that this process has written.

    Raises:
        ValueError: rows or teacher that the store does not have, another revision than the store's;
            embeddings of another width, NaN, infinity or overflow in the stored dtype. What was
            written before stays; of the `write_every` batches of that time none is written.
        TypeError: what the model returns is neither a tensor nor an array; a dataset of unknown
            length.

    Note:
        Batches are cut by position, whatever is there already: a run that was killed and started
        again, and one shared out to other numbers of processes, calls the model on the same
        batches and stores the same bits. A batch that is there in part is computed again, and only
        its absent rows are written.

    Example:
        >>> import tempfile, torch
        >>> from mtkd.teachers import TeacherStore, embed
        >>> images, teacher = torch.randn(100, 16), torch.nn.Linear(16, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = TeacherStore.create(f"{folder}/store", {"linear": 8}, rows=100)
        ...     written = embed(teacher, images, store, "linear", progress=False)
        ...     again = embed(teacher, images, store, "linear", progress=False)
        ...     targets, mask = store[[3, 5]]
        >>> written, again, targets.shape, mask.all().item()
        (100, 0, torch.Size([2, 8]), True)
    """
    for name, size in (("batch_size", batch_size), ("write_every", write_every)):
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size}")
    numbers = _rows_of(dataset, store, rows)
    rank, world_size = _share(rank, world_size)
    batches = _batches(len(numbers), batch_size, rank, world_size)
    present = store.present(teacher)[numbers]
    _check_revision(store, teacher, revision)
    missing = [batch for batch in batches if not present[batch.start : batch.stop].all()]
    sampler: Any = missing
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate_fn, num_workers=num_workers
    )
    total, left, written = sum(map(len, batches)), sum(map(len, missing)), 0
    bar = _progress(progress and rank == 0, teacher, total, total - left)
    with _evaluation(model), torch.no_grad(), bar as advance:
        pairs = zip(missing, loader, strict=True)
        while group := list(islice(pairs, write_every)):
            values = []
            for positions, batch in group:
                batch = batch if device is None else to_device(batch, device)
                output = _call(model, batch)
                output = output if pooling is None else pooling(output, batch)
                shape = (len(positions), store.dims[teacher])
                values.append(check_values(teacher, output, shape))
                advance(len(positions))
            chosen = numbers[list(chain.from_iterable(positions for positions, _ in group))]
            written += store.append(teacher, torch.cat(values), chosen, present="keep")
    return written


def _rows_of(dataset: Any, store: TeacherStore, rows: Any) -> Tensor:
    """The store's row of each item of a dataset."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        kind = type(dataset).__name__
        raise TypeError(f"dataset: expected items by number and their count, got {kind}")
    if rows is None and len(dataset) != len(store):
        expected = f"{len(store)} items, as the store has rows, or the argument rows"
        raise ValueError(f"dataset: expected {expected}, got {len(dataset)} items")
    numbers = as_rows(slice(None) if rows is None else rows, len(store))
    if len(numbers) != len(dataset):
        raise ValueError(f"rows: expected one for each of {len(dataset)} items, got {len(numbers)}")
    if len(numbers.unique()) != len(numbers):
        raise ValueError("rows: expected rows that differ, got some twice")
    return numbers


def _check_revision(store: TeacherStore, teacher: str, revision: str | None) -> None:
    recorded = store.revisions[teacher]
    if revision is None or revision == recorded:
        return
    if recorded is None:
        first = f"revision={{{teacher!r}: {revision!r}}} to TeacherStore.create or add"
        raise ValueError(
            f"revision: expected None, since the store has none of {teacher}, got {revision!r};"
            f" give {first} to have it compared"
        )
    raise ValueError(
        f"revision: expected {recorded!r}, as the store has it of {teacher}, got {revision!r}"
    )


def _batches(count: int, size: int, rank: int, world_size: int) -> list[range]:
    """Positions of each batch of one share; how batches are cut does not depend on the share."""
    batches = -(-count // size)
    mine = range(batches * rank // world_size, batches * (rank + 1) // world_size)
    return [range(batch * size, min((batch + 1) * size, count)) for batch in mine]


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move the tensors of a batch: one that has ``to``, or a nest of dicts, lists and tuples."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _call(model: Callable[..., Any], batch: Any) -> Any:
    """Call a model on a batch: a module that names its keys takes them as keywords."""
    if isinstance(model, torch.nn.Module) and isinstance(batch, Mapping):
        named = forward_arguments(model)
        if any(key in named for key in batch):
            return model(**batch)
    return model(batch)


def _share(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"rank: expected rank and world_size, or neither, got {rank}, {world_size}"
        )
    if rank is None or world_size is None:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        return distributed.get_rank(), distributed.get_world_size()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected a number from 0 to {world_size - 1}, got {rank}")
    return rank, world_size


@contextmanager
def _evaluation(model: Any) -> Iterator[None]:
    """Put the modules of a model that train into evaluation mode for a while."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _progress(shown: bool, teacher: str, total: int, done: int) -> Iterator[Callable[[int], Any]]:
    """Show a bar of rows; yield what advances it."""
    if not shown:
        yield lambda rows: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        expected = "tqdm, which pip install mtkd[teachers] brings, or progress=False"
        raise ImportError(f"embed: expected {expected}") from error
    with tqdm(desc=teacher, total=total, initial=done, unit="row") as bar:
        yield bar.update
