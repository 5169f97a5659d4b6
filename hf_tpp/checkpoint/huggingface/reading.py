"""Reading Hugging Face checkpoints by slices: a rank reads its shards from disk and nothing else.

Headers come first: every name, shape and type of the whole model is checked before anything of it is changed.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn

from hf_tpp.checkpoint.huggingface.buffers import computed_buffer, persistent_buffers
from hf_tpp.checkpoint.huggingface.conversion import KeyRenaming, ignored_keys, refuse_converted
from hf_tpp.checkpoint.huggingface.files import StoredTensor, list_tensors
from hf_tpp.checkpoint.huggingface.reader import SliceReader
from hf_tpp.errors import CheckpointError
from hf_tpp.sharding import ShardSpec, local_shape

__all__ = ["SafetensorsCheckpoint", "resolve_checkpoint"]

_SHOWN = 8


def resolve_checkpoint(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a checkpoint; one on the hub is downloaded first.

    Args:
        path_or_repo: A folder, or a name on the hub.
        revision: Branch, tag or commit on the hub.
        token: For a private repository.
        cache_dir: Where downloads are kept.
        local_files_only: Use what was downloaded before.

    Raises:
        CheckpointError: Neither a folder nor a repository that can be had.
    """
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: pass the folder that holds it")
    try:
        folder = snapshot_download(
            str(path_or_repo),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=["*.safetensors", "*.json"],
            ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path_or_repo)!r} is neither a folder nor a repository that can be downloaded "
            f"({str(error).partition(chr(10))[0]}): check the path, the name, the token and the network"
        ) from error
    return Path(folder)


