"""A mode in which operators whose result or shape the host has to wait for are an error."""

from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
    "aten::linalg_cholesky",
    "aten::_linalg_check_errors",
}


class NoSynchronisation(TorchDispatchMode):
    """Raise where a GPU would make the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in WAITING:
            raise AssertionError(f"{func.name()} makes the host wait")
        return func(*args, **kwargs or {})
