"""Whole checks in processes of their own, and the command around them."""

import json
import os
import time
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner

from hf_tpp.check.checking import Checker, run_parallel
from hf_tpp.check.outcome import Layout, Status
from hf_tpp.check.ranks import RankError, World
from hf_tpp.check.sweep import sweep
from hf_tpp.check.tiny_model import Recipe
from hf_tpp.cli import app

TP2, PP2, TP2PP2 = Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)


@pytest.fixture(scope="module")
def checker():
    with Checker() as checker:
        yield checker


def test_an_exact_model(checker):
    outcome = checker.check("one", Recipe("llama"), [TP2, PP2])
    assert outcome.status is Status.EXACT
    assert [set(layout.parts) for layout in outcome.layouts] == [{"train", "evaluate", "generate", "save"}] * 2
    tp2, pp2 = outcome.layouts
    assert tp2.sharded > 0.95
    assert pp2.sharded is None
    cuts = {row.module: (row.cut, row.layout) for row in tp2.plan}
    assert cuts["model.layers.*.self_attn.q_proj"] == ("column", "[4 x 16]")
    assert cuts["model.layers.*.mlp.down_proj"][0] == "row"
    assert cuts["model.embed_tokens"][0] == cuts["lm_head"][0] == "vocabulary"
    assert cuts["model.norm"] == ("replicated", "")
    assert {row.cut for row in pp2.plan} == {"replicated"}


def test_a_refused_layout(checker):
    config = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    recipe = Recipe("llama", config=config | {"intermediate_size": 64, "vocab_size": 61})
    outcome = checker.check("three heads", recipe, [TP2, PP2, Layout(pp=4)])
    tp2, pp2, pp4 = outcome.layouts
    assert (tp2.status, pp2.status, pp4.status) == (Status.REFUSED, Status.EXACT, Status.REFUSED)
    assert pp4.parts["train"].kind == "ConfigurationError"
    assert "2" in pp4.parts["train"].reason
    assert "3" in tp2.parts["train"].reason


def test_a_model_that_cannot_be_built(checker):
    outcome = checker.check("odd", Recipe("llama", config={"hidden_size": 50, "num_attention_heads": -1}), [TP2])
    assert outcome.status is Status.ERROR
    assert "the plain model: rank 0 raised" in outcome.problem


def test_a_sweep_of_two_families_side_by_side():
    results = {name: result for name, result, _ in sweep(["gpt2", "bert"], jobs=2)}
    assert results["gpt2"].outcome.status is Status.EXACT
    assert len(results["gpt2"].outcome.layouts) == 4
    assert results["bert"].outcome.status is Status.REFUSED


# --- a world survives its calls ---------------------------------------------------------------------------------------


def sum_and_pid():
    value = torch.full((1,), float(torch.distributed.get_rank()))
    torch.distributed.all_reduce(value)
    return value.item(), os.getpid()


def fail():
    raise ValueError("no")


def hang(rank):
    if torch.distributed.get_rank() == rank:
        time.sleep(600)


def die():
    os._exit(3)


def test_ranks_are_kept_after_an_error_and_replaced_after_a_hang_or_a_death():
    with World(2) as world:
        first = world.run(sum_and_pid)
        assert [result[0] for result in first] == [1.0, 1.0]
        with pytest.raises(RankError, match="no"):
            world.run(fail)
        assert world.run(sum_and_pid) == first
        with pytest.raises(RankError, match="rank 1 did not finish within 2 s"):
            world.run(hang, 1, timeout=2.0)
        second = world.run(sum_and_pid)
        assert second[0][1] != first[0][1]
        with pytest.raises(RankError, match="exit code 3"):
            world.run(die)
        assert world.run(sum_and_pid)[0][0] == 1.0


def crash(*_):
    os._exit(5)


def test_a_crash_in_parallel_is_an_error_of_its_layout():
    with Checker(run_parallel=crash) as checker:
        outcome = checker.check("crash", Recipe("gpt2"), [TP2])
    part = outcome.layouts[0].parts["train"]
    assert (part.status, part.kind) == (Status.ERROR, "ChildProcessError")
    assert "exit code 5" in part.reason


