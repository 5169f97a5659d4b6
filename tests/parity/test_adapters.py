"""LoRA in parallel equals LoRA in one process, with PEFT before and after parallelize."""

from functools import partial

import pytest
from peft import IA3Config

from tests.parity.adapters import AdapterCase, assert_equal, build_plain, train, train_parallel
from tests.parity.test_parity import Pool, annotated

ORDERS = ("peft", "parallelize")
LAYOUTS = ({"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2})
CASES = [
    AdapterCase(model, first, **layout) for model in ("gpt2", "llama_gqa") for first in ORDERS for layout in LAYOUTS
]
short = partial(AdapterCase, steps=4)
HEAD = r".*\.(q_proj|down_proj)|lm_head|.*c_attn"
OF_BOTH_ORDERS = [
    {"model": "llama_gqa", "tp": 2, "pp": 2, "options": {"sequence_parallel": True}},
    {"model": "gpt2", "tp": 2, "options": {"sequence_parallel": True}, "checkpointing": True},
    {"model": "llama_one_kv", "tp": 2, "dp": 2, "config": {"target_modules": ["k_proj", "o_proj"]}},
    {"model": "gpt_neox", "tp": 2, "pp": 2, "config": {"use_rslora": True, "rank_pattern": {"dense": 5}}},
    {"model": "llama_gqa", "tp": 2, "pp": 2, "config": {"target_modules": HEAD}},
    {"model": "gpt2", "tp": 2, "pp": 2, "config": {"target_modules": HEAD}},
    {"model": "gpt2", "tp": 2, "pp": 2, "config": {"bias": "all"}},
    {"model": "gpt2", "tp": 2, "config": {"bias": "lora_only", "target_modules": ["c_attn", "mlp.c_proj"]}},
    {"model": "llama_gqa", "pp": 2, "config": {"layers_to_transform": [3], "target_modules": ["q_proj"]}},
    {"model": "llama_gqa", "tp": 2, "pp": 2, "config": {"layers_to_transform": [0], "target_modules": ["o_proj"]}},
    {"model": "llama_gqa", "tp": 2, "pp": 2, "config": {"modules_to_save": ["norm", "input_layernorm"]}},
    {"model": "llama_gqa", "tp": 2, "config": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}},
    {"model": "llama_gqa", "tp": 2, "pp": 2, "second": {"r": 2, "target_modules": ["v_proj", "o_proj"]}},
]
CASES += [short(first=ORDERS[number % 2], **case) for number, case in enumerate(OF_BOTH_ORDERS)]
CASES += [
    short("llama_gqa", tp=2, pp=2, config={"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    short("llama_gqa", tp=2, kind=IA3Config, config={"target_modules": ["v_proj"], "feedforward_modules": []}),
    short("llama_gqa", first="parallelize", tp=2, pp=2, config={"modules_to_save": ["lm_head", "embed_tokens"]}),
    short(
        "llama_gqa",
        first="parallelize",
        pp=2,
        kind=IA3Config,
        config={"target_modules": ["v_proj"], "feedforward_modules": []},
    ),
]


def run_cases(cases):
    return [annotated(str(case), train_parallel, case) for case in cases]


OTHERS = [short(first=ORDERS[1 - number % 2], **case) for number, case in enumerate(OF_BOTH_ORDERS)]
DEFAULT, SWEEP = Pool(CASES, run_cases), Pool(OTHERS, run_cases)


def compare(pool: Pool, index: int) -> None:
    case = pool.cases[index]
    assert_equal(case, train(build_plain(case), case, 0, 1), pool.of_case(index))


@pytest.mark.parametrize("index", [pytest.param(index, id=str(case)) for index, case in enumerate(CASES)])
def test_training(index):
    compare(DEFAULT, index)


@pytest.mark.slow
@pytest.mark.parametrize("index", [pytest.param(index, id=str(case)) for index, case in enumerate(OTHERS)])
def test_training_in_the_other_order(index):
    compare(SWEEP, index)
