"""Memory and throughput of conversions against `cp -r` of the same bytes on the same disk, and the time of `inspect`.

    python benchmarks/conversion.py --folder /tmp/bench --layers 32

Every contestant runs in a process of its own, after `sync`; both copies are synced to the disk within their time.
Peak memory is the process's own maximum resident set. The raw figures go to results/.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hf_tpp_conversion.families import FAMILIES
from hf_tpp_conversion.files.dtypes import ITEM_SIZES
from hf_tpp_conversion.files.safetensors import plan_safetensors
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.tensors import tensor_specs

ROOT = Path(__file__).parents[1]


def llama(layers: int, hidden: int, neurons: int, vocab: int) -> Architecture:
    """A Llama with heads of 128 channels; 32, 4096, 11008, 32000 is Llama 2 7B."""
    heads = hidden // 128
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=128,
        ffn_hidden_size=neurons,
        vocab_size=vocab,
        max_position_embeddings=4096,
    )


def write_model(folder: Path, model: Architecture, sparse: bool, shard: int = 5_000_000_000) -> dict[str, int]:
    """A bf16 checkpoint; sparse files hold zeros and take no room."""
    family = FAMILIES["llama"]
    folder.mkdir(parents=True)
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    for spec in tensor_specs(model).values():
        row = family.table.row(spec)
        shapes = row.transform.part_shapes(spec.shape, model)
        tensors |= {name: (shape, "BF16") for name, shape in zip(row.hf, shapes, strict=True)}
    sizes = {name: int(np.prod(shape)) * ITEM_SIZES[dtype] for name, (shape, dtype) in tensors.items()}
    groups: list[list[str]] = [[]]
    for name in tensors:
        if groups[-1] and sum(sizes[key] for key in groups[-1]) + sizes[name] > shard:
            groups.append([])
        groups[-1].append(name)
    noise = np.random.default_rng(0).integers(0, 2**16, 2**23, dtype=np.uint16).tobytes()
    weight_map = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        front, _, total = plan_safetensors({name: tensors[name] for name in names})
        with (folder / file).open("wb") as out:
            out.write(front)
            while not sparse and out.tell() < total:
                out.write(noise[: total - out.tell()])
            out.truncate(total)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(family.config(model, "bfloat16")))
    return {"bytes": sum(sizes.values()), "largest_tensor": max(sizes.values())}


def run(command: list[str]) -> tuple[float, int]:
    """Seconds (the sync of the disk included) and peak resident bytes of a command."""
    os.sync()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{command} failed with status {status}")
    return seconds, usage.ru_maxrss * 1024


def convert(source: Path, target: Path, *options: str) -> list[str]:
    """The command line of a conversion."""
    return [sys.executable, "-m", "hf_tpp.cli", "convert", str(source), str(target), "--json", *options]


def measure(folder: Path, model: Architecture, inspected: Architecture, repeats: int) -> dict[str, Any]:
    """All figures."""
    shutil.rmtree(folder, ignore_errors=True)
    sizes = write_model(folder / "hf", model, sparse=False)
    jobs = {
        "hf -> legacy tp=1": ("hf", ["--to", "megatron", "--format", "legacy"]),
        "hf -> torch_dist tp=2 pp=2": ("hf", ["--to", "megatron", "--tp", "2", "--pp", "2"]),
        "torch_dist tp=2 pp=2 -> hf": ("kept", ["--to", "hf"]),
    }
    results: list[dict[str, Any]] = []
    run(convert(folder / "hf", folder / "kept", "--to", "megatron", "--tp", "2", "--pp", "2"))
    for name, (source, options) in jobs.items():
        for _ in range(repeats):
            copied, _ = run(["cp", "-r", str(folder / source), str(folder / "copy")])
            shutil.rmtree(folder / "copy")
            seconds, peak = run(convert(folder / source, folder / "out", *options))
            shutil.rmtree(folder / "out")
            results.append({"job": name, "seconds": seconds, "cp_seconds": copied, "peak_bytes": peak})
    shutil.rmtree(folder / "kept")
    large = write_model(folder / "large", inspected, sparse=True)
    seconds, peak = run([sys.executable, "-m", "hf_tpp.cli", "inspect", str(folder / "large"), "--json"])
    inspection = {"bytes": large["bytes"], "seconds": seconds, "peak_bytes": peak}
    help_seconds = min(run([sys.executable, "-m", "hf_tpp.cli", "--help"])[0] for _ in range(3))
    shutil.rmtree(folder)
    return {"model": sizes, "results": results, "inspect": inspection, "help_seconds": help_seconds}


def main() -> None:
    """Parse, measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured; it is deleted")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--inspect-layers", type=int, default=250, help="of the same sizes; 250 make 100 GB")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    model = llama(options.layers, options.hidden, options.neurons, options.vocab)
    inspected = llama(options.inspect_layers, options.hidden, options.neurons, options.vocab)
    found = measure(options.folder, model, inspected, options.repeats)
    found |= {"machine": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"conversion-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    for row in found["results"]:
        ratio = row["cp_seconds"] / row["seconds"]
        print(f"{row['job']:<30} {row['seconds']:7.1f} s, {ratio:.2f} of cp, peak {row['peak_bytes'] / 2**20:.0f} MiB")
    print(f"inspect: {found['inspect']}, help: {found['help_seconds']:.2f} s")


if __name__ == "__main__":
    main()
