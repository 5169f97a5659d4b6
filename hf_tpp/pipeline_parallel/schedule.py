"""Pipeline schedules as data: one list of actions per stage.

A batch is cut into m microbatches that flow through p stages. The 1F1B ("one forward, one backward")
schedule for p = 4 stages and m = 6 microbatches, a backward taking twice as long as a forward:

    slot     0         5         10        15        20        25
    stage 0  0 1 2 3 . . . . . . <0> 4 <1> 5 <2> . <3> . <4> . <5>
    stage 1  . 0 1 2 . . . . <0> 3 <1> 4 <2> 5 <3> . <4> . <5> . .
    stage 2  . . 0 1 . . <0> 2 <1> 3 <2> 4 <3> 5 <4> . <5> . . . .
    stage 3  . . . 0 <0> 1 <1> 2 <2> 3 <3> 4 <4> 5 <5> . . . . . .

    3 forward of microbatch 3, <3> its backward, . idle

Read row "stage 0": four forwards fill the pipeline (three of warm-up and the first of the steady
phase), then every backward is followed by the next forward, and the last three backwards drain it.
Stage 3 never warms up: it runs the backward of a microbatch right after its forward.

In a formula, stage s of p runs

    warm-up      w = min(p - s - 1, m)   forwards
    steady       m - w                   pairs (one forward, one backward)
    cool-down    w                       backwards

so at most min(p - s, m) microbatches are in flight on a stage (forward done, backward not yet), whatever m
is. With equal stages the idle share of the grid, the bubble, is (p - 1) / (m + p - 1).

Around these computes stands the communication. This is stage 2 of the picture at its start:

    RF0   RF1 F0 SF0   RB0 F1 SF1   RF2 B0 SB0   RB1 F2 SF2   ...
          |            |            |
          |            |            posts the receive of F2, so that its transfer runs during B0
          |            posts the receive of B0
          posts the receive of F1

- ``RECV_*`` posts a nonblocking receive; the compute of that microbatch waits for the message.
  Each receive is posted one compute early, which hides the transfer behind that compute.
- ``SEND_*`` is a nonblocking buffered send, right after the compute that made the tensor.
- Messages carry no tag: on each link and in each direction the n-th send meets the n-th receive.

Source: Narayanan et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training" (PipeDream-Flush);
Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM".
"""

from __future__ import annotations

import enum
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_tpp.errors import ScheduleError


class Kind(enum.Enum):
    """What an action does; the value is its short name in print."""

    FORWARD = "F"
    BACKWARD = "B"
    RECV_FORWARD = "RF"  # activations, from stage - 1
    SEND_FORWARD = "SF"  # activations, to stage + 1
    RECV_BACKWARD = "RB"  # gradients, from stage + 1
    SEND_BACKWARD = "SB"  # gradients, to stage - 1

    @property
    def is_compute(self) -> bool:
        """True for FORWARD and BACKWARD, False for communication."""
        return self in (Kind.FORWARD, Kind.BACKWARD)


RECEIVE_OF = {Kind.FORWARD: Kind.RECV_FORWARD, Kind.BACKWARD: Kind.RECV_BACKWARD}
SEND_OF = {Kind.FORWARD: Kind.SEND_FORWARD, Kind.BACKWARD: Kind.SEND_BACKWARD}
COMPUTE_OF_SEND = {send: compute for compute, send in SEND_OF.items()}
NEEDS_PREVIOUS_STAGE = frozenset({Kind.RECV_FORWARD, Kind.SEND_BACKWARD})
NEEDS_NEXT_STAGE = frozenset({Kind.SEND_FORWARD, Kind.RECV_BACKWARD})


