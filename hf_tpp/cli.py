"""The command line: options only. What a command does is imported when it runs, so that --help answers at once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Side(StrEnum):
    """What to write."""

    HF = "hf"
    MEGATRON = "megatron"


class Format(StrEnum):
    """How Megatron stores it."""

    TORCH_DIST = "torch_dist"
    LEGACY = "legacy"


class LayerSpec(StrEnum):
    """Which layers of Megatron name the tensors."""

    TE = "te"
    LOCAL = "local"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Config = Annotated[Path | None, typer.Option(help="Folder of a config.json that describes a Megatron checkpoint.")]
Args = Annotated[list[str] | None, typer.Option("--arg", help="NAME=VALUE of Megatron's args; repeatable.")]
AllowBin = Annotated[bool, typer.Option("--allow-bin", help="Read pytorch_model.bin; nothing in it is run.")]


@app.callback()
def hf_tpp() -> None:
    """Tensor and pipeline parallelism for the Hugging Face model that you already have."""


@app.command(
    epilog="Exits with 0 if MODEL is exact, 1 if it is refused or wrong, 2 if it cannot be read, or run in one process."
)
def check(
    model: Annotated[str, typer.Argument(help="A model_type (llama), a folder or configuration file, or a hub name.")],
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 2,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 2,
    tiny_config: Annotated[
        Path | None, typer.Option(help="Configuration (JSON) to use as it is, in place of a shrunk one.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with MODEL. Read it first.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one run.")] = 120.0,
) -> None:
    """Is MODEL exact in parallel? Shrinks it, and compares parallel runs on the CPU with a plain one."""
    from hf_tpp.check.command import run_check

    run_check(model, tp, pp, tiny_config, trust_remote_code, as_json, timeout)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint, of any format.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it appears whole or not at all.")],
    to: Annotated[Side, typer.Option(help="What to write.")],
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    vpp: Annotated[int, typer.Option(help="Chunks of layers per stage.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert-parallel ranks.")] = 1,
    stages: Annotated[str, typer.Option(help="Layers of each chunk, such as 3,5; default: even.")] = "",
    format: Annotated[Format, typer.Option(help="Megatron's format.")] = Format.TORCH_DIST,
    layer_spec: Annotated[LayerSpec | None, typer.Option(help="Default: as in the source, else te.")] = None,
    divisible_by: Annotated[int, typer.Option(help="Pad the vocabulary to a multiple of this x tp; 0: not.")] = 128,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as it is.")] = None,
    family: Annotated[str | None, typer.Option(help="model_type to write; default: as recorded, or that fits.")] = None,
    config: Config = None,
    arg: Args = None,
    allow_bin: AllowBin = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint: Hugging Face to Megatron, back, or Megatron to another layout."""
    from hf_tpp_conversion.cli import run_convert
    from hf_tpp_conversion.convert import Conversion
    from hf_tpp_conversion.model.partition import Partition

    try:
        counts = tuple(int(count) for count in stages.split(",") if count)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    given = _given(arg)
    partition = Partition(tp=tp, pp=pp, vpp=vpp, ep=ep, stages=counts, divisible_by=divisible_by)
    spec = layer_spec.value if layer_spec else None
    job = Conversion(
        source, target, to.value, format.value, spec, partition, dtype, family, config, given, allow_bin, overwrite
    )
    raise typer.Exit(run_convert(job, dry_run=dry_run, as_json=json))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a checkpoint, of any format.")],
    config: Config = None,
    arg: Args = None,
    allow_bin: AllowBin = False,
    json: Json = False,
) -> None:
    """Say what a checkpoint is, without reading a tensor."""
    from hf_tpp_conversion.cli import run_inspect

    given = _given(arg)
    raise typer.Exit(run_inspect(path, as_json=json, given=given, config=config, allow_bin=allow_bin))


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(help="Folder of a checkpoint, of any format.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
    logits: Annotated[bool, typer.Option("--logits", help="Compare logits as well.")] = False,
    config: Config = None,
    arg: Args = None,
    allow_bin: AllowBin = False,
    json: Json = False,
) -> None:
    """Are two checkpoints the same model? Exit code 0: yes, 1: no, 2: one cannot be read."""
    from hf_tpp_conversion.cli import run_verify

    given = _given(arg)
    raise typer.Exit(run_verify(a, b, logits=logits, as_json=json, given=given, config=config, allow_bin=allow_bin))


def _given(pairs: list[str] | None) -> dict[str, Any]:
    """Megatron's args of the command line.

    Raises:
        BadParameter: Not of the form NAME=VALUE.
    """
    from hf_tpp_conversion.configs.megatron_args import parse_args

    try:
        return parse_args(pairs or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app()
