"""Every decoder-only family of transformers over a pipeline equals itself in one process, or is refused by name."""

import functools

import pytest

from hf_tpp.check.families import FamilyKind, causal_families, kind_of
from tests.parity.families import CONFIGS, FamilyCase, compare_all, parameter_names
from tests.ranks import RankError, run_ranks

CHUNK = 12
ODD = (
    "bloom",  # returns attention weights that must not be sent
    "gptj",
    "gemma3n_text",  # four-dimensional payload, shared keys and values, per-layer inputs
    "gemma4_text.shared_kv",
    "zamba2",  # blocks that share weights, and see the embeddings once more
    "mamba2",
    "deepseek_v4",  # four-dimensional payload
    "glm_moe_dsa",  # int32 top-k beside the hidden states
    "cpmant",  # one learned position bias for all blocks
    "zaya",  # a router's state beside the hidden states
    "falcon_h1",
    "nemotron_h",
    "inkling2_text",  # blocks see the outputs of several blocks before
    "llama.tied",
)
ROUTERS = [
    "dbrx",
    "deepseek_v4",
    "ernie4_5_moe",
    "flex_olmo",
    "flint",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "jamba",
    "jetmoe",
    "laguna",
    "mellum",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp_text",
]
REFUSED = {
    "hrm_text": "does not call its 4 blocks once each and in order (it called 0, 1, 2, 3, 0, ",
}
REFUSED_GENERATION = {
    "minimax": "keeps the state of a generation in a form of its own",
    "rwkv": "keeps the state of a generation in a form of its own",
}

USUAL = [FamilyCase(name) for name in ODD] + [FamilyCase("mixtral", routers=True, decodes=False)]
USUAL += [FamilyCase("gemma3n_text", checkpointing=True, decodes=False)]
USUAL += [FamilyCase(name, pp=4) for name in ("inkling2_text", "glm_moe_dsa", "zaya")]
ALL = [FamilyCase(name, pp) for pp in (2, 4) for name in CONFIGS]
ALL += [FamilyCase(name, pp=4, routers=True, decodes=False) for name in ROUTERS]
ALL += [FamilyCase(name, checkpointing=True, decodes=False) for name in CONFIGS]


def known(cases: list[FamilyCase]) -> list[FamilyCase]:
    return [case for case in cases if case.is_known]


@functools.cache
def _chunk(chosen: tuple[FamilyCase, ...]) -> list[list[tuple[list[str], set[str], str]]]:
    return run_ranks(compare_all, chosen[0].world_size, list(chosen), timeout=200.0)


def results(cases: list[FamilyCase], case: FamilyCase) -> list[tuple[list[str], set[str], str]]:
    """What each rank found; several cases share their processes."""
    alike = [other for other in cases if other.world_size == case.world_size]
    start = alike.index(case) // CHUNK * CHUNK
    chosen = tuple(alike[start : start + CHUNK])
    try:
        return [rank[chosen.index(case)] for rank in _chunk(chosen)]
    except RankError:
        return [rank[0] for rank in _chunk((case,))]


def check(cases: list[FamilyCase], case: FamilyCase) -> None:
    ranks = results(cases, case)
    assert [problem for problems, _, _ in ranks for problem in problems] == []
    expected = REFUSED.get(case.name)
    if expected is not None:
        assert all(refusal.startswith("UnsupportedModelError: ") and expected in refusal for *_, refusal in ranks)
        return
    expected = REFUSED_GENERATION.get(case.name) if case.decodes else None
    if expected is None:
        assert [refusal for *_, refusal in ranks if refusal] == []
    else:
        assert all(refusal.startswith("generate: UnsupportedModelError: ") for *_, refusal in ranks)
        assert all(expected in refusal for *_, refusal in ranks)
    assert set().union(*(held for _, held, _ in ranks)) == parameter_names(case)


@pytest.mark.parametrize("case", known(USUAL), ids=str)
def test_odd_families(case):
    check(known(USUAL), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", known(ALL), ids=str)
def test_all_families(case):
    check(known(ALL), case)


def test_refusals_name_what_and_why():
    (case,) = known([FamilyCase("hrm_text")]) or pytest.skip("no hrm_text in this transformers")
    check([case], case)


def test_the_table_knows_the_decoder_only_families():
    here = {name for name in causal_families() if kind_of(name) is FamilyKind.DECODER_ONLY}
    assert here <= CONFIGS.keys()
