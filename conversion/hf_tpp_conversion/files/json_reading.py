"""JSON from a file that may come from anywhere: bounded, and without repeated keys."""

import json
from pathlib import Path
from typing import Any

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.byte_ranges import read_range

__all__ = ["parse_json", "read_json"]

_MAX_CONTAINERS = 300_000  # a header of safetensors has three for every tensor


def read_json(path: Path, limit: int = 10 * 2**20) -> dict[str, Any]:
    """The object in a file of at most `limit` bytes.

    Raises:
        CheckpointError: No such file, too large, or no JSON object.
    """
    content = read_range(path, 0, limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{path} has more than {limit} bytes: it is not what it is taken for")
    return parse_json(content, path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in which no key is repeated, since two readers could understand it in two ways.

    Raises:
        CheckpointError: No such object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{path} names {key[:100]!r} twice: it is damaged or malicious, get it elsewhere")
            result[key] = value
        return result

    if content.count(b"[") + content.count(b"{") > _MAX_CONTAINERS:
        raise CheckpointError(
            f"{path} has more than {_MAX_CONTAINERS} lists and objects: it is not what it is taken for"
        )
    try:
        parsed = json.loads(content, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} does not hold valid JSON ({error}): get the file again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds a JSON {type(parsed).__name__} where an object is needed")
    return parsed
