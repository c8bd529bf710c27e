"""All probes at once, as a flat dict of named scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from ..packing import offsets
from .checks import Array, to_array, to_columns, to_labels, to_values
from .geometry import isotropy, neighbour_overlap, pair_spearman
from .probes import (
    kmeans_nmi,
    knn_probe,
    linear_probe,
    logistic_probe,
    reconstruction_r2,
    ridge_probe,
)


def evaluate(
    embeddings: Any,
    *,
    labels: Any = None,
    values: Any = None,
    pairs: tuple[Any, Any, Any] | None = None,
    teachers: Any = None,
    dims: Mapping[str, int] | Sequence[int] | None = None,
    mask: Any = None,
    held_out: Any = 1 / 3,
    neighbours: int = 10,
    seed: int = 0,
    only: Collection[str] | None = None,
) -> dict[str, float]:
    """Score an embedding by every probe for which there is data.

    Args:
        embeddings: ``(N, H)``.
        labels: classes ``(N,)``: gives `linear`, `logistic`, `knn` and `nmi`.
        values: numbers ``(N,)`` or ``(N, K)``: gives `ridge`.
        pairs: rows of one side, rows of the other, and scores of how alike they are: `spearman`.
        teachers: what teachers say of the same rows, a mapping from names to ``(N, D_t)`` or
            packed ``(N, sum D_t)`` with `dims`: gives `r2/<name>` and `overlap/<name>`.
        dims: widths of packed teachers, by name (as a store's `dims`) or in order.
        mask: ``(N, T)``, True where a teacher has the row; others are left out, for that teacher.
        held_out: the rows that score readers which the other rows fit: a share (chosen by `seed`,
            by class where there are labels), or a boolean array ``(N,)``.
        neighbours: of `knn` and `overlap`, both by cosine.
        seed: of the share held out and of k-means.
        only: which scores to compute, such as ``("knn", "r2")``; None: all that the data allow.

    Returns:
        Scores by name, `isotropy` among them unless there is one column alone; see each probe for
        range and meaning. `nmi`, `overlap`, `isotropy` and `spearman` fit nothing, and take all
        rows.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, too few rows, of a teacher
            too: the score is named first.
        TypeError: not numbers; `only` that is not a collection of names.

    Note:
        Seconds for some thousand rows. With `transformers.Trainer`:
        ``compute_metrics=lambda output: evaluate(output.predictions, labels=output.label_ids)``.

    Source:
        The probes' own.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.arange(90) % 3
        >>> teacher = torch.nn.functional.one_hot(labels).float()
        >>> noise = torch.randn(90, 4, generator=generator)
        >>> student = torch.cat([2 * teacher, 0.1 * noise], 1)
        >>> scores = evaluate(student, labels=labels, teachers={"classes": teacher})
        >>> [name for name, value in scores.items() if value > 0.99]
        ['linear', 'logistic', 'knn', 'nmi', 'r2/classes']
    """
    if only is not None and (isinstance(only, str) or not isinstance(only, Collection)):
        raise TypeError(f'only: expected several names, such as ("knn",), got {only!r:.80}')
    columns = to_columns("embeddings", embeddings)
    rows = len(columns)
    classes = None if labels is None else to_labels("labels", labels, rows, least=2)
    test = _held_out(held_out, rows, classes, seed)
    asked: list[tuple[str, Callable[[], float]]] = []
    if classes is not None:
        part = columns[~test], classes[~test], columns[test], classes[test]
        asked += [
            ("linear", partial(linear_probe, *part)),
            ("logistic", partial(logistic_probe, *part)),
            ("knn", partial(knn_probe, *part, neighbours=neighbours, metric="cosine")),
            ("nmi", partial(kmeans_nmi, columns, classes, seed=seed)),
        ]
    if values is not None:
        numbers = to_values("values", values, rows)
        parts = columns[~test], numbers[~test], columns[test], numbers[test]
        asked.append(("ridge", partial(ridge_probe, *parts)))
    if pairs is not None:
        first, second = (columns[side] for side in _pair_rows(pairs, rows))
        asked.append(("spearman", partial(pair_spearman, first, second, pairs[2])))
    for name, teacher, known in _by_teacher(teachers, dims, mask, rows):
        if not known.any() and (only is None or {"r2", "overlap"} & set(only)):
            raise ValueError(f"mask: expected rows of teacher {name!r}, got none")
        fit, held = known & ~test, known & test
        parts = columns[fit], teacher[fit], columns[held], teacher[held]
        near = columns[known], teacher[known]
        asked.append((f"r2/{name}", partial(reconstruction_r2, *parts)))
        asked.append((f"overlap/{name}", partial(neighbour_overlap, *near, neighbours=neighbours)))
    if columns.shape[1] > 1 or (only is not None and "isotropy" in only):
        asked.append(("isotropy", partial(isotropy, columns)))
    wanted = {name.split("/")[0] for name, _ in asked} if only is None else set(only)
    if unknown := wanted - {name.split("/")[0] for name, _ in asked}:
        found = ", ".join(dict.fromkeys(name.split("/")[0] for name, _ in asked))
        raise ValueError(
            f"only: expected some of {found}, got {', '.join(sorted(map(str, unknown)))}"
        )
    return {name: _named(name, score) for name, score in asked if name.split("/")[0] in wanted}


def _named(name: str, score: Callable[[], float]) -> float:
    """Return a score; an error says of which, and so of which teacher, it is."""
    try:
        return score()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _held_out(held_out: Any, rows: int, classes: Array | None, seed: int) -> Array:
    """Which rows score readers, as a boolean array; neither part is empty."""
    if isinstance(held_out, float):
        if not 0 < held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
        smallest = 2 if classes is None else int(np.unique(classes, return_counts=True)[1].min())
        if smallest < 2:
            raise ValueError("labels: expected two rows or more of every class, got a class of one")
        try:
            _, chosen = train_test_split(
                np.arange(rows), test_size=held_out, stratify=classes, random_state=seed
            )
        except ValueError as error:  # fewer rows held out than classes, or none left
            raise ValueError(f"embeddings: expected more rows, got {rows}: {error}") from None
        test = np.zeros(rows, dtype=bool)
        test[chosen] = True
        return test
    test = to_array(held_out)
    if test.dtype != bool or test.shape != (rows,):
        raise ValueError(
            f"held_out: expected a share (a float) or booleans of shape ({rows},),"
            f" got {test.dtype} of shape {test.shape}"
        )
    if test.all() or not test.any():
        raise ValueError(f"held_out: expected rows in both parts, got {test.sum()} of {rows}")
    return test


def _pair_rows(pairs: Any, rows: int) -> tuple[Array, Array]:
    """Rows of both sides of the pairs, as indices."""
    if not isinstance(pairs, (tuple, list)) or len(pairs) != 3:
        raise TypeError("pairs: expected three sequences: rows, rows and scores")
    first, second = to_array(pairs[0]), to_array(pairs[1])
    for name, indices in (("pairs[0]", first), ("pairs[1]", second)):
        if indices.dtype.kind not in "iu" or indices.shape != first.shape or indices.ndim != 1:
            raise ValueError(
                f"{name}: expected whole numbers, as many as pairs,"
                f" got {indices.dtype} of shape {indices.shape}"
            )
        if len(indices) and not (indices.min() >= 0 and indices.max() < rows):
            raise ValueError(f"{name}: expected rows from 0 to {rows - 1}")
    return first, second


def _by_teacher(
    teachers: Any, dims: Any, mask: Any, rows: int
) -> Iterator[tuple[str, Array, Array]]:
    """Yield each teacher's name, columns, and which rows it has; absent rows may hold anything."""
    if teachers is None:
        return
    parts = dict(teachers) if isinstance(teachers, Mapping) else _unpack(to_array(teachers), dims)
    known = np.ones((rows, len(parts)), dtype=bool) if mask is None else to_array(mask)
    if known.dtype != bool or known.shape != (rows, len(parts)):
        raise ValueError(
            f"mask: expected booleans of shape ({rows}, {len(parts)}),"
            f" got {known.dtype} of shape {known.shape}"
        )
    for (name, part), has in zip(parts.items(), known.T, strict=True):
        part = to_array(part)
        if part.ndim != 2 or len(part) != rows:
            raise ValueError(f"teachers[{name!r}]: expected shape ({rows}, D), got {part.shape}")
        cleaned = to_columns(f"teachers[{name!r}]", np.where(has[:, None], part, 0))
        yield str(name), cleaned, has


def _unpack(packed: Array, dims: Any) -> dict[str, Array]:
    """Packed columns as one array a teacher, named by `dims` or numbered."""
    if dims is None:
        raise ValueError("dims: expected the widths of packed teachers, got None")
    named = dims if isinstance(dims, Mapping) else {str(i): dim for i, dim in enumerate(dims)}
    edges = offsets(tuple(named.values()))
    if packed.ndim != 2 or packed.shape[1] != edges[-1]:
        raise ValueError(f"teachers: expected shape (N, {edges[-1]}), got shape {packed.shape}")
    return {
        name: packed[:, start:stop]
        for name, start, stop in zip(named, edges[:-1], edges[1:], strict=True)
    }
