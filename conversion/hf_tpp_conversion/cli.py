"""What the commands `convert`, `inspect` and `verify` do, apart from their options."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_tpp.errors import HfTppError
from hf_tpp_conversion.convert import Conversion, execute, plan_conversion
from hf_tpp_conversion.formats.detect import open_checkpoint
from hf_tpp_conversion.inspection import as_text, inspect, report
from hf_tpp_conversion.verify import compare, compare_logits

__all__ = ["run_convert", "run_inspect", "run_verify"]

SUCCESS, DIFFERENT, REFUSED = 0, 1, 2
_LOGITS_TOLERANCE = 1e-4


def _guarded(action: Callable[[], int], as_json: bool) -> int:
    """Run; an error of ours is one line (or one JSON object), and so is an interruption."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return action()
    except HfTppError as error:
        problem, kind = str(error), type(error).__name__
    except KeyboardInterrupt:
        problem, kind = "interrupted; nothing was left behind, the source is untouched", "Interrupted"
    finally:
        signal.signal(signal.SIGTERM, previous)
    printable = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in problem)
    if as_json:
        print(json.dumps({"error": kind, "message": printable}))
    else:
        print(f"hf-tpp: {printable}", file=sys.stderr)
    return REFUSED


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def run_convert(job: Conversion, *, dry_run: bool, as_json: bool, quiet: bool = False) -> int:
    """Convert, or only say what would be written; the exit code."""
    return _guarded(lambda: _convert(job, dry_run, as_json, quiet), as_json)


def _convert(job: Conversion, dry_run: bool, as_json: bool, quiet: bool) -> int:
    source, plan = plan_conversion(job)
    files = {**plan.sizes, **{name: len(content) for name, content in plan.small.items()}}
    files |= {name: path.stat().st_size for name, path in plan.copies.items()}
    summary = {
        "source": report(source),
        "target": str(job.target),
        "to": job.to,
        "bytes": plan.num_bytes,
        "files": dict(sorted(files.items())),
        "written": not dry_run,
    }
    if not dry_run:
        from tqdm import tqdm

        with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, disable=as_json or quiet) as bar:
            execute(job, source, plan, bar.update)
    if as_json:
        print(json.dumps(summary))
    else:
        verb = "would be written" if dry_run else "written"
        print(f"{job.target}: {len(files)} files, {plan.num_bytes:,} bytes {verb}")
        for name, size in sorted(files.items()) if dry_run else []:
            print(f"  {size:>16,}  {name}")
    return SUCCESS


def run_inspect(path: Path, *, as_json: bool, **options: Any) -> int:
    """Print what a checkpoint is; the exit code."""

    def action() -> int:
        found = inspect(path, **options)
        print(json.dumps(found) if as_json else as_text(found))
        return SUCCESS

    return _guarded(action, as_json)


def run_verify(a: Path, b: Path, *, logits: bool, as_json: bool, quiet: bool = False, **options: Any) -> int:
    """Compare two checkpoints; the exit code is 1 if they differ."""

    def action() -> int:
        from tqdm import tqdm

        first, second = open_checkpoint(a, **options), open_checkpoint(b, **options)
        with tqdm(total=report(first)["bytes"], unit="B", unit_scale=True, disable=as_json or quiet) as bar:
            found = compare(first, second, bar.update)
        if logits:
            found["logits"] = compare_logits(a, b, **options)
            found["same"] = found["same"] and found["logits"] <= _LOGITS_TOLERANCE
        if as_json:
            print(json.dumps(found))
        else:
            print(f"{'the same model' if found['same'] else 'different'}: {found['tensors']} tensors were compared")
            print("\n".join(f"  {text}" for text in found["differences"]), end="\n" if found["differences"] else "")
            if logits:
                same = f"at most {_LOGITS_TOLERANCE} is the same"
                print(f"  largest difference of the logits: {found['logits']:.1e}, {same}")
        return SUCCESS if found["same"] else DIFFERENT

    return _guarded(action, as_json)
