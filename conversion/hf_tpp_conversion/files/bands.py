"""Arrays in bands: pieces that are small enough to be copied, summed and written while the cache still holds them."""

from collections.abc import Iterable, Iterator

from hf_tpp_conversion.files.dtypes import Array

__all__ = ["BAND", "bands"]

BAND = 4 * 2**20


def bands(arrays: Iterable[Array]) -> Iterator[Array]:
    """Views of at most 4 MiB whose bytes follow one another, in order; contiguous arrays are cut flat."""
    for array in arrays:
        if array.nbytes <= BAND:
            if array.size:
                yield array
            continue
        flat = array.reshape(-1) if array.flags.c_contiguous else array
        rows = max(1, BAND * len(flat) // flat.nbytes)
        for first in range(0, len(flat), rows):
            band = flat[first : first + rows]
            if band.nbytes <= BAND:
                yield band
            else:
                yield from bands([band[0]])  # one row that is too large
