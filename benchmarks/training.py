"""Training speed and memory: plain transformers, hf_tpp and other libraries side by side.

    python benchmarks/training.py                                  two GPUs, 24 layers, hidden 2048, sequence 2048
    python benchmarks/training.py --model llama --only tensor      contestants whose name begins with "tensor"
    python benchmarks/training.py --microbatches 32 --steps 2 --warmup 1 --total-limit 115
    python benchmarks/training.py --device cpu --tiny              the same program in miniature, on gloo

Every contestant trains the same weights on the same tokens with the same optimizer in processes of its own, for a
limited time; the losses of its steps are part of the result, to show that the work is the same. Times are medians of
whole synchronised steps. Each result is printed and written as it comes; the table and the picture are last.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "conversion")]  # a script's own folder is on the path, the project's is not

from benchmarks.contestants import CONTESTANTS, load  # noqa: E402
from benchmarks.launching import launch  # noqa: E402
from benchmarks.picture import draw  # noqa: E402
from benchmarks.recording import Record, line_of  # noqa: E402
from benchmarks.workload import FAMILIES, TINY, Workload  # noqa: E402


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a model of four small layers")
    parser.add_argument("--model", choices=FAMILIES, help="only this family")
    parser.add_argument("--vocab", type=int, help="entries of the vocabulary; default: the family's own")
    parser.add_argument("--microbatches", type=int, help="of one step")
    parser.add_argument("--only", nargs="+", default=[""], help="contestants whose names begin with one of these")
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--meta", action="store_true", help="hf_tpp alone: it initialises the model shard by shard")
    parser.add_argument("--compile-backend", default="inductor", help="of contestants that compile")
    parser.add_argument("--alone", action="store_true", help="one rank of each on one GPU, nothing is transferred")
    parser.add_argument("--profile", action="store_true", help="one more step each, with the times of its kernels")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one contestant")
    parser.add_argument("--total-limit", type=float, default=float("inf"), help="seconds for all of them")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    return parser.parse_args()


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """What is trained, one for each family."""
    sizes = Workload(**TINY) if arguments.tiny else Workload()
    chosen = {"vocab_size": arguments.vocab, "num_microbatches": arguments.microbatches}
    sizes = replace(sizes, **{name: value for name, value in chosen.items() if value is not None})
    return [replace(sizes, family=family) for family in ([arguments.model] if arguments.model else FAMILIES)]


def world_size_of(name: str) -> int:
    """Processes of a contestant; those that cannot be imported here fail in a single one, and say why."""
    try:
        return load(name).world_size
    except ImportError:
        return 1


def main() -> None:
    """Run the contestants one after the other."""
    arguments = arguments_of()
    end = time.monotonic() + arguments.total_limit
    output = arguments.output or ROOT / "benchmarks" / "results" / f"training-{arguments.device}.json"
    record = Record(output, arguments.device, arguments.steps)
    options = {"device_type": arguments.device, "warmup": arguments.warmup, "steps": arguments.steps}
    options |= {"on_meta": arguments.meta, "compile_backend": arguments.compile_backend}
    options |= {"alone": arguments.alone, "profile": arguments.profile}
    names = [name for name in CONTESTANTS if name.startswith(tuple(arguments.only))]
    for workload in workloads(arguments):
        for name in names:
            limit = min(arguments.limit, end - time.monotonic())
            world_size = world_size_of(name)
            if limit <= 0:
                result = {"contestant": name, "failed": f"not run: {arguments.total_limit:.0f} s were used up"}
            else:
                result = launch(name, 1 if arguments.alone else world_size, workload, options, limit)
            record.add(result, workload, world_size)
            print(line_of(record.results[-1], record.results[-1]), flush=True)
    print(record.table())
    draw(record.content(), output.with_suffix(".png"))


if __name__ == "__main__":
    main()
