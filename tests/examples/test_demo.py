"""`examples/demo.py --quick`: everything that the demo promises to write and to print."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
STEPS = 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "examples/demo.py", "--quick", "--steps", str(STEPS), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


def test_every_step_is_logged_with_a_finite_loss(demo):
    _, printed = demo
    lines = re.findall(r"^step +(\d+)  loss (\d+\.\d+)  gradient norm (\d+\.\d+)", printed, re.MULTILINE)
    assert [int(step) for step, _, _ in lines] == list(range(STEPS))
    assert re.search(r"^loss +\d+\.\d+ [▁▂▃▄▅▆▇█]+ \d+\.\d+$", printed, re.MULTILINE)


def test_one_plain_process_computes_the_same_loss_and_norm(demo):
    _, printed = demo
    rows = re.findall(r"^  (loss|gradient norm) +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["loss", "gradient norm"]
    for _, parallel, plain, difference in rows:
        assert float(difference) < 1e-5
        assert float(parallel) == pytest.approx(float(plain), rel=1e-5)


def test_the_model_and_its_tokenizer_load_with_plain_transformers(demo):
    out, printed = demo
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert len(tokenizer) == model.config.vocab_size
    text = "def main(): ünïcode\n    return 1\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "plain transformers continues 'def '" in printed


@pytest.mark.parametrize("name", ["timeline.svg", "schedule.svg"])
def test_drawings_hold_every_compute_of_the_step(demo, name):
    out, printed = demo
    boxes = [e for e in ElementTree.parse(out / name).iter() if e.get("class", "").startswith("box")]
    assert len(boxes) == 4 * 4 * 2  # stages x microbatches x (forward, backward)
    assert "in flight per stage: 4 3 2 1" in printed
