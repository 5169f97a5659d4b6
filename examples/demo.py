"""hf_tpp in two minutes on a CPU: `make demo`, or `python examples/demo.py`.

this process   reads the source of Python's standard library and trains a tokenizer on it
8 processes    tp=2 x pp=4: train a small GPT-2, save it, then run one more step and record it
this process   loads the saved model with plain transformers, repeats that step alone, lets the model write,
               and draws the schedule that ran

Everything lands in demo_out/.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from recorded_step import draw, gather_timelines
from stdlib_text import read_stdlib, tokenize, train_tokenizer
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, get_cosine_schedule_with_warmup

import hf_tpp
from hf_tpp.parallel_model import parallel_state

TP, PP = 2, 4
MAX_NORM = 1.0
PROMPT = "def "


@dataclass(frozen=True)
class Sizes:
    """How much there is to do."""

    steps: int = 80
    layers: int = 8
    width: int = 128
    rows: int = 16
    tokens: int = 128
    microbatches: int = 8
    vocabulary: int = 1000
    characters: int = 3_000_000


QUICK = Sizes(steps=4, layers=4, width=32, rows=8, tokens=32, microbatches=4, vocabulary=400, characters=200_000)


def main() -> None:
    """The first process starts the eight; each of them comes here too, and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="where everything is written")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to see that it runs")
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    steps = options.steps or sizes.steps
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        train(sizes, steps, options.out)
    else:
        conduct(sizes, steps, options.out)


def conduct(sizes: Sizes, steps: int, out: Path) -> None:
    """What the first process does, before and after the eight."""
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    texts = read_stdlib(sizes.characters)
    tokenizer = train_tokenizer(texts, sizes.vocabulary)
    tokens = tokenize(texts, tokenizer)
    np.save(out / "tokens.npy", tokens)
    python = sys.version.split()[0]
    print(f"text       {len(texts)} modules of Python {python}, {len(tokens):,} tokens, vocabulary {len(tokenizer)}")
    print(f"processes  {TP * PP} on {os.cpu_count()} CPU cores, tensor parallel {TP} x pipeline {PP}", flush=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(TP * PP)]
    subprocess.run([*launcher, __file__, *sys.argv[1:]], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    tokenizer.save_pretrained(out / "model")
    result = json.loads((out / "result.json").read_text())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    compare(model, batch_of_step(tokens, sizes, steps), result)
    write(model, AutoTokenizer.from_pretrained(out / "model"))
    draw(result["timelines"], sizes.microbatches, out)
    print(f"\nthe model, for plain transformers   {out / 'model'}")
    print(f"the step that ran                   {out / 'timeline.svg'}")
    print(f"its schedule on paper               {out / 'schedule.svg'}")
    print(f"all of it took                      {time.perf_counter() - begin:.0f} s")


@record
def train(sizes: Sizes, steps: int, out: Path) -> None:
    """What each of the eight does."""
    tokens = np.load(out / "tokens.npy")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=sizes.vocabulary,
        n_positions=sizes.tokens,
        n_layer=sizes.layers,
        n_embd=sizes.width,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = AutoModelForCausalLM.from_config(config)
    model = hf_tpp.parallelize(model, tp=TP, pp=PP, num_microbatches=sizes.microbatches, device="cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 5, steps + steps // 10)
    is_printer = dist.get_rank() == 0
    losses: list[float] = []
    begin = time.perf_counter()
    for step in range(steps):
        loss, norm = backward(model, batch_of_step(tokens, sizes, step))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss)
        if is_printer and (step % max(1, steps // 10) == 0 or step == steps - 1):
            speed = (step + 1) * sizes.rows * sizes.tokens / (time.perf_counter() - begin)
            print(f"step {step:4d}  loss {loss:.4f}  gradient norm {norm:.3f}  {speed:,.0f} tokens/s", flush=True)
    model.save_pretrained(out / "model")

    state = parallel_state(model)
    assert state is not None
    state.calls.runner.record = True
    loss, norm = backward(model, batch_of_step(tokens, sizes, steps))
    timelines = gather_timelines(state)
    if is_printer:
        print(f"loss       {losses[0]:.4f} {sparkline(losses)} {losses[-1]:.4f}", flush=True)
        (out / "result.json").write_text(json.dumps({"loss": loss, "norm": norm, "timelines": timelines}))
    dist.destroy_process_group()


def batch_of_step(tokens: np.ndarray, sizes: Sizes, step: int) -> dict[str, torch.Tensor]:
    """Random pieces of the text; the same on every rank."""
    starts = np.random.default_rng(step).integers(0, len(tokens) - sizes.tokens, sizes.rows)
    input_ids = torch.tensor(np.stack([tokens[start : start + sizes.tokens] for start in starts]), dtype=torch.long)
    return {"input_ids": input_ids, "labels": input_ids}


def backward(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """A training step up to the clipped gradients: its loss and gradient norm. Nothing in it knows of ranks."""
    loss = model(**batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    return loss.item(), norm.item()


def compare(model: nn.Module, batch: dict[str, torch.Tensor], result: dict[str, Any]) -> None:
    """Repeat the recorded step in this one process."""
    loss, norm = backward(model.train(), batch)
    print("\nthe same batch                8 processes   1 process     relative difference")
    for name, ours, plain in (("loss", result["loss"], loss), ("gradient norm", result["norm"], norm)):
        print(f"  {name:<27} {ours:<13.7f} {plain:<13.7f} {abs(ours - plain) / plain:.1e}")


def write(model: Any, tokenizer: Any) -> None:
    """Let the plain model continue a prompt."""
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    length = min(60, model.config.n_positions - prompt["input_ids"].shape[1])
    written = model.eval().generate(
        **prompt, max_new_tokens=length, do_sample=True, temperature=0.6, top_k=20, pad_token_id=tokenizer.eos_token_id
    )
    print(f"\nplain transformers continues {PROMPT!r}:\n")
    print("\n".join(f"    {line}" for line in tokenizer.decode(written[0]).splitlines()))


def sparkline(values: list[float]) -> str:
    """A curve in one line of text, averaged to at most 40 characters."""
    bars = "▁▂▃▄▅▆▇█"
    means = [chunk.mean() for chunk in np.array_split(np.array(values), min(40, len(values)))]
    low, high = min(means), max(means)
    return "".join(bars[int((mean - low) / (high - low + 1e-9) * len(bars))] for mean in means)


if __name__ == "__main__":
    main()
