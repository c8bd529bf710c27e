"""``define``: a schema, a formula and its gradient become a twice differentiable operator.

Each loss ``<name>`` becomes five operators of ``torch.ops.mtkd``, every one opaque to
torch.compile and export, and every one with the plain formula as its implementation wherever no
kernel is registered (``CompositeExplicitAutograd``: fallback, and what tracing runs on fake
tensors)::

    <name>(args) -> matrix, saved                 the matrix of losses (N, T), and whatever the
                                                  kernel wants back in <name>_backward
    <name>_backward(grad, saved, args, output_mask) -> gradients
                                                  given the gradient to the matrix
    <name>_value_and_grad(coefficient, args, output_mask) -> matrix, gradients
                                                  both in one pass, when that gradient is known
    <name>_value_and_grad_out(coefficient, args, gradients) -> matrix
                                                  likewise, into tensors that the caller gives,
                                                  of any dtype; the arguments themselves too
    <name>_sum(coefficient, args) -> sum(coefficient * matrix)
                                                  the scalar that training needs

A gradient that ``output_mask`` does not ask for is an empty tensor. Kernels implement the first
four (drivers of fused losses three) and know nothing of autograd; ``<name>`` and ``<name>_sum`` are
differentiable.
``<name>_sum`` stores the gradients that come with the value; whenever a graph of the backward
pass is asked for, the gradients come from the formulas instead, so derivatives of any order are
exact. Function transforms (torch.func) and forward mode see the formulas too.

Kernels compiled for CUDA register under a namespace of their own, ``mtkd_cuda``, with the same
schemas: so they stand beside the Triton kernels, and ``ops`` says which of them serves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("mtkd", "DEF")
_COMPILED_CUDA = torch.library.Library("mtkd_cuda", "DEF")
_SUFFIXES = {
    "forward": "",
    "backward": "_backward",
    "value_and_grad": "_value_and_grad",
    "value_and_grad_out": "_value_and_grad_out",
    "sum": "_sum",
}
_LIBRARY.define("advise_huge_pages(Tensor x) -> ()")
_LIBRARY.impl("advise_huge_pages", lambda x: None, "CompositeExplicitAutograd")
for _library in (_LIBRARY, _COMPILED_CUDA):
    _library.define("scale_(Tensor(a!)[] tensors, Tensor scale) -> ()")
_below_autograd = torch._C._AutoDispatchBelowAutograd
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # what is_grads_batched makes
_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph

Gradients = tuple[Tensor | None, ...]


def spare_infinite(coefficient: Tensor, matrix: Tensor) -> Tensor:
    """Zero infinite losses of coefficient 0: they add nothing, to its gradient neither."""
    if coefficient.stride() == (0, 0):  # one number for all
        return matrix
    return matrix.masked_fill(matrix.isinf() & (coefficient == 0), 0.0)


@dataclass(frozen=True)
class Formulas:
    """A loss's operators as plain PyTorch formulas, by the names of their roles."""

    matrix: Callable[..., Tensor]
    gradient: Callable[..., Gradients]
    saved: Callable[..., Tensor]
    positions: tuple[int, ...]  # of the differentiable arguments

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Return the matrix, and an empty tensor like what kernels save."""
        return self.matrix(*args), self.saved(*args)

    def backward(self, grad: Tensor, saved: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Return the gradients, empty tensors where the output mask does not want them."""
        *args, output_mask = args  # type: ignore[assignment]
        pairs = zip(self.gradient(grad, *args), output_mask, strict=True)
        return tuple(
            g.contiguous() if wanted and g is not None else grad.new_empty(0) for g, wanted in pairs
        )

    def value_and_grad(self, coefficient: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Return the matrix and the gradients."""
        matrix, saved = self.forward(*args[:-1])
        return (matrix, *self.backward(coefficient, saved, *args))

    def value_and_grad_out(self, coefficient: Tensor, *args: Any) -> Tensor:
        """Return the matrix; write the gradients into the last arguments."""
        count = len(self.positions)
        args, outputs = args[:-count], args[-count:]
        matrix, gradients = self.matrix(*args), self.gradient(coefficient, *args)
        for output, grad in zip(outputs, gradients, strict=True):
            if output is not None and grad is not None:
                output.copy_(grad)
        return matrix

    def sum(self, coefficient: Tensor, *args: Any) -> Tensor:
        """Return the sum of coefficient times matrix."""
        return (coefficient * spare_infinite(coefficient, self.matrix(*args))).sum()


@dataclass(frozen=True)
class Loss:
    """The operators of one loss, and where its differentiable arguments stand."""

    name: str
    arguments: tuple[str, ...]
    differentiable: tuple[int, ...]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    value_and_grad: Callable[..., tuple[Tensor, ...]]
    value_and_grad_out: Callable[..., Tensor]
    sum: Callable[..., Tensor]
    formulas: Formulas
    eager: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def matrix(self, *args: Any) -> Tensor:
        """Return the matrix of losses; differentiable."""
        return self._differentiable("forward")(*args)[0]  # type: ignore[no-any-return]

    def weighted_sum(self, coefficient: Tensor, *args: Any) -> Tensor:
        """Return the sum of coefficient times matrix; differentiable."""
        return self._differentiable("sum")(coefficient, *args)  # type: ignore[no-any-return]

    def _differentiable(self, role: str) -> Callable[..., Any]:
        # an eager call may skip the dispatcher, whose way to the Autograd kernel below and back
        # converts every argument twice
        if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
            return getattr(self, role)  # type: ignore[no-any-return]
        return self.eager[role]

    @property
    def operators(self) -> tuple[str, ...]:
        """The names of its operators in ``torch.ops.mtkd``."""
        return tuple(self.name + suffix for suffix in _SUFFIXES.values())

    @property
    def kernels(self) -> dict[str, str]:
        """The names of the operators that kernels implement, by role."""
        return {role: self.name + s for role, s in _SUFFIXES.items() if role != "sum"}

    def implement(self, key: str, **kernels: Callable[..., Any]) -> None:
        """Register Python kernels under a dispatch key: ``forward=``, ``backward=``, ..."""
        for role, kernel in kernels.items():
            kernel = _as_schema(kernel) if role == "backward" else kernel
            implement(self.name + _SUFFIXES[role], key, kernel)


def as_tuple(backward: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """Wrap an operator that returns a tensor, not a tuple, where there is a single gradient."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        gradients = backward(*args)
        return (gradients,) if isinstance(gradients, Tensor) else gradients

    return run


def _as_schema(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The opposite: in a schema, a tuple of one is what it holds."""

    def run(*args: Any) -> Any:
        gradients = backward(*args)
        return gradients[0] if isinstance(gradients, tuple) and len(gradients) == 1 else gradients

    return run


def implement(operator: str, key: str, kernel: Callable[..., Any]) -> None:
    """Register a Python kernel of an operator of ``torch.ops.mtkd`` under a dispatch key."""
    _LIBRARY.impl(operator, kernel, key)


def define_plain(schema: str, formula: Callable[..., Any]) -> Any:
    """Define an operator without a gradient: its schema, and the formula that serves by default."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    implement(name, "CompositeExplicitAutograd", formula)
    return getattr(torch.ops.mtkd, name).default


def define(
    name: str,
    arguments: str,
    *,
    differentiable: Sequence[str],
    formula: Callable[..., Tensor],
    gradient: Callable[..., Gradients],
    saved: Callable[..., Tensor] | None = None,
    spared: Sequence[str] = (),
) -> Loss:
    """Define a loss's operators.

    Args:
        name: the loss's name, a valid identifier.
        arguments: schema of the arguments, beginning with ``Tensor? mask, int[] dims``.
        differentiable: names of the arguments that receive gradients.
        formula: ``formula(*arguments) -> matrix`` in plain PyTorch.
        gradient: ``gradient(grad, *arguments) -> gradients`` in plain PyTorch, in closed form,
            one entry a differentiable argument (None where that argument is None).
        saved: ``saved(*arguments)`` makes an empty tensor of the shape and dtype of what kernels
            save for their backward; nothing is saved when it is not given.
        spared: names of the differentiable arguments whose gradients need not be given room in
            ``<name>_value_and_grad_out``, beside those of arguments that may be None.

    Returns:
        The operators, to be called with positional arguments.
    """
    names = tuple(argument.split()[-1] for argument in arguments.split(", "))
    positions = tuple(names.index(argument) for argument in differentiable)
    _define_schemas(name, arguments, differentiable, spared)

    def nothing(*args: Any) -> Tensor:
        return args[positions[0]].new_empty(0)  # type: ignore[no-any-return]

    formulas = Formulas(formula, gradient, saved or nothing, positions)
    operators = (getattr(torch.ops.mtkd, name + suffix).default for suffix in _SUFFIXES.values())
    handles = dict(zip(_SUFFIXES, operators, strict=True))
    handles["backward"] = as_tuple(handles["backward"])
    loss = Loss(name, names, positions, formulas=formulas, **handles)
    _register_formulas(loss)
    _register_autograd(loss)
    return loss


def _define_schemas(
    name: str, arguments: str, differentiable: Sequence[str], spared: Sequence[str]
) -> None:
    gradients = ", ".join(["Tensor"] * len(differentiable))
    outputs = []
    for alias, argument in zip("abcdefgh", differentiable, strict=False):
        optional = "?" if argument in spared or f"Tensor? {argument}," in arguments else ""
        outputs.append(f"Tensor({alias}!){optional} {argument}_grad")
    for schema in (
        f"{name}({arguments}) -> (Tensor, Tensor)",
        f"{name}_backward(Tensor grad, Tensor saved, {arguments}, bool[] output_mask)"
        f" -> ({gradients})",
        f"{name}_value_and_grad(Tensor coefficient, {arguments}, bool[] output_mask)"
        f" -> (Tensor, {gradients})",
        f"{name}_value_and_grad_out(Tensor coefficient, {arguments}, {', '.join(outputs)})"
        f" -> Tensor",
        f"{name}_sum(Tensor coefficient, {arguments}) -> Tensor",
    ):
        for library in (_LIBRARY, _COMPILED_CUDA):
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def _register_formulas(loss: Loss) -> None:
    def weighted_sum(coefficient: Tensor, *args: Any) -> Tensor:
        return (coefficient * spare_infinite(coefficient, loss.forward(*args)[0])).sum()

    loss.implement(
        "CompositeExplicitAutograd",
        forward=loss.formulas.forward,
        backward=loss.formulas.backward,
        value_and_grad=loss.formulas.value_and_grad,
        value_and_grad_out=loss.formulas.value_and_grad_out,
        sum=weighted_sum,
    )


def _register_autograd(loss: Loss) -> None:
    formulas = loss.formulas

    def kernel(operator: Any, formula: Any, function: Any) -> Callable[..., Any]:
        def dispatch(*args: Any) -> Any:
            if _transforming():
                return formula(*args)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return function(*args)
            with _below_autograd():
                return operator(*args)

        return dispatch

    def outside_autocast(operator: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with torch._C._DisableAutocast():  # formulas and drivers choose their own precision
                return operator(*args)

        return call

    loss.eager["forward"] = kernel(loss.forward, formulas.forward, _forward_function(loss))
    loss.eager["sum"] = kernel(loss.sum, formulas.sum, _sum_function(loss))
    roles = {role: outside_autocast(getattr(loss, role)) for role in _SUFFIXES}
    for key in ("AutocastCPU", "AutocastCUDA"):
        loss.implement(key, **roles)
    loss.implement(
        "Autograd",
        backward=kernel(loss.backward, formulas.backward, formulas.backward),
        **loss.eager,
    )


def _transforming() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _forward_function(loss: Loss) -> Callable[..., tuple[Tensor, Tensor]]:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
            with _below_autograd():
                matrix, saved = loss.forward(*args)
            ctx.mark_non_differentiable(saved)
            _save(ctx, args, saved)
            return matrix, saved

        @staticmethod
        def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
            args, (saved,) = _restore(ctx)
            wanted = [ctx.needs_input_grad[position] for position in loss.differentiable]
            return _spread(loss, loss.backward(grad, saved, *args, wanted), wanted)

    return Forward.apply


def _sum_function(loss: Loss) -> Callable[..., Tensor]:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, coefficient: Tensor, *args: Any) -> Tensor:
            wanted = [ctx.needs_input_grad[1 + position] for position in loss.differentiable]
            pairs = zip(loss.differentiable, wanted, strict=True)
            ctx.half = any(want and _is_half(args[position]) for position, want in pairs)
            with _below_autograd():
                if ctx.half:  # gradients stored before the loss scale is known would underflow
                    matrix, *kept = loss.forward(*args)
                else:
                    matrix, *kept = loss.value_and_grad(coefficient, *args, wanted)
                matrix = spare_infinite(coefficient, matrix)
                _save(ctx, (coefficient, *args), matrix, *kept)
                return (coefficient * matrix).sum()

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
            (coefficient, *args), (matrix, *kept) = _restore(ctx)
            wanted = [ctx.needs_input_grad[1 + position] for position in loss.differentiable]
            if torch.is_grad_enabled():  # a graph of this pass is wanted: the formulas have one
                matrix, *kept = loss.forward(*args)
                matrix = spare_infinite(coefficient, matrix)
            if torch.is_grad_enabled() or ctx.half:
                kept = list(loss.backward(upstream * coefficient, *kept, *args, wanted))
            else:
                kept = _scaled(kept, upstream)
            to_coefficient = upstream * matrix if ctx.needs_input_grad[0] else None
            return (to_coefficient, *_spread(loss, kept, wanted))

    return Sum.apply


def _save(ctx: Any, args: Sequence[Any], *more: Tensor) -> None:
    """Save an operator's arguments, lists of tensors among them, and what its kernel made."""
    ctx.lists = {i: len(arg) for i, arg in enumerate(args) if _are_tensors(arg)}
    ctx.settings = [
        None if isinstance(arg, Tensor) or i in ctx.lists else arg for i, arg in enumerate(args)
    ]
    tensors = [arg if isinstance(arg, Tensor) else None for arg in args]
    ctx.save_for_backward(*tensors, *more, *(x for i in ctx.lists for x in args[i]))


def _restore(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    tensors, settings = list(ctx.saved_tensors), ctx.settings
    args = [s if t is None else t for t, s in zip(tensors, settings, strict=False)]
    for i, length in reversed(ctx.lists.items()):
        args[i] = tensors[len(tensors) - length :]
        del tensors[len(tensors) - length :]
    return args, tuple(tensors[len(settings) :])


def _are_tensors(argument: Any) -> bool:
    return isinstance(argument, (list, tuple)) and any(isinstance(x, Tensor) for x in argument[:1])


def _spread(loss: Loss, gradients: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
    spread: list[Tensor | None] = [None] * len(loss.arguments)
    for position, grad, want in zip(loss.differentiable, gradients, wanted, strict=True):
        if want:
            spread[position] = grad
    return tuple(spread)


def _is_half(argument: Tensor | None) -> bool:
    return argument is not None and argument.dtype == torch.float16


def _scaled(gradients: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    if type(upstream) is not Tensor or _is_batched(upstream) or _graph_is_kept():
        # traced, one of several, or a later pass wants the stored gradients
        return [upstream * grad for grad in gradients]
    torch.ops.mtkd.scale_([grad for grad in gradients if grad.numel()], upstream)
    return list(gradients)


def _scale(tensors: Sequence[Tensor], scale: Tensor) -> None:
    if scale.device.type == "cpu" and float(scale) == 1.0:  # read where it costs no wait
        return
    for tensor in tensors:
        tensor.mul_(scale)


implement("scale_", "CompositeExplicitAutograd", _scale)
