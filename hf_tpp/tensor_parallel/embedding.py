"""An embedding whose vocabulary is cut over the tensor-parallel group."""

import inspect

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from hf_tpp.collectives.autograd import reduce_from_tensor_parallel
from hf_tpp.errors import UnsupportedModelError
from hf_tpp.plan.layout import Layout, padded_vocabulary
from hf_tpp.sharding import ShardSpec, shard_tensor
from hf_tpp.tensor_parallel.copying import SharesGroup

__all__ = ["VocabParallelEmbedding", "make_vocab_parallel"]


class VocabParallelEmbedding(SharesGroup, nn.Embedding):
    """Rank r holds rows [r * local, (r + 1) * local) of the table; rows past the vocabulary are padding.

    Each rank looks up the tokens that it holds, zeros elsewhere, and the rows are summed over the group.

    Args:
        num_embeddings: Entries of the full vocabulary.
        embedding_dim: Channels of a row.
        group: The tensor-parallel group; None for a group of one.
        padding_idx: Token whose row gets no gradient, as in `nn.Embedding`.
        device: Where the table lives.
        dtype: Its type.

    Shape:
        input [...] of token ids; output [..., embedding_dim], the same on every rank.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        group: dist.ProcessGroup | None,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding would make the whole table
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.group = group
        self.tp_rank, self.tp_size = (0, 1) if group is None else (group.rank(), group.size())
        self.layout: Layout = padded_vocabulary(num_embeddings, self.tp_size)
        local = self.layout.padded_local_size
        self.first_token = self.tp_rank * local
        self.num_tokens = self.layout.valid_size(self.tp_rank, self.tp_size)
        self.weight = nn.Parameter(torch.empty(local, embedding_dim, device=device, dtype=dtype))

    @staticmethod
    def check(embedding: nn.Embedding) -> None:
        """Raise UnsupportedModelError if rows are not just looked up, or by code that cannot be made parallel."""
        kind = type(embedding)
        if kind is not nn.Embedding and "super().forward(" not in inspect.getsource(kind.forward):
            raise UnsupportedModelError(
                f"{kind.__name__} looks rows up in a way of its own: use tp=1, or an nn.Embedding as input embedding"
            )
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise UnsupportedModelError(
                "an embedding with max_norm, scale_grad_by_freq or sparse gradients cannot be cut exactly over the "
                "vocabulary: switch these options off"
            )

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, *, group: dist.ProcessGroup | None) -> "VocabParallelEmbedding":
        """This rank's rows of a full embedding; every rank passes the same table.

        Raises:
            UnsupportedModelError: The embedding renormalises or scales its rows, or has sparse gradients.
        """
        cls.check(embedding)
        weight = embedding.weight
        local = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            group=group,
            padding_idx=embedding.padding_idx,
            device=weight.device,
            dtype=weight.dtype,
        )
        if weight.device.type != "meta":
            spec = ShardSpec("weight", tuple(weight.shape), 0, local.layout, local.tp_rank, local.tp_size)
            with torch.no_grad():
                local.weight.copy_(shard_tensor(weight, spec, weight.device, weight.dtype))
        return local

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up token ids [...]; returns [..., embedding_dim], the same on every rank."""
        token_ids = input
        if self.group is None:
            return F.embedding(token_ids, self.weight, self.padding_idx)
        local_ids = token_ids - self.first_token
        is_here = (local_ids >= 0) & (local_ids < self.num_tokens)
        is_token = (token_ids >= 0) & (token_ids < self.num_embeddings)
        # Tokens of other ranks look up row 0 and are masked; an id outside the vocabulary must fail as it does on one
        # process, so it stays out of range.
        rows = F.embedding(local_ids.where(is_here, 0).where(is_token, -1), self.weight, self._local_padding_idx)
        return reduce_from_tensor_parallel(rows.where(is_here.unsqueeze(-1), 0.0), self.group)

    @property
    def _local_padding_idx(self) -> int | None:
        if self.padding_idx is None:
            return None
        index = self.padding_idx - self.first_token
        return index if 0 <= index < self.num_tokens else None

    def extra_repr(self) -> str:
        """Sizes for `repr`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, tp_rank={self.tp_rank}, tp_size={self.tp_size}"


def make_vocab_parallel(embedding: nn.Embedding, group: dist.ProcessGroup | None) -> nn.Embedding:
    """The vocabulary-parallel counterpart of a full embedding; its weight is on the current default device, unfilled.

    Args:
        embedding: The full table; of a subclass, then the object itself is changed: its own forward goes on to do what
            it does with the rows (Gemma scales them), and only the look-up below it is parallel.
        group: The tensor-parallel group.

    """
    local = VocabParallelEmbedding(
        embedding.num_embeddings,
        embedding.embedding_dim,
        group=group,
        padding_idx=embedding.padding_idx,
        dtype=embedding.weight.dtype,
    )
    kind = type(embedding)
    if kind is nn.Embedding:
        return local
    embedding.weight = local.weight
    vars(embedding).update({key: value for key, value in vars(local).items() if not key.startswith("_")})
    embedding.__class__ = type(kind.__name__, (kind, VocabParallelEmbedding), {"__module__": kind.__module__})
    return embedding