@dataclass(frozen=True, slots=True)
class Action:
    """One step of one stage, printed as ``F0`` or ``RB3``.

    Attributes:
        kind: What to do.
        microbatch: For which microbatch, counted from 0.
    """

    kind: Kind
    microbatch: int

    def __repr__(self) -> str:
        return f"{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Inverse of ``str(action)``: ``Action.parse("RB3")``.

        Raises:
            ScheduleError: If the text is not a kind followed by a microbatch number.
        """
        match = re.fullmatch(r"([RS]?[FB])([0-9]+)", text)
        if match is None:
            raise ScheduleError(
                f"cannot read {text!r} as an action: write F, B, RF, SF, RB or SB and a microbatch number, as in RB3"
            )
        return cls(Kind(match[1]), int(match[2]))


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """The 1F1B schedule of one stage (drawn at the top of this file).

    Args:
        stage: Index of the stage, 0 to num_stages - 1.
        num_stages: p, at least 1.
        num_microbatches: m, at least 1; may be smaller than p.

    Returns:
        The actions of this stage, in the order in which to issue them.

    Source: Narayanan et al. 2021, PipeDream-Flush.
    """
    _check_sizes(stage, num_stages, num_microbatches)
    forwards = [Action(Kind.FORWARD, microbatch) for microbatch in range(num_microbatches)]
    backwards = [Action(Kind.BACKWARD, microbatch) for microbatch in range(num_microbatches)]
    warm_up = min(num_stages - stage - 1, num_microbatches)
    pairs = num_microbatches - warm_up
    steady = itertools.chain.from_iterable(zip(forwards[warm_up:], backwards[:pairs], strict=True))
    return _with_communication([*forwards[:warm_up], *steady, *backwards[pairs:]], stage, num_stages)


def forward_only(stage: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """The schedule of one stage for evaluation: every forward in order, no backward.

    Args:
        stage: Index of the stage, 0 to num_stages - 1.
        num_stages: p, at least 1.
        num_microbatches: m, at least 1.

    Returns:
        The actions of this stage, in the order in which to issue them.
    """
    _check_sizes(stage, num_stages, num_microbatches)
    return _with_communication([Action(Kind.FORWARD, m) for m in range(num_microbatches)], stage, num_stages)


def backward_only(stage: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """The second half of a pass whose gradients come from outside, after `forward_only`: every backward in order.

        slot     0         5         10
        stage 0  0 1 2 . . . <0> <1> <2>
        stage 1  . 0 1 2 <0> <1> <2> . .

    The two lists one after the other are a complete schedule (GPipe's): its bubble is that of 1F1B, but all m
    microbatches are in flight on every stage.

    Args:
        stage: Index of the stage, 0 to num_stages - 1.
        num_stages: p, at least 1.
        num_microbatches: m, at least 1.

    Returns:
        The actions of this stage, in the order in which to issue them.

    Source: Huang et al. 2019, "GPipe".
    """
    _check_sizes(stage, num_stages, num_microbatches)
    return _with_communication([Action(Kind.BACKWARD, m) for m in range(num_microbatches)], stage, num_stages)


def _check_sizes(stage: int, num_stages: int, num_microbatches: int) -> None:
    if num_stages < 1 or num_microbatches < 1:
        raise ScheduleError(
            f"a schedule needs num_stages >= 1 and num_microbatches >= 1, got {num_stages} and {num_microbatches}"
        )
    if not 0 <= stage < num_stages:
        raise ScheduleError(f"got stage {stage} of {num_stages}: pass a stage from 0 to {num_stages - 1}")


def _with_communication(computes: Sequence[Action], stage: int, num_stages: int) -> list[Action]:
    """Put each receive one compute early, and each send right after its compute."""
    receives = [_at_neighbour(RECEIVE_OF, compute, stage, num_stages) for compute in computes]
    actions = list(receives[0])
    for index, compute in enumerate(computes):
        is_last = index == len(computes) - 1
        next_receive = [] if is_last else receives[index + 1]
        actions += [*next_receive, compute, *_at_neighbour(SEND_OF, compute, stage, num_stages)]
    return actions


def _at_neighbour(kind_of: dict[Kind, Kind], compute: Action, stage: int, num_stages: int) -> list[Action]:
    """The send or receive of this compute; empty where the stage has no such neighbour."""
    kind = kind_of[compute.kind]
    return [Action(kind, compute.microbatch)] if has_neighbour(kind, stage, num_stages) else []


def has_neighbour(kind: Kind, stage: int, num_stages: int) -> bool:
    """Whether the stage that a communication of this kind talks to exists; True for a compute."""
    is_first, is_last = stage == 0, stage == num_stages - 1
    return not (is_first and kind in NEEDS_PREVIOUS_STAGE) and not (is_last and kind in NEEDS_NEXT_STAGE)


def check_schedules(schedules: Sequence[Sequence[Action]]) -> None:
    """Check all that can be seen without running: completeness, order within a stage, order on each link.

    A schedule that passes may still deadlock; ``simulator.simulate`` finds that.

    Args:
        schedules: ``schedules[s]`` is the list of stage s. If no stage runs a backward, only forwards are expected.

    Raises:
        ScheduleError: Naming the stage (or link), the offending action, and the fix.
    """
    everything = [action for actions in schedules for action in actions]
    if not everything:
        raise ScheduleError(f"got {len(schedules)} stages without any action: pass one list of actions per stage")
    has_backward = any(action.kind is Kind.BACKWARD for action in everything)
    computes = [Kind.FORWARD, Kind.BACKWARD] if has_backward else [Kind.FORWARD]
    num_microbatches = 1 + max(action.microbatch for action in everything)
    required = [Action(kind, microbatch) for microbatch in range(num_microbatches) for kind in computes]
    for stage, actions in enumerate(schedules):
        _check_complete(stage, actions, required)
        _check_order(stage, actions, len(schedules))
    for stage in range(len(schedules) - 1):
        _check_link(schedules, stage, stage + 1, Kind.FORWARD)
        _check_link(schedules, stage + 1, stage, Kind.BACKWARD)


def _check_complete(stage: int, actions: Sequence[Action], required: Iterable[Action]) -> None:
    counts = Counter(actions)
    for action in required:
        if action not in counts:
            raise ScheduleError(f"incomplete: stage {stage} never runs {action}: add it once")
    for action, count in counts.items():
        if count > 1:
            raise ScheduleError(f"duplicate: stage {stage} has {action} {count} times: keep one")


def _check_order(stage: int, actions: Sequence[Action], num_stages: int) -> None:
    """Walk the list: whatever an action needs on its own stage must stand before it."""
    seen: set[Action] = set()
    for action in actions:
        kind, microbatch = action.kind, action.microbatch
        if not has_neighbour(kind, stage, num_stages):
            raise ScheduleError(f"stage {stage} of {num_stages} has {action}, but no stage on that side: remove it")
        forward = Action(Kind.FORWARD, microbatch)
        if kind is Kind.BACKWARD and forward not in seen:
            raise ScheduleError(f"stage {stage} runs {action} before its forward: put {forward} first")
        if kind in COMPUTE_OF_SEND and (compute := Action(COMPUTE_OF_SEND[kind], microbatch)) not in seen:
            raise ScheduleError(f"stage {stage} issues {action} without its compute: put {compute} first")
        receives = _at_neighbour(RECEIVE_OF, action, stage, num_stages) if kind.is_compute else []
        for receive in receives:
            if receive not in seen:
                raise ScheduleError(
                    f"stage {stage} runs {action} but its receive was never posted: put {receive} first"
                )
        seen.add(action)


def _check_link(schedules: Sequence[Sequence[Action]], source: int, target: int, compute: Kind) -> None:
    """The n-th send of a link must be the microbatch of its n-th receive."""
    sent = [action for action in schedules[source] if action.kind is SEND_OF[compute]]
    received = [action for action in schedules[target] if action.kind is RECEIVE_OF[compute]]
    for position, (send, receive) in enumerate(itertools.zip_longest(sent, received)):
        if send is None or receive is None or send.microbatch != receive.microbatch:
            raise ScheduleError(
                f"receive order differs from the send order from stage {source} to stage {target}: message {position} "
                f"is sent as {send or 'nothing'} and received as {receive or 'nothing'}: use one order on both sides"
            )
