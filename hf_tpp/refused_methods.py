"""What would quietly break a parallel model, and so is refused by name: copies, new sizes, further wrappers."""

from typing import Any, NoReturn

from hf_tpp.errors import ConfigurationError, UnsupportedModelError

__all__ = ["RefusedMethods"]


class RefusedMethods:
    """Methods of a model that cannot work on its shards."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a stage may hold neither embedding nor head.

        Raises:
            ConfigurationError: Always, but where transformers only asks for the embedding.
        """
        if not args and not kwargs:
            return self.get_input_embeddings()  # type: ignore[attr-defined]
        raise ConfigurationError(
            "resize_token_embeddings() was called on a parallel model, whose embedding and head lie on several ranks: "
            "call it before parallelize()"
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: every rank would upload.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "push_to_hub() of a parallel model would upload from every rank: call save_pretrained(folder) on all "
            "ranks, then huggingface_hub.upload_folder on one"
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: continuous batching calls the layers by itself.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            "generate_batch() calls the layers of a model by itself, and a parallel model has them on several ranks: "
            "use generate()"
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `generate_batch`."""
        self.generate_batch()

    def add_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: transformers' own way to adapters knows nothing of shards.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "add_adapter() and load_adapter() of transformers know nothing of shards: use peft's "
            "get_peft_model(model, config) or PeftModel.from_pretrained(model, folder)"
        )

    load_adapter = add_adapter

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UnsupportedModelError(
            f"a parallel {type(self).__name__} cannot be copied, since its messages belong to it alone: load the model "
            f"again and parallelize that one too (a frozen reference model, a moving average)"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedModelError(
            f"a parallel {type(self).__name__} cannot be pickled, since it holds one rank's part: use "
            f"save_pretrained() or hf_tpp.checkpoint.training, on all ranks"
        )

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> NoReturn:
        """Asked for by torch's DistributedDataParallel before it does anything."""
        raise ConfigurationError(
            "DistributedDataParallel around a parallel model would overwrite the shards of all ranks with those of the "
            "first: leave it out, gradients are averaged over the replicas already"
        )