class SafetensorsCheckpoint:
    """A `WeightSource` over a folder of safetensors files.

    Args:
        folder: The folder.
        base_model_prefix: transformers' name of the decoder in the model ("transformer" for GPT-2); names in the files
            may lack it, or have it where the model does not.
        tied: Name -> the canonical name of the weight that it shares.
        rename: From a name in the files to the name in the model.

    Raises:
        CheckpointError: No valid checkpoint.
    """

    def __init__(
        self,
        folder: str | Path,
        base_model_prefix: str = "",
        tied: Mapping[str, str] | None = None,
        rename: Callable[[str], str] | None = None,
    ) -> None:
        self.folder = folder = Path(folder)
        self._prefix = f"{base_model_prefix}." if base_model_prefix else ""
        self._tied = dict(tied or {})
        self._stored: dict[str, StoredTensor] = {}
        self._reader = SliceReader()
        self._plain_model: nn.Module | None = None  # for buffers that are in no file
        self._persistent: set[str] = set()
        for key, tensor in list_tensors(folder).items():
            name = rename(key) if rename else key
            if name in self._stored:
                raise CheckpointError(
                    f"{folder} has {self._stored[name].key!r} and {key!r} for the one weight {name!r}: delete one"
                )
            self._stored[name] = tensor

    @classmethod
    def open(
        cls,
        model: nn.Module,
        shapes: Mapping[str, tuple[int, ...]],
        canonical: Mapping[str, str],
        path_or_repo: str | Path,
    ) -> "SafetensorsCheckpoint":
        """Open the checkpoint for `model` and check that it holds it all.

        Args:
            model: The unsplit model on meta; only read.
            shapes: Canonical parameter name -> shape.
            canonical: Parameter name -> canonical name.
            path_or_repo: A folder, or a name on the hub.

        Raises:
            CheckpointError: The checkpoint does not hold the model.
            UnsupportedModelError: transformers would rearrange its tensors.
        """
        refuse_converted(model)
        tied = {name: first for name, first in canonical.items() if name != first}
        prefix = getattr(model, "base_model_prefix", "")
        found = cls(resolve_checkpoint(path_or_repo), prefix, tied, KeyRenaming(model))
        buffers = dict(persistent_buffers(model))
        found._plain_model, found._persistent = copy.deepcopy(model), set(buffers)
        dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *buffers.items())}
        wanted = dict(shapes) | {name: tuple(buffer.shape) for name, buffer in buffers.items()}
        found.check(wanted, dtypes, ignored_keys(model))
        return found

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype] | None = None,
        ignore_unexpected: Sequence[str] = (),
    ) -> None:
        """Check every name, shape and type of the whole model before anything is changed.

        Args:
            shapes: Canonical names of all parameters and persistent buffers -> shape in the unsplit model.
            dtypes: The type in which they are wanted, where it matters.
            ignore_unexpected: Regular expressions of names in the checkpoint that no parameter needs.

        Raises:
            CheckpointError: Something is missing, left over, of another shape or type, or a tie does not hold.
        """
        found = {name: self._find(name) for name in shapes}
        problems = [f"{name!r} is missing" for name, tensor in found.items() if tensor is None]
        for name, tensor in found.items():
            if tensor is not None:
                problems += tensor.differences(name, shapes[name], (dtypes or {}).get(name))
        used = {tensor.key for tensor in found.values() if tensor}
        for alias, name in self._tied.items():
            copy_, original = self._lookup(alias), found.get(name)
            if copy_ is not None and original is not None:
                used.add(copy_.key)
                problems += self._untied(copy_, original)
        problems += [
            f"{tensor.key!r} in {tensor.file.name} belongs to no parameter"
            for name, tensor in self._stored.items()
            if tensor.key not in used and not any(re.search(pattern, name) for pattern in ignore_unexpected)
        ]
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise CheckpointError(
                f"{self.folder} does not hold this model: {'; '.join(problems[:_SHOWN])}{more}. "
                f"Use the checkpoint's own configuration, or the checkpoint of this model"
            )

    def shard(self, spec: ShardSpec, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """This rank's shard of a parameter: only its slices are read, cast from one floating type to another.

        Raises:
            CheckpointError: The checkpoint has no such tensor, or one of another shape or kind.
        """
        tensor = self._find(spec.name)
        problems = [f"{spec.name!r} is missing"] if tensor is None else []
        problems += tensor.differences(spec.name, spec.full_shape, dtype) if tensor else []
        if problems or tensor is None:
            raise CheckpointError(f"{self.folder} does not hold this model: {'; '.join(problems)}")
        local = torch.zeros(local_shape(spec), device=device, dtype=dtype)
        for segment in spec.segments:  # in bands, straight into place: a whole segment in memory twice is too much
            self._reader.copy(spec.narrow(local, segment), tensor, spec.dim or 0, segment.start)
        return local

    def buffer(self, name: str, device: torch.device) -> torch.Tensor:
        """A buffer: read if the model stores it, else computed as the model does.

        Raises:
            CheckpointError: The checkpoint has no such tensor.
        """
        if self._plain_model is not None and name not in self._persistent:
            return computed_buffer(self._plain_model, name).to(device)
        tensor = self._find(name)
        if tensor is None or tensor.dtype is None:
            raise CheckpointError(f"{self.folder} has no buffer {name!r} that can be loaded: use another checkpoint")
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        self._reader.copy(values, tensor)
        return values

    def _find(self, name: str) -> StoredTensor | None:
        """The stored tensor for `name`, under the name of a weight tied to it if need be."""
        aliases = [alias for alias, first in self._tied.items() if first == name]
        return next(filter(None, map(self._lookup, [name, *aliases])), None)

    def _lookup(self, name: str) -> StoredTensor | None:
        return self._stored.get(name) or self._stored.get(
            name.removeprefix(self._prefix) if name.startswith(self._prefix) else self._prefix + name
        )

    def _untied(self, first: StoredTensor, second: StoredTensor) -> list[str]:
        if first.key == second.key or self._reader.equal(first, second):
            return []
        return [f"{first.key!r} and {second.key!r} are tied in the model but differ: set tie_word_embeddings=False"]
