"""The command line: exit codes, JSON, dry runs, and how fast --help answers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_tpp.cli import app
from hf_tpp_conversion import Conversion, Partition, convert
from tests.conversion.models import architecture, bits, write_hf

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf", "mixtral", architecture("mixtral"))


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_there_and_back(hf, tmp_path):
    code, output = call("convert", hf, tmp_path / "m", "--to", "megatron", "--tp", 2, "--pp", 2, "--ep", 2, "--json")
    assert code == 0
    assert json.loads(output)["written"] is True
    assert call("convert", tmp_path / "m", tmp_path / "l", "--to", "megatron", "--format", "legacy", "--tp", 4)[0] == 0
    assert call("convert", tmp_path / "l", tmp_path / "back", "--to", "hf")[0] == 0
    assert bits(tmp_path / "back") == bits(hf)
    code, output = call("verify", tmp_path / "l", hf, "--json")
    assert (code, json.loads(output)["same"]) == (0, True)


def test_verify_says_what_differs(hf, tmp_path):
    other = write_hf(tmp_path / "other", "mixtral", architecture("mixtral"), seed=1)
    code, output = call("verify", hf, other, "--json")
    assert code == 1
    assert "has other values in" in json.loads(output)["differences"][0]
    assert call("verify", hf, tmp_path / "nowhere")[0] == 2


def test_inspect(hf, tmp_path):
    convert(Conversion(hf, tmp_path / "m", "megatron", "legacy", partition=Partition(tp=2, pp=2)))
    code, output = call("inspect", tmp_path / "m", "--json")
    found = json.loads(output)
    assert code == 0
    assert (found["format"], found["family"], found["layout"]["tp"], found["layout"]["pp"]) == (
        "legacy",
        "mixtral",
        2,
        2,
    )
    assert found["parameters"] == json.loads(call("inspect", hf, "--json")[1])["parameters"]
    assert "decoder.layers.*.mlp" in call("inspect", hf)[1]


def test_a_dry_run_writes_nothing(hf, tmp_path):
    code, output = call("convert", hf, tmp_path / "m", "--to", "megatron", "--dry-run")
    assert code == 0
    assert "would be written" in output
    assert ".metadata" in output
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_refusals_exit_with_2(hf, tmp_path):
    code, output = call("convert", hf, tmp_path / "m", "--to", "megatron", "--tp", 3, "--json")
    assert code == 2
    assert json.loads(output)["error"] == "ConfigurationError"
    assert call("convert", hf, tmp_path / "m", "--to", "nonsense")[0] == 2
    assert call("convert", hf, tmp_path / "m", "--to", "megatron", "--stages", "a,b")[0] == 2


def test_options_that_would_be_ignored_are_refused(hf, tmp_path):
    for options, words in [
        (("--to", "megatron", "--family", "llama"), "--family llama is for --to hf"),
        (("--to", "hf", "--tp", 2), "--to hf writes none"),
        (("--to", "hf", "--layer-spec", "te"), "--to hf writes none"),
        (("--to", "hf", "--format", "legacy"), "--to hf writes none"),
    ]:
        code, output = call("convert", hf, tmp_path / "m", *options, "--json")
        assert code == 2
        assert words in json.loads(output)["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_help_and_inspect_import_neither_torch_nor_transformers(hf):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}"}
    program = (
        "import sys; from typer.testing import CliRunner; from hf_tpp.cli import app; "
        f"codes = [CliRunner().invoke(app, a).exit_code for a in (['--help'], ['inspect', {str(hf)!r}])]; "
        "print(codes, {'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[0, 0] set()"


def test_help_answers_at_once():
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}"}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "hf_tpp.cli", "--help"], env=environment, capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(("script", "options"), [("hf_to_megatron.py", ["--tp", "2"]), ("megatron_to_hf.py", [])])
def test_the_scripts_do_the_same(hf, tmp_path, script, options):
    source = hf
    if script.startswith("megatron"):
        source = tmp_path / "m"
        convert(Conversion(hf, source, "megatron"))
    command = [sys.executable, str(ROOT / "conversion" / script), str(source), str(tmp_path / "out"), *options]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}"}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    assert call("verify", tmp_path / "out", hf)[0] == 0
