"""Runs one function on several ranks: `hf_tpp.check.ranks`, with what the tests need loaded ahead."""

from hf_tpp.check.ranks import RankError, preload, run_ranks

__all__ = ["RankError", "run_ranks"]

preload("pytest", "tests.ranks")
