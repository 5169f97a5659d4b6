"""examples/pretrain_gpt.py, started as its users start it."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import megatron_arguments
from examples.text_data import Samples, build_tokenizer, load_samples
from hf_tpp.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "examples" / "pretrain_gpt.py")
LIMIT_S = 240
BATCH = ["--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "8"]
SIZES = ["--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4", *BATCH]
COMMON = [*SIZES, "--tokenizer-type", "ByteLevelTokenizer", "--distributed-backend", "gloo", "--log-interval", "1"]
WORDS = ["the", "gradient", "of", "a", "stage", "is", "sent", "to", "every", "rank", "before", "its", "loss"]


def write_text(file: Path, documents: int, seed: int) -> Path:
    generator = random.Random(seed)
    file.write_text("\n\n".join(" ".join(generator.choices(WORDS, k=20)) for _ in range(documents)))
    return file


def launch(*command: str, **environment: str) -> None:
    """Run to the end, or stop the launcher and all that it started."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate()
    assert process.returncode == 0, output


def torchrun(world_size: int, *arguments: str) -> None:
    launch("torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size), SCRIPT, *arguments)


def read_log(folder: Path, key: str) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {record["iteration"]: record[key] for record in records if key in record}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name the data."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder / "a.txt", 60, 0)
    write_text(folder / "b.txt", 40, 1)
    valid = write_text(folder / "held_out", 20, 2)
    paths = ["--train-data-path", str(folder / "*.txt"), "--valid-data-path", str(valid), "--eval-iters", "1"]
    return [*paths, "--data-cache-path", str(folder / "cache")]


LLAMA = ["--model", "llama", "--num-query-groups", "2", "--ffn-hidden-size", "96", "--learning-rate", "1e-2"]


@pytest.fixture(scope="module")
def finished(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations at tp=2, pp=2, with a checkpoint after four."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    sizes = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel"]
    schedule = ["--train-iters", "6", "--save-interval", "4", "--async-save", "--lr-warmup-iters", "2"]
    torchrun(4, *COMMON, *LLAMA, *text, *sizes, *schedule, "--num-microbatches", "4", "--save", str(folder))
    return folder


def test_the_loss_falls(finished: Path) -> None:
    losses = read_log(finished, "loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1] - 0.5
    assert all(math.isfinite(norm) and norm > 0 for norm in read_log(finished, "grad_norm").values())
    rates = read_log(finished, "learning_rate")
    assert rates[1] < rates[2] < rates[3] == 1e-2 > rates[4] > rates[5]


def test_resumes_at_other_parallel_sizes(finished: Path, text: list[str], tmp_path: Path) -> None:
    start = ["--load", str(finished / "step-00000004"), "--save", str(tmp_path / "run")]
    schedule = ["--train-iters", "6", "--lr-warmup-iters", "2"]
    torchrun(2, *COMMON, *LLAMA, *text, *schedule, *start, "--pipeline-model-parallel-size", "2")
    for key in ("loss", "grad_norm", "learning_rate"):
        before, after = read_log(finished, key), read_log(tmp_path / "run", key)
        assert after == pytest.approx({step: before[step] for step in (5, 6)}, rel=1e-4), key


def test_leaves_an_ordinary_checkpoint(finished: Path, text: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "huggingface")
    tokenizer = AutoTokenizer.from_pretrained(finished / "huggingface")
    rows = load_samples([text[3]], tokenizer, 32, cache=Path(text[-1]))
    batch = Samples(rows, None).batch(0, 8)
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    assert loss == pytest.approx(read_log(finished, "valid_loss")[6], rel=1e-4)


def test_starts_under_accelerate(text: list[str], tmp_path: Path) -> None:
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--main_process_port", "0"]
    run = ["--train-iters", "2", "--optimizer", "sgd", "--save", str(tmp_path), *COMMON, *text]
    launch("accelerate.commands.launch", *flags, SCRIPT, *run, ACCELERATE_USE_CPU="true")
    assert list(read_log(tmp_path, "loss")) == [1, 2]
    assert (tmp_path / "huggingface" / "config.json").is_file()


def parse(monkeypatch: pytest.MonkeyPatch, world_size: int, *flags: str) -> object:
    monkeypatch.setattr(megatron_arguments, "WORLD_SIZE", world_size)
    return megatron_arguments.parse_arguments([*COMMON, "--train-iters", "1", "--train-data-path", "x", *flags])


def test_computes_the_number_of_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, 4, "--tensor-model-parallel-size", "2")
    assert (args.data_parallel_size, args.num_microbatches) == (2, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--num-microbatches", "4"],
            r"--num-microbatches 4 contradicts --global-batch-size 8: 8 / \(--micro-batch-size 2 x 2 replicas "
            r"\(world size 4 / \(tp 1 x pp 2\)\)\) = 2",
        ),
        (["--global-batch-size", "6"], r"--global-batch-size 6 is no multiple of --micro-batch-size 2 x 2 .* = 4"),
        (["--tensor-model-parallel-size", "3"], "tp=3 x pp=2 = 6 ranks do not divide the world of 4"),
        (["--tensor-model-parallel-size", "2", "--sequence-parallel", "--seq-length", "7"], "use a multiple of 2"),
        (["--tokenizer-type", "SentencePieceTokenizer"], "needs --tokenizer-model"),
        (["--save-interval", "5"], "add --save FOLDER"),
    ],
)
def test_refuses_contradictions(monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        parse(monkeypatch, 4, "--pipeline-model-parallel-size", "2", *flags)


def test_refuses_sizes_beside_a_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = parse(monkeypatch, 1, "--model", str(tmp_path))
    with pytest.raises(SystemExit, match="leave out --num-layers, --hidden-size, --num-attention-heads"):
        megatron_arguments.build_config(args, build_tokenizer("ByteLevelTokenizer", None))


@pytest.mark.parametrize(("name", "attribute"), [("gpt2", "n_inner"), ("llama", "intermediate_size")])
def test_builds_a_configuration(monkeypatch: pytest.MonkeyPatch, name: str, attribute: str) -> None:
    args = parse(monkeypatch, 1, "--model", name)
    config = megatron_arguments.build_config(args, build_tokenizer("ByteLevelTokenizer", None))
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (4, 32, 4)
    assert (config.max_position_embeddings, config.vocab_size, getattr(config, attribute)) == (32, 257, 128)


def test_byte_level_tokenizer_knows_every_byte(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("ByteLevelTokenizer", None)
    tokenizer.save_pretrained(tmp_path)
    text = "".join(map(chr, range(1, 600))) + "  naïve 東京 🙂\r\n\t"
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = each(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert each.decode(ids, clean_up_tokenization_spaces=False) == text
        assert (len(each), each.eos_token_id) == (257, 256)


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    file = write_text(tmp_path / "text", 50, 3)
    prefix = str(tmp_path / "sp")
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(file), model_prefix=prefix, **options)
    expected = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model").encode("every  rank")
    tokenizer = build_tokenizer("SentencePieceTokenizer", f"{prefix}.model")
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert each("every  rank", add_special_tokens=False)["input_ids"] == expected
        assert each.eos_token_id == 2


def test_samples_are_packed_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("ByteLevelTokenizer", None)
    file = tmp_path / "text"
    file.write_text("\n\n".join(f"document {index}" for index in range(40)))
    rows = load_samples([str(file)], tokenizer, 16, cache=tmp_path / "cache")
    text = tokenizer.decode(Samples(rows, None).batch(0, len(rows)).reshape(-1))
    assert text.startswith("document 0<|endoftext|>document 1<|endoftext|>document 2")
    more = load_samples([str(file)], tokenizer, 16, cache=tmp_path / "other", num_workers=2)
    assert more[:]["input_ids"].equal(rows[:]["input_ids"])
    samples = Samples(rows, seed=1)
    epoch = samples.batch(0, len(samples))
    assert {tuple(row.tolist()) for row in epoch} == {tuple(row.tolist()) for row in rows["input_ids"]}
    assert not epoch.equal(samples.batch(len(samples), len(samples))), "shuffled anew"
    assert torch.cat([samples.batch(3, 2), samples.batch(5, 2)]).equal(Samples(rows, seed=1).batch(3, 4))


def test_refuses_text_that_is_not_there(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("ByteLevelTokenizer", None)
    with pytest.raises(ConfigurationError, match="no file matches"):
        load_samples([str(tmp_path / "*.txt")], tokenizer, 16, cache=tmp_path)
    (tmp_path / "short").write_text("short")
    with pytest.raises(ConfigurationError, match="holds 6 tokens, less than one row of --seq-length 16"):
        load_samples([str(tmp_path / "short")], tokenizer, 16, cache=tmp_path)
