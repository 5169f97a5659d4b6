"""Hugging Face -> Megatron: `hf-tpp convert SRC DST --to megatron ...` as a script; same options without --to."""

import sys

from hf_tpp.cli import app

if __name__ == "__main__":
    app(["convert", "--to", "megatron", *sys.argv[1:]])
