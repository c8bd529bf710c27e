"""What cannot work together, told before the first step."""

from typing import Any

from torch import nn

from ..nn.packed import PackedModule

SHARDED = "SHARDED_STATE_DICT"


def check_apart(targets: Any, model: nn.Module) -> None:
    """Raise ValueError where a teacher in the loop, which is frozen, is trained as well."""
    trained = {id(parameter) for parameter in model.parameters()}
    pairs = zip(getattr(targets, "names", ()), getattr(targets, "models", ()), strict=False)
    for name, teacher in pairs:
        if any(id(parameter) in trained for parameter in teacher.parameters()):
            raise ValueError(
                f"targets: expected teachers apart from the student, got {name}, which shares"
                " parameters with it; give one of them a copy"
            )


def check_savable(model: nn.Module) -> None:
    """Raise ValueError where a checkpoint could not hold a module: it has more than tensors."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"student, objective: expected state dicts of tensors alone, got {name}"
                f" ({type(module).__name__}), which has an extra state"
            )


def check_fsdp(accelerator: Any, model: nn.Module) -> None:
    """Raise ValueError where FSDP's loader would not know the keys of packed parameters."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    packed = [m for m in model.modules() if isinstance(m, PackedModule)]
    if plugin is None or not packed:
        return
    saved, lean = plugin.state_dict_type.name, bool(plugin.cpu_ram_efficient_loading)
    if saved != SHARDED or lean:
        raise ValueError(
            f'args: expected fsdp_config={{"state_dict_type": "{SHARDED}", ...}} without'
            f" cpu_ram_efficient_loading, since {type(packed[0]).__name__} has a key for each"
            f" teacher's part of a parameter, got {saved}"
            + (" with cpu_ram_efficient_loading" if lean else "")
        )
