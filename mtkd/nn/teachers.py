"""Names and widths of teachers, and arguments that hold one tensor a teacher."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..functional.checks import check_dims, check_shape, check_tensor, is_sequence

Tensors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class Teachers(NamedTuple):
    """Teachers in order; those given without names are called "0", "1", and so on."""

    dims: tuple[int, ...]
    names: tuple[str, ...]
    named: bool

    @classmethod
    def of(cls, dims: Sequence[int] | Mapping[str, int]) -> "Teachers":
        """Check the argument `dims` of a module."""
        named = isinstance(dims, Mapping)
        if not named and not is_sequence(dims):
            kind = type(dims).__name__
            raise TypeError(f"dims: expected a sequence of widths or a mapping by name, got {kind}")
        widths = tuple(dims.values()) if isinstance(dims, Mapping) else tuple(dims)
        names = tuple(dims if isinstance(dims, Mapping) else map(str, range(len(widths))))
        if not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"dims: expected names that are non-empty strings, got {names}")
        return cls(check_dims(widths, None, "the teachers"), names, named)

    def in_order(self, name: str, argument: Any) -> Tensor | Sequence[Tensor]:
        """Return an argument as one packed tensor or as one tensor a teacher, all checked."""
        if isinstance(argument, Mapping):
            argument = self._by_name(name, argument)
        if not is_sequence(argument):
            check_tensor(name, argument)
            check_shape(name, argument, (*argument.shape[:-1], sum(self.dims)))
            return argument  # type: ignore[no-any-return]
        if len(argument) != len(self.dims):
            expected = f"{len(self.dims)} tensors, one a teacher"
            raise ValueError(f"{name}: expected {expected}, got {len(argument)}")
        check_tensor(f"{name}[0]", argument[0])
        for teacher, (tensor, width) in enumerate(zip(argument, self.dims, strict=True)):
            check_tensor(f"{name}[{teacher}]", tensor, argument[0].device)
            check_shape(f"{name}[{teacher}]", tensor, (*argument[0].shape[:-1], width))
        return argument  # type: ignore[no-any-return]

    def _by_name(self, name: str, argument: Mapping[str, Tensor]) -> list[Tensor]:
        if not self.named:
            raise TypeError(f"{name}: expected no mapping, since dims gives no names")
        missing = [key for key in self.names if key not in argument]
        unknown = [str(key) for key in argument if key not in self.names]
        if missing or unknown:
            expected = "a tensor for each teacher of dims and no other"
            got = [f"none for {', '.join(missing)}"] if missing else []
            got += [f"one for {', '.join(unknown)}"] if unknown else []
            raise ValueError(f"{name}: expected {expected}, got {' and '.join(got)}")
        return [argument[key] for key in self.names]

    def map(self, function: Callable[..., Tensor], name: str, argument: Any) -> Any:
        """Call ``function(tensor, teachers, columns)`` on each tensor; return the same structure.

        `teachers` and `columns` are slices: what the tensor holds.
        """
        tensors = self.in_order(name, argument)
        if isinstance(tensors, Tensor):
            return function(tensors, slice(0, len(self.dims)), slice(0, sum(self.dims)))
        results, start = [], 0
        for teacher, (tensor, width) in enumerate(zip(tensors, self.dims, strict=True)):
            teachers, columns = slice(teacher, teacher + 1), slice(start, start + width)
            results.append(function(tensor, teachers, columns))
            start += width
        return (
            dict(zip(self.names, results, strict=True))
            if isinstance(argument, Mapping)
            else results
        )
