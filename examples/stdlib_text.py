"""Real text on every machine: the source and docstrings of Python's own standard library."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["read_stdlib", "tokenize", "train_tokenizer"]

_END = "<|endoftext|>"


def read_stdlib(max_bytes: int) -> list[str]:
    """The modules at the top of the standard library, in the order of their names, up to a number of bytes."""

    def read() -> Iterator[str]:
        rest = max_bytes
        for path in sorted(Path(os.__file__).parent.glob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace")
            rest -= len(text)
            if rest < 0:
                return
            yield text

    return list(read())


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as GPT-2's, trained on `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=_END, eos_token=_END)


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All texts behind one another as one row of token ids, each ended by the end-of-text token."""
    rows = tokenizer([text + _END for text in texts])["input_ids"]
    return np.concatenate([np.asarray(row, dtype=np.uint16) for row in rows])
