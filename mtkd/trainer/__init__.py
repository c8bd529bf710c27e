"""The thin trainer: transformers' Trainer, with what distillation needs.

It needs transformers and accelerate: ``pip install "mtkd[train]"``.
"""

try:
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'mtkd.trainer: expected {error.name}, which is not installed; pip install "mtkd[train]"'
    ) from error

from .encoders import Encoder
from .export import export_student
from .guard import NonFiniteError
from .objectives import Objective
from .targets import StoreTargets, Targets, TeacherModels
from .trainer import DistillationTrainer

__all__ = [
    "DistillationTrainer",
    "Encoder",
    "NonFiniteError",
    "Objective",
    "StoreTargets",
    "Targets",
    "TeacherModels",
    "export_student",
]
