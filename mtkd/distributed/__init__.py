"""Several processes: heads shared out by teacher, and losses reduced exactly over ranks."""

from .reduction import reduce_over_ranks
from .sharding import shard_evenly
from .teacher_parallel import TeacherParallel, keep_apart

__all__ = ["TeacherParallel", "keep_apart", "reduce_over_ranks", "shard_evenly"]
