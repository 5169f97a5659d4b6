"""Text for `pretrain_gpt.py`: tokenizers, and packed samples in an order that depends on nothing but the seed."""

import glob
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from hf_tpp.errors import ConfigurationError

__all__ = ["Samples", "build_tokenizer", "load_samples"]

END_OF_TEXT = "<|endoftext|>"
CACHE = Path("~/.cache/hf_tpp").expanduser()


def build_tokenizer(kind: str, source: str | None) -> Any:
    """A tokenizer that ends documents with its `eos_token`.

    Args:
        kind: ByteLevelTokenizer, SentencePieceTokenizer or HuggingFaceTokenizer.
        source: The SentencePiece .model file; the tokenizer's folder or hub name.
    """
    if kind == "ByteLevelTokenizer":
        return _byte_level_tokenizer()
    tokenizer = _sentencepiece_tokenizer(source) if kind == "SentencePieceTokenizer" else _load_tokenizer(source)
    if tokenizer.eos_token_id is None:
        raise ConfigurationError(
            f"the tokenizer {source} has no end-of-sequence token to put between documents: use another"
        )
    return tokenizer


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """The 256 bytes and an end-of-text token: nothing to train, nothing unknown."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _sentencepiece_tokenizer(source: str | None) -> Any:
    if source is None or not Path(source).is_file():
        raise ConfigurationError(
            f"--tokenizer-model {source} is not a file: SentencePieceTokenizer needs the .model file"
        )
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=source)
    ids = {"unk_token": model.unk_id(), "bos_token": model.bos_id(), "eos_token": model.eos_id()}
    special = {name: model.id_to_piece(index) for name, index in ids.items() if index >= 0}
    return SentencePieceBackend(vocab_file=source, **special)


def _load_tokenizer(source: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--tokenizer-model {source} is no tokenizer's folder or hub name: {error}") from error


def load_samples(
    paths: Sequence[str],
    tokenizer: Any,
    seq_length: int,
    *,
    split: str = "train",
    cache: Path | None = None,
    num_workers: int = 1,
) -> datasets.Dataset:
    """Tokenize documents and pack them into rows of exactly `seq_length` tokens; the result is kept in the cache.

    Args:
        paths: Text files or globs (documents are separated by blank lines), or one hub dataset: name or name:config.
        tokenizer: What tokenizes them; every document ends with its `eos_token`.
        seq_length: Tokens in a row. A rest of every 1000 documents that fills no row is dropped.
        split: Of a hub dataset.
        cache: Folder of one user.
        num_workers: Processes that tokenize; the rows do not depend on it.
    """
    cache = cache or CACHE
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = _load_text(paths, split, cache)
    end = tokenizer.eos_token_id

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens = tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"tokens": [[*document, end] for document in tokens]}

    def pack(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        flat = [token for document in rows["tokens"] for token in document]
        starts = range(0, len(flat) - seq_length + 1, seq_length)
        return {"input_ids": [flat[start : start + seq_length] for start in starts]}

    # Fingerprints of our own: every process must find in the cache what the first one put there.
    name = hashlib.sha256(f"{text._fingerprint} {_digest(tokenizer)}".encode()).hexdigest()[:32]
    workers = min(num_workers, max(1, len(text)))
    tokens = text.map(tokenize, batched=True, num_proc=workers, remove_columns=text.column_names, new_fingerprint=name)
    packed = tokens.map(pack, batched=True, remove_columns=["tokens"], new_fingerprint=f"{name}-{seq_length}")
    if not len(packed):
        count = sum(len(row) for row in tokens["tokens"])
        raise ConfigurationError(
            f"{', '.join(paths)} holds {count} tokens, less than one row of --seq-length {seq_length}"
        )
    return packed.with_format("torch")


def _load_text(paths: Sequence[str], split: str, cache: Path) -> datasets.Dataset:
    """One row per document in a column `text`."""
    files = sorted({file for path in paths for file in glob.glob(path, recursive=True) if Path(file).is_file()})  # noqa: PTH207
    if files:
        return datasets.load_dataset(
            "text", data_files=files, split="train", sample_by="paragraph", cache_dir=str(cache)
        )
    name, _, config = paths[0].partition(":")
    if len(paths) > 1 or name.startswith((".", "/")) or "*" in name:
        raise ConfigurationError(f"no file matches {', '.join(paths)}: pass text files, globs or one hub dataset")
    try:
        found = datasets.load_dataset(name, config or None, split=split, cache_dir=str(cache))
    except Exception as error:
        raise ConfigurationError(
            f"{paths[0]} is neither a text file nor a hub dataset with a split {split}: {error}"
        ) from error
    if "text" not in found.column_names:
        raise ConfigurationError(f"the dataset {paths[0]} has no column 'text', only {', '.join(found.column_names)}")
    return found


def _digest(tokenizer: Any) -> str:
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


class Samples:
    """An endless stream of rows, shuffled anew every epoch. Row k is the same however many ranks there are.

    Args:
        rows: What `load_samples` gave.
        seed: Of the order; None keeps it.
    """

    def __init__(self, rows: datasets.Dataset, seed: int | None) -> None:
        self._rows = rows
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, first: int, count: int) -> torch.Tensor:
        """Token ids of rows [first, first + count) of the stream."""
        indices = [self._index(position) for position in range(first, first + count)]
        return torch.stack([self._rows[index]["input_ids"] for index in indices])

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._rows))
        if self._seed is None:
            return offset
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = (epoch, torch.randperm(len(self._rows), generator=generator).tolist())
        return self._order[1][offset]
