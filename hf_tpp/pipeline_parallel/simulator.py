"""Run pipeline schedules on paper: who computes when, how much time is idle, and whether it ends at all.

Two neighbours and one message (time runs to the right; F0 is sent with a transfer time of 1):

    stage 0   [ F0 ]SF0
                    |~~~~>                 the transfer starts when the send is issued and the receive posted
    stage 1   RF0 . . . . [ F0 ]           RF0 only posts a buffer; F0 waits for the message

Computes of one stage run one after another, sends and receives take no time on the stage, and transfers never
slow each other down. So with ``arrival`` of the message that a compute waits for:

    arrival = max(send issued, receive posted) + transfer_time
    start   = max(end of the previous compute on this stage, arrival)
    end     = start + forward_time or backward_time

Nothing in these formulas depends on the order in which the stages are visited. The simulator therefore lets each
stage run until it waits for a message that is not sent yet, then visits the next; when a full round moves no stage,
the schedules are deadlocked.

Source: the picture and the bubble are those of Narayanan et al. 2021, "Efficient Large-Scale Language Model
Training on GPU Clusters Using Megatron-LM", section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_tpp.errors import ConfigurationError, ScheduleError
from hf_tpp.pipeline_parallel.schedule import RECEIVE_OF, Action, Kind, check_schedules, has_neighbour


@dataclass(frozen=True, slots=True)
class Event:
    """One compute of one stage.

    Attributes:
        stage: Index of the stage.
        action: A forward or a backward.
        start: When it starts, in the unit of the simulation.
        end: When it ends, same unit.
    """

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """What happened, simulated or measured.

    Attributes:
        events: Every forward and backward, by start, then stage. The first starts at 0.
        makespan: End of the last event, same unit as the events.
        bubble: Share of the stages x makespan grid that is idle, in [0, 1). With equal stages and no transfer
            time, 1F1B has (p - 1) / (m + p - 1).
        in_flight: For each stage, the most microbatches at one time whose forward is done but not their backward:
            the activations to keep. A forward without a backward (evaluation) keeps nothing.
    """

    events: tuple[Event, ...]
    makespan: float
    bubble: float
    in_flight: tuple[int, ...]

    @classmethod
    def from_events(cls, events: Iterable[Event], num_stages: int) -> Simulation:
        """Summarise events, for instance measured ones (on one clock for all stages).

        Args:
            events: Forwards and backwards in any order, any unit and any origin of time.
            num_stages: p.

        Raises:
            ScheduleError: If there is no event, or one is not a compute of stage 0 to p - 1, or ends before it starts.
        """
        ordered = sorted(events, key=lambda event: (event.start, event.stage))
        if not ordered:
            raise ScheduleError("got no events: pass at least one forward")
        for event in ordered:
            _check_event(event, num_stages)
        origin = ordered[0].start
        makespan = max(event.end for event in ordered) - origin
        busy = math.fsum(event.end - event.start for event in ordered)
        return cls(
            events=tuple(Event(e.stage, e.action, e.start - origin, e.end - origin) for e in ordered),
            makespan=makespan,
            bubble=1 - busy / (num_stages * makespan),
            in_flight=tuple(_most_in_flight(ordered, stage) for stage in range(num_stages)),
        )


def _check_event(event: Event, num_stages: int) -> None:
    if not event.action.kind.is_compute:
        raise ScheduleError(f"got an event for {event.action} on stage {event.stage}: pass only forwards and backwards")
    if not 0 <= event.stage < num_stages:
        raise ScheduleError(f"got {event.action} on stage {event.stage} of {num_stages}: pass the true num_stages")
    if not event.start < event.end:
        raise ScheduleError(
            f"{event.action} on stage {event.stage} starts at {event.start} and ends at {event.end}: "
            f"an event must end after it starts"
        )


def _most_in_flight(ordered: Sequence[Event], stage: int) -> int:
    actions = [event.action for event in ordered if event.stage == stage]
    kept = {action.microbatch for action in actions if action.kind is Kind.BACKWARD}
    most = current = 0
    for action in actions:
        if action.microbatch in kept:
            current += 1 if action.kind is Kind.FORWARD else -1
            most = max(most, current)
    return most


def simulate(
    schedules: Sequence[Sequence[Action]],
    forward_time: float | Sequence[float] = 1.0,
    backward_time: float | Sequence[float] = 2.0,
    transfer_time: float = 0.0,
) -> Simulation:
    """Execute one list of actions per stage.

    Args:
        schedules: ``schedules[s]`` is the list of stage s.
        forward_time: Duration of one forward, for all stages or one per stage; any unit.
        backward_time: Duration of one backward, same unit.
        transfer_time: Duration of one transfer between neighbours, same unit.

    Returns:
        The events in that unit, and their summary.

    Raises:
        ScheduleError: If the schedules are incomplete, out of order (see ``check_schedules``), or deadlock.
        ConfigurationError: If a time is not positive, or the times are not one per stage.
    """
    check_schedules(schedules)
    forward_times = _time_per_stage("forward_time", forward_time, len(schedules))
    backward_times = _time_per_stage("backward_time", backward_time, len(schedules))
    if not (math.isfinite(transfer_time) and transfer_time >= 0):
        raise ConfigurationError(f"transfer_time is {transfer_time}: pass a finite number >= 0")

    network = _Network(transfer_time)
    stages = [
        _Stage(stage, actions, len(schedules), network, {Kind.FORWARD: forward, Kind.BACKWARD: backward})
        for stage, (actions, forward, backward) in enumerate(zip(schedules, forward_times, backward_times, strict=True))
    ]
    while any(stage.current is not None for stage in stages):
        moved = [stage.run_until_blocked() for stage in stages]
        if not any(moved):
            stuck = ", ".join(f"stage {s.index} at {s.current}" for s in stages if s.current is not None)
            raise ScheduleError(f"deadlock: {stuck}: each waits for a message that is never sent; reorder the computes")
    return Simulation.from_events((event for stage in stages for event in stage.events), len(schedules))


def _time_per_stage(name: str, time: float | Sequence[float], num_stages: int) -> list[float]:
    times = [float(t) for t in time] if isinstance(time, Sequence) else [float(time)] * num_stages
    if len(times) != num_stages:
        raise ConfigurationError(f"{name} has {len(times)} entries for {num_stages} stages: pass one per stage")
    if not all(math.isfinite(t) and t > 0 for t in times):
        raise ConfigurationError(f"{name} is {time}: pass positive, finite times")
    return times


class _Network:
    """Messages by (kind of the receive, receiving stage, microbatch): when both sides were ready."""

    def __init__(self, transfer_time: float) -> None:
        self.transfer_time = transfer_time
        self.sent: dict[tuple[Kind, int, int], float] = {}
        self.posted: dict[tuple[Kind, int, int], float] = {}

    def arrival(self, message: tuple[Kind, int, int]) -> float | None:
        """When the message is there, or None if it is not sent yet."""
        if message not in self.sent:
            return None
        return max(self.sent[message], self.posted[message]) + self.transfer_time


class _Stage:
    """One stage: its list, how far it got, and its clock."""

    def __init__(
        self, index: int, actions: Sequence[Action], num_stages: int, network: _Network, times: dict[Kind, float]
    ) -> None:
        self.index = index
        self.events: list[Event] = []
        self._num_stages = num_stages
        self._network = network
        self._times = times
        self._rest = iter(actions)
        self._clock = 0.0
        self.current = next(self._rest, None)  # the action to run next; None at the end

    def run_until_blocked(self) -> bool:
        """Run actions until one has to wait for an unsent message, or the list ends; True if any ran."""
        moved = False
        while self.current is not None and self._run(self.current):
            self.current = next(self._rest, None)
            moved = True
        return moved

    def _run(self, action: Action) -> bool:
        """Run one action; False if it has to wait for a message that is not sent yet."""
        kind, microbatch = action.kind, action.microbatch
        if kind.is_compute:
            return self._compute(action)
        if kind is Kind.SEND_FORWARD:
            self._network.sent[Kind.RECV_FORWARD, self.index + 1, microbatch] = self._clock
        elif kind is Kind.SEND_BACKWARD:
            self._network.sent[Kind.RECV_BACKWARD, self.index - 1, microbatch] = self._clock
        else:
            self._network.posted[kind, self.index, microbatch] = self._clock
        return True

    def _compute(self, action: Action) -> bool:
        start = self._clock
        receive = RECEIVE_OF[action.kind]
        if has_neighbour(receive, self.index, self._num_stages):
            arrival = self._network.arrival((receive, self.index, action.microbatch))
            if arrival is None:
                return False
            start = max(start, arrival)
        self._clock = start + self._times[action.kind]
        self.events.append(Event(self.index, action, start, self._clock))
        return True
