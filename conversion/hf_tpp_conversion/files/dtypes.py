"""Types of tensors by their safetensors names, and the plain integers that carry their bits.

Conversion only moves bits, so an array of any type travels as unsigned integers of the same width: numpy has no
bfloat16, and neither numpy nor a NaN's payload may be allowed an opinion on the values.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from hf_tpp.errors import CheckpointError, ConfigurationError

__all__ = ["FLOATS", "ITEM_SIZES", "STORAGES", "TORCH_NAMES", "Array", "carrier", "cast", "parse_dtype"]

Array = npt.NDArray[Any]

# safetensors name -> bytes per element
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# safetensors name -> name of the torch type
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# safetensors name -> name of torch's storage class, as pickles have it
STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}
FLOATS = ("F64", "F32", "F16", "BF16")
_SHORT = {"fp32": "F32", "float32": "F32", "fp16": "F16", "float16": "F16", "bf16": "BF16", "bfloat16": "BF16"}
_CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def carrier(dtype: str) -> npt.DTypeLike:
    """The unsigned integer type whose arrays hold the bits of `dtype`."""
    return _CARRIERS[ITEM_SIZES[dtype]]


def parse_dtype(text: str) -> str:
    """The type that a user names, such as bf16.

    Raises:
        ConfigurationError: Not a floating type that weights are stored in.
    """
    if text.lower() not in _SHORT:
        raise ConfigurationError(f"dtype {text!r} is unknown: use one of {', '.join(_SHORT)}")
    return _SHORT[text.lower()]


def cast(values: Array, source: str, target: str, name: str = "") -> Array:
    """Round `values` (bits of `source`) to the nearest values of `target`; integers and equal types pass unchanged.

    Args:
        values: The bits.
        source: Their type.
        target: The type to round to.
        name: Of the tensor: then values that are too large for `target` are refused instead of becoming infinite.

    Raises:
        CheckpointError: Such values.
    """
    if source == target or source not in FLOATS or target not in FLOATS:
        return values
    import torch  # the only arithmetic of the package: without a cast torch is not needed

    tensor = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8)).view(getattr(torch, TORCH_NAMES[source]))
    cast_ = tensor.to(getattr(torch, TORCH_NAMES[target]))
    if name and (overflow := int((cast_.isinf() & ~tensor.isinf()).sum())):
        raise CheckpointError(f"{overflow} values of {name!r} are too large for {target}: choose another --dtype")
    rounded = cast_.view(torch.uint8).numpy()
    return rounded.view(carrier(target)).reshape(values.shape)
