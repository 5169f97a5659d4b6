"""Megatron -> Hugging Face: `hf-tpp convert SRC DST --to hf ...` as a script; same options without --to."""

import sys

from hf_tpp.cli import app

if __name__ == "__main__":
    app(["convert", "--to", "hf", *sys.argv[1:]])
