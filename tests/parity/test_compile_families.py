"""Compiled blocks of further families: experts, recurrences, latent attention, shared states and other oddities."""

from pathlib import Path

import pytest
import torch._dynamo

import hf_tpp
from hf_tpp.check.checking import Checker, ParallelRun
from hf_tpp.check.compare import RankRecord
from hf_tpp.check.joining import Place
from hf_tpp.check.outcome import Layout, Status
from hf_tpp.check.passes import record_run
from hf_tpp.check.tiny_model import Recipe, build_model, quiet
from hf_tpp.parallel_model import parallel_state

FAMILIES = [
    "bitnet",
    "bloom",
    "codegen",
    "cohere2",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "falcon",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gpt_bigcode",
    "gpt_oss",
    "gptj",
    "granitemoe",
    "granitemoehybrid",
    "jamba",
    "jetmoe",
    "lfm2",
    "mamba",
    "mamba2",
    "minimax",
    "mixtral",
    "mpt",
    "nanochat",
    "nemotron",
    "olmo2",
    "olmoe",
    "opt",
    "phi",
    "phi3",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "stablelm",
    "xglm",
    "zamba2",
]


def run_compiled(recipe: Recipe, layout: Layout, folder: Path, parts: tuple[str, ...]) -> ParallelRun:
    """Body of a rank: training alone, since nothing else is compiled."""
    torch._dynamo.reset()
    with quiet():
        compile = {"backend": "aot_eager"}
        model = hf_tpp.parallelize(build_model(recipe), tp=layout.tp, pp=layout.pp, compile=compile, verbose=False)
        state = parallel_state(model)
        place = Place(state.mesh.pp.rank, state.mesh.dp.rank, state.mesh.tp.rank)
        return ParallelRun(RankRecord(place, record_run(model, folder, ("train",)), dict(state.specs)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_one_process(family):
    with Checker(timeout=280.0, run_parallel=run_compiled) as checker:
        outcome = checker.check(family, Recipe(family), [Layout(tp=2), Layout(pp=2)])
    assert not outcome.problem
    found = {str(layout.layout): layout.parts["train"] for layout in outcome.layouts}
    assert {name: part.status for name, part in found.items()} == dict.fromkeys(found, Status.EXACT), found
