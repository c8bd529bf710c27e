"""What cannot work together, told before the first step."""

from numbers import Real
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from ..nn import PhiS
from ..nn.moments import Estimator
from ..nn.packed import PackedModule
from .targets import TeacherModels

SHARDED = "SHARDED_STATE_DICT"


def check_norm(norm: Any) -> None:
    """Raise TypeError where targets' statistics are none."""
    if norm is not None and not isinstance(norm, Estimator):
        raise TypeError(f"norm: expected TeacherNorm, PhiS or None, got {type(norm).__name__}")


def check_estimated(norm: Estimator) -> None:
    """Raise ValueError where PhiS, which learns nothing while training, has not been estimated."""
    if isinstance(norm, PhiS) and not bool(norm.mean.any() or (norm.gain != 1).any()):
        raise ValueError(
            "norm: expected PhiS with statistics, got one without; call"
            " norm.estimate(store[i : i + 1000] for i in range(0, len(store), 1000)) beforehand"
        )


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless a setting is a number or None."""
    if value is not None and not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name}: expected a number or None, got {type(value).__name__}")


def check_apart(targets: Any, model: nn.Module) -> None:
    """Raise ValueError where a teacher in the loop, which is frozen, is trained as well."""
    if not isinstance(targets, TeacherModels):
        return
    trained = {id(parameter) for parameter in model.parameters()}
    for name, teacher in zip(targets.names, targets.models, strict=True):
        if any(id(parameter) in trained for parameter in teacher.parameters()):
            raise ValueError(
                f"targets: expected teachers apart from the student, got {name}, which shares"
                " parameters with it; give one of them a copy"
            )


def check_smoothing(args: TrainingArguments | None) -> None:
    """Raise ValueError where labels, which are not used, should be smoothed."""
    if args is not None and args.label_smoothing_factor:
        got = f"label_smoothing_factor={args.label_smoothing_factor}"
        raise ValueError(f"args: expected no smoothing of labels, which are not used, got {got}")


def check_arguments(args: TrainingArguments, accelerator: Any, model: Any) -> None:
    """Raise ValueError where a setting of the Trainer's has no meaning here, or would do harm."""
    if args.n_gpu > 1:
        raise ValueError(
            f"args: expected one process a GPU, got one for {args.n_gpu}; start it with torchrun,"
            " or set CUDA_VISIBLE_DEVICES"
        )
    if args.neftune_noise_alpha is not None and model.get_input_embeddings() is None:
        expected = "a student with embeddings of tokens for neftune_noise_alpha"
        raise ValueError(f"args: expected {expected}, got one without")
    if args.save_strategy != "no":
        check_savable(model)
    check_fsdp(accelerator, model)


def check_savable(model: nn.Module) -> None:
    """Raise ValueError where a checkpoint could not hold a module: it has more than tensors."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is nn.Module.get_extra_state:
            continue
        state = module.get_extra_state()
        if not isinstance(state, Tensor):
            raise ValueError(
                f"student, objective: expected state dicts of tensors alone, got {name}"
                f" ({type(module).__name__}), whose extra state is {type(state).__name__}"
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
