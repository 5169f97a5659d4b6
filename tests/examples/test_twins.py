"""Each example has a twin without parallelism: how few lines differ, and that both compute the same."""

import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.examples.twins import EXAMPLES, FOLDER, LAUNCHERS, ROOT, difference, launch, results, run_inside
from tests.ranks import run_ranks

SIZES = ("--tp", "2", "--pp", "2")
SELECTED = {("python", "raw_loop"), ("torchrun", "finetune_accelerate"), ("accelerate", "finetune_trainer")}
"""Of all ways to start all examples, these run by default."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_few_lines_differ(name):
    lines = difference(name)
    added = [line for line in lines if line.startswith("+")]
    removed = [line for line in lines if line.startswith("-")]
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 100
    assert 1 <= len(added) <= 5
    assert len(removed) <= len(added)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_readme_shows_the_difference(name):
    shown = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert "\n".join(difference(name)) + "\n" in shown


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the plain loop saved."""
    folder = tmp_path_factory.mktemp("pretrained")
    run_ranks(run_inside, 1, "raw_loop_plain", EXAMPLES["raw_loop"], folder, init=False, timeout=200)
    return folder / "out"


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The results of all plain twins."""
    found: dict[str, object] = {}
    for name, arguments in EXAMPLES.items():
        folder = prepared(tmp_path_factory.mktemp(name), model)
        (printed,) = run_ranks(run_inside, 1, f"{name}_plain", arguments, folder, init=False, timeout=200)
        found[name] = results(printed, folder)
    return found


def prepared(folder: Path, model: Path) -> Path:
    shutil.copytree(model, folder / "model")
    return folder


def compare(found: object, expected: object, folder: Path, name: str) -> None:
    assert len(expected) >= 6
    if isinstance(expected, str):
        assert found == expected
        return
    assert found == pytest.approx(expected, rel=1e-5, abs=1.1e-5)  # the loops print five digits
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.num_hidden_layers == 4


@pytest.mark.parametrize("name", EXAMPLES)
def test_parallel_equals_plain(name, model, plain, tmp_path):
    folder = prepared(tmp_path, model)
    printed = run_ranks(run_inside, 4, name, (*EXAMPLES[name], *SIZES), folder, timeout=200)
    compare(results(printed[0], folder), plain[name], folder, name)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        pytest.param(launcher, name, marks=[] if (launcher, name) in SELECTED else pytest.mark.slow)
        for launcher in LAUNCHERS
        for name in EXAMPLES
    ],
)
def test_is_started_by(launcher, name, model, plain, tmp_path):
    folder = prepared(tmp_path, model)
    num_processes, sizes = (1, ()) if launcher == "python" else (2, ("--pp", "2"))
    printed = launch(launcher, num_processes, name, (*EXAMPLES[name], *sizes), folder)
    compare(results(printed, folder), plain[name], folder, name)
