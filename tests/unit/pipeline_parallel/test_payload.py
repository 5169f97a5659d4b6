"""Payloads: what a block returns is rebuilt from the tensors that were sent."""

import pytest
import torch
from torch import nn

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.pipeline_parallel.flow import StageComplete, StageFlow
from hf_tpp.pipeline_parallel.payload import PayloadSpec, leaves_of, plain_payload


def send(output, arguments, before=()):
    """What a stage sends whose last block returned `output` and whose next block is given `arguments`."""
    flow = StageFlow(rows=2, seq=3)
    flow.start()
    flow.see_arguments({"hidden_states": None, **dict(before)})
    output = flow.note_output(output)
    with pytest.raises(StageComplete):
        flow.complete(arguments(output))
    return flow.sends, flow.output, output


def test_one_tensor():
    spec, payload, output = send(torch.ones(2, 3, 4, requires_grad=True), lambda out: {"hidden_states": out})
    assert spec == plain_payload((2, 3, 4), torch.float32)
    assert payload == (output,)
    assert spec.rebuild(payload) is output


def test_a_tuple_of_which_only_the_first_goes_on():
    weights = torch.ones(2, 4, 3, 3)
    spec, payload, output = send((torch.ones(2, 3, 4), weights), lambda out: {"hidden_states": out[0]})
    assert spec == plain_payload((2, 3, 4), torch.float32, (None, None))
    assert spec.rebuild(payload) == (output[0], None)


def test_elements_that_come_back_as_arguments_are_sent():
    chosen = torch.zeros(2, 3, dtype=torch.int32)
    spec, payload, output = send(
        (torch.ones(2, 3, 4), (None, chosen)), lambda out: {"hidden_states": out[0] * 2, "chosen": out[1][1]}
    )
    assert [leaf.needs_grad for leaf in spec.leaves] == [True, False]
    assert spec.rebuild(payload) == (output[0], (None, chosen))


def test_dictionaries_that_blocks_write_to():
    mask, keys, values = torch.ones(1), torch.ones(2, 1), torch.ones(2, 2)
    shared = {"mask": mask}

    def arguments(out):
        shared["full"] = (keys, values)
        return {"hidden_states": out, "shared": shared}

    spec, payload, _ = send(torch.ones(2, 3, 4), arguments, {"shared": {"mask": mask}})
    assert spec.shared == (("shared", "full", 0), ("shared", "full", 1))
    there = {"shared": {"mask": mask}}
    spec.share(there, payload)
    assert there["shared"]["full"] == (keys, values)


def test_what_comes_from_earlier_blocks_in_another_way_is_refused():
    weight = nn.Parameter(torch.ones(4))
    flow = StageFlow(own=(nn.ParameterList([weight]),))
    flow.start()
    flow.see_arguments({})
    earlier = torch.ones(2, 3, 4) * weight
    output = flow.note_output(earlier * weight)
    with pytest.raises(UnsupportedModelError, match="given 'history', computed from blocks before the last"):
        flow.complete({"hidden_states": output, "history": earlier + 1})


def test_leaves_have_paths():
    a, b = torch.ones(1), torch.ones(2)
    assert list(leaves_of({"x": [a, None], "y": {"z": (b,)}})) == [(("x", 0), a), (("y", "z", 0), b)]
    assert PayloadSpec(()).rebuild((a,)) is a
