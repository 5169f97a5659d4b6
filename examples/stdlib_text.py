"""Real text on every machine: the source and docstrings of Python's own standard library."""

import os
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["read_stdlib", "tokenize", "train_tokenizer"]

_END = "<|endoftext|>"


def read_stdlib(num_characters: int) -> list[str]:
    """Modules at the top of the standard library, in the order of their names, until there is enough."""
    texts: list[str] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        if sum(map(len, texts)) >= num_characters:
            break
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return texts


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
