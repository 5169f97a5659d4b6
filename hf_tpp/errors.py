"""Every error that hf_tpp raises for a caller's mistake.

    HfTppError
    ├── ConfigurationError (ValueError)      sizes that cannot work: tp, pp, world size, stages, flags
    │   └── AlreadyParallelError             a second parallelize() on the same model
    ├── UnsupportedModelError (ValueError)   a model that cannot be split exactly
    ├── RankMismatchError (RuntimeError)     ranks of one job disagree: configuration, weights or batch
    ├── BatchError (ValueError)              a call of the model that cannot be run exactly
    ├── CheckpointError (ValueError)         files that do not hold what the model needs
    ├── ParityError (RuntimeError)           verify=True found a block that differs from the plain one
    └── ScheduleError (RuntimeError)         a list of pipeline actions that is incomplete or would hang

Every message says what is wrong, what was given, and what to do instead.
"""

__all__ = [
    "AlreadyParallelError",
    "BatchError",
    "CheckpointError",
    "ConfigurationError",
    "HfTppError",
    "ParityError",
    "RankMismatchError",
    "ScheduleError",
    "UnsupportedModelError",
]


class HfTppError(Exception):
    """Base class of everything that hf_tpp raises on purpose."""


class ConfigurationError(HfTppError, ValueError):
    """Sizes or flags that cannot work together."""


class AlreadyParallelError(ConfigurationError):
    """`parallelize` was called on a model that is parallel already."""


class UnsupportedModelError(HfTppError, ValueError):
    """The model cannot be split exactly, so it is refused instead of being split wrongly."""


class RankMismatchError(HfTppError, RuntimeError):
    """Ranks of the same job disagree about something that they must share."""


class BatchError(HfTppError, ValueError):
    """A call of the parallel model that cannot be run exactly."""


class CheckpointError(HfTppError, ValueError):
    """A checkpoint that does not hold what the model needs, or must not be opened."""


class ParityError(HfTppError, RuntimeError):
    """A block of the parallel model does not compute what the plain block does."""


class ScheduleError(HfTppError, RuntimeError):
    """A schedule that is incomplete, out of order, or would hang."""


def first_line(error: Exception) -> str:
    """What an error of another library says first, or its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
