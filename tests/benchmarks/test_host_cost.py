"""The Python of a tensor-parallel block holds its target."""

import torch

from benchmarks.host_cost import measure


def test_host_cost_is_within_its_target() -> None:
    """A tensor-parallel block costs the host at most 1.15 times the plain block of the same local size.

    The best of several medians: other processes of the machine only ever make a run slower, and rarely both alike.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = [measure(200)["ratio"] for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    print(ratios)
    assert min(ratios) < 1.15