def fail_in_evaluation(model, record, folder):
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("out of step")
    torch.distributed.barrier()


def run_failing_on_one_rank(*arguments):
    with patch("hf_tpp.check.passes._evaluate", fail_in_evaluation):
        return run_parallel(*arguments)


def test_an_error_on_one_rank_ends_the_run_at_once():
    with Checker(run_parallel=run_failing_on_one_rank) as checker:
        (layout,) = checker.check("out of step", Recipe("gpt2"), [TP2]).layouts
    assert layout.seconds < 20
    assert set(layout.parts) == {"train", "evaluate"}
    assert layout.parts["train"].status is Status.EXACT
    assert layout.parts["evaluate"].status is Status.ERROR
    assert layout.parts["evaluate"].reason.startswith("out of step")


def hang_in_parallel(*_):
    hang(1)


def test_a_hang_in_parallel_says_where():
    with Checker(timeout=15.0, run_parallel=hang_in_parallel) as checker:
        checker.check("warm", Recipe("gpt2"), [])
        part = checker.check("hang", Recipe("gpt2"), [TP2]).layouts[0].parts["train"]
    assert part.status is Status.ERROR
    assert part.reason.startswith("rank 1 did not finish within 15 s; rank 1 was in ")


# --- hf-tpp check -----------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def test_command_on_an_exact_model():
    result = run("gpt2", "--tp", 2, "--pp", 1)
    assert result.exit_code == 0, result.output
    assert "GPT2LMHeadModel, shrunk to" in result.output
    assert "transformer.h.*.attn.c_attn" in result.output
    assert "[4 x 16 | 4 x 16 | 4 x 16]" in result.output


def test_command_as_json_on_a_folder_with_a_tiny_config(tmp_path):
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 64}
    config = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 61, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run(tmp_path, "--json", "--tiny-config", tmp_path / "config.json")
    assert result.exit_code == 1, result.output
    layouts = {(entry["tp"], entry["pp"]): entry["parts"]["train"] for entry in json.loads(result.stdout)["layouts"]}
    assert layouts[1, 2]["status"] == "exact"
    assert layouts[2, 1]["status"] == layouts[2, 2]["status"] == "refused"
    assert layouts[2, 1]["kind"] == "ConfigurationError"


@pytest.mark.parametrize("arguments", [("./nothing-here",), ("gpt2", "--tp", 1, "--pp", 1), ("gpt2", "--tp", 0)])
def test_command_on_bad_input(arguments):
    assert run(*arguments).exit_code == 2


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
import pathlib
import torch

class OwnMLP(torch.nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.wide = torch.nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.tight = torch.nn.Linear(sizes.intermediate_size, sizes.hidden_size)

    def forward(self, x):
        return self.tight(torch.nn.functional.silu(self.wide(x)))

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    pathlib.Path({marker!r}).touch()

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OwnMLP(config)
"""


def test_remote_code_runs_only_when_asked_for(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    folder = tmp_path / "own_model"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(REMOTE.format(marker=str(marker)))
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96, "num_hidden_layers": 6}
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names, "vocab_size": 99, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    result = run(folder)
    assert result.exit_code == 2
    assert "--trust-remote-code" in result.output
    assert not marker.exists()
    result = run(folder, "--trust-remote-code", "--json", "--pp", 1)
    assert marker.exists()
    (layout,) = json.loads(result.stdout)["layouts"]
    assert layout["parts"]["train"]["status"] == "exact", layout
    rows = {row["module"]: (row["cut"], row["found_by"]) for row in layout["plan"]}
    assert rows["model.layers.*.mlp.wide"] == ("column", "probe")
    assert rows["model.layers.*.mlp.tight"] == ("row", "probe")
    assert rows["model.layers.*.self_attn.q_proj"] == ("column", "names")
    assert rows["model.embed_tokens"] == ("vocabulary", "")
