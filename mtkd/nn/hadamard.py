"""Hadamard matrices: square, of entries 1 and -1, with orthogonal rows."""

from functools import cache, reduce
from itertools import count, islice
from math import isqrt

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor:
    r"""Build a Hadamard matrix, :math:`H H^\top = n I` with entries 1 and -1.

    Powers of two are Sylvester's; then come Paley's two constructions from a finite field, of
    orders :math:`q + 1` and :math:`2 (q + 1)` for odd prime powers q, and Kronecker products of
    smaller ones. They give all multiples of four up to 256 except 92, 116, 156, 172, 184, 188, 232
    and 236.

    Args:
        order: n, the rows and columns.

    Returns:
        ``(n, n)`` int8, on the CPU.

    Raises:
        ValueError: an order that these constructions do not give, with the nearest that they do.

    Source:
        Sylvester, 1867; Paley, "On Orthogonal Matrices", 1933.

    Example:
        >>> from mtkd.nn.hadamard import hadamard
        >>> hadamard(4).tolist()
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
        >>> matrix = hadamard(12).int()
        >>> (matrix @ matrix.T).diagonal().tolist() == [12] * 12
        True
    """
    check_order("order", order)
    matrices = [_factor(size) for size in _split(order) or ()]
    return reduce(torch.kron, matrices, torch.ones(1, 1, dtype=torch.int8))


def check_order(name: str, order: int, hint: str = "") -> None:
    """Raise ValueError unless `hadamard` builds this order; `hint` ends the message."""
    if order > 0 and _split(order) is not None:
        return
    above = next(size for size in count(max(order, 0) + 1) if _split(size) is not None)
    below = (size for size in range(order - 1, 0, -1) if _split(size) is not None)
    nearest = " and ".join(str(size) for size in (*islice(below, 1), above))
    expected = "an order of a Hadamard matrix by Sylvester, Paley or Kronecker products"
    raise ValueError(f"{name}: expected {expected}, got {order}; nearest: {nearest}{hint}")


@cache
def _split(order: int) -> tuple[int, ...] | None:
    """Orders of matrices whose Kronecker product has this order; None if there are none."""
    if order & (order - 1) == 0:
        return (2,) * (order.bit_length() - 1)
    if order % 4:
        return None
    if _paley(order):
        return (order,)
    for size in range(2, isqrt(order) + 1):
        if order % size == 0:
            left, right = _split(size), _split(order // size)
            if left is not None and right is not None:
                return left + right
    return None


def _factor(order: int) -> Tensor:
    """A matrix that is no Kronecker product: of order 2, or one of Paley's."""
    if order == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    prime, degree, doubled = _paley(order) or (0, 0, False)
    squares = _differences(prime, degree)
    border = torch.ones(1, len(squares), dtype=torch.int8)
    corner = border.new_zeros(1, 1)
    side = border.T if doubled else -border.T
    core = torch.cat([torch.cat([corner, border], 1), torch.cat([side, squares], 1)])
    unit = torch.eye(len(core), dtype=torch.int8)
    if not doubled:
        return unit + core
    off, on = border.new_tensor([[1, 1], [1, -1]]), border.new_tensor([[1, -1], [-1, -1]])
    return torch.kron(core, off) + torch.kron(unit, on)


def _paley(order: int) -> tuple[int, int, bool] | None:
    """Return p, k and whether it is the second construction, for the field of p^k elements."""
    for size, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        power = _prime_power(size) if size % 4 == remainder else None
        if power is not None:
            return (*power, remainder == 1)
    return None


def _prime_power(size: int) -> tuple[int, int] | None:
    """Return p and k with p^k = size, for a prime p and k > 0."""
    if size < 2:
        return None
    prime = next((p for p in range(2, isqrt(size) + 1) if size % p == 0), size)
    degree = 0
    while size % prime == 0:
        size, degree = size // prime, degree + 1
    return (prime, degree) if size == 1 else None


def _differences(prime: int, degree: int) -> Tensor:
    """Whether a - b is a square (1) or not (-1), 0 for a = b, over the field's elements: int8.

    Elements are polynomials over the integers modulo p; their digits to the base p number them.
    """
    size = prime**degree
    character = torch.zeros(size, dtype=torch.int8)
    powers = torch.tensor(_generator_powers(prime, degree))
    character[powers[0::2]], character[powers[1::2]] = 1, -1
    elements, index = torch.arange(size), torch.zeros(size, size, dtype=torch.int64)
    for position in range(degree):
        digit = elements // prime**position % prime
        index += (digit[:, None] - digit) % prime * prime**position
    return character[index]


def _generator_powers(prime: int, degree: int) -> list[int]:
    """Numbers of the powers of an element x that generates all others: squares are even powers.

    Tries what x^k may equal, until the powers of x return to 1 no earlier than they must.
    """
    size = prime**degree
    for reduced in range(1, size):
        if reduced % prime == 0:  # x would have no inverse
            continue
        low = [reduced // prime**position % prime for position in range(degree)]
        element, powers = [1] + [0] * (degree - 1), [1]
        for _ in range(size - 2):
            top = element[-1]
            shifted = [0, *element[:-1]]
            element = [(a + top * b) % prime for a, b in zip(shifted, low, strict=True)]
            number = sum(digit * prime**position for position, digit in enumerate(element))
            if number == 1:  # too early
                break
            powers.append(number)
        if len(powers) == size - 1:
            return powers
    raise AssertionError(f"{prime}^{degree} is no prime power")
