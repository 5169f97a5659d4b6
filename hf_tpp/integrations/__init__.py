"""transformers' Trainer and accelerate serve parallel models: what they do per process is done per replica.

    Accelerator, Trainer                     written for: a process = a replica
          |
    some of their methods, changed here      for parallel models: tp x pp processes = a replica
          |
    parallel model                           one call = one pass of all ranks of the replica

`parallelize` puts the changes into the two classes; they do nothing for other models. With `parallelize(patch=False)`
the same changes are found in `TPPAccelerator` and `TPPTrainer` alone.
"""

from hf_tpp.integrations.activation import activate, check_classes

__all__ = ["activate", "check_classes"]
