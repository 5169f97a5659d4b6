"""Microbatches as CUDA graphs: the host issues two graphs for each instead of thousands of kernels.

pass 1, 2        as ever: kernels are chosen and compiled, communicators set up
pass 3           forward and backward of a microbatch are recorded, tensor-parallel collectives included
pass 3, 4, ...   for each microbatch: inputs are copied to where the graph reads them, the graph is replayed, its
                 results are copied out; messages between stages stay outside

recorder.py      decides which passes are recorded, and for which of them a recording stands
state.py         all that a pass depends on beside the values of its inputs
recording.py     the graphs of one kind of pass: one pair for each microbatch that is in flight
"""

from hf_tpp.cuda_graphs.recorder import StageRecorder, check_recordable

__all__ = ["StageRecorder", "check_recordable"]
