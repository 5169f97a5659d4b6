"""Regions of modules whose children have unknown names, found by running them: which channels depend on which.

    skeleton    a copy of the model without weights runs once        calls.py: with which arguments modules are called
    roles       a module's graph is cut at its linears               which is the row, which are columns
    needs       backward from each head or neuron of the row         layouts, by plan/dependence.py
    numbers     attributes that may have to be local                 candidates
    emulation   the cut module as each rank would run it             its sums must equal the plain module's

The emulation decides. What does not pass it stays whole on each rank, which is exact.
"""

from hf_tpp.tensor_parallel.probe.search import Probed, probe_regions

__all__ = ["Probed", "probe_regions"]
