"""What a training call returns."""

from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from hf_tpp.errors import BatchError

__all__ = ["DeferredOutput", "LossOutput"]

DeferredOutput = MoeCausalLMOutputWithPast
"""Logits with a graph, and the mean router loss of models that have one."""


class LossOutput(CausalLMOutputWithPast):
    """A loss, and its logits only if `parallelize(train_logits=True)` asked for them: without, they are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.__dict__["_is_complete"] = True

    @property
    def logits(self) -> Any:
        """[rows, seq, vocabulary], without a graph."""
        value = self.__dict__.get("logits")
        if value is None and self.__dict__.get("_is_complete"):
            raise _missing_logits()
        return value

    @logits.setter
    def logits(self, value: Any) -> None:
        self.__dict__["logits"] = value

    def __getitem__(self, key: Any) -> Any:
        if key == "logits" and key not in self:
            raise _missing_logits()
        return super().__getitem__(key)  # type: ignore[no-untyped-call]

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dictionary."""
        if key == "logits" and key not in self:
            raise _missing_logits()
        return super().get(key, default)


def _missing_logits() -> BatchError:
    return BatchError(
        "a training call with labels gives no logits, which would have to travel to every rank: use "
        "parallelize(..., train_logits=True) for logits without a graph beside the loss, or leave labels out and "
        "compute the loss from the logits"
    )
