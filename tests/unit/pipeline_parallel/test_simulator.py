"""Simulated times against the formulas of 1F1B, small cases by hand, and deadlocks."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_tpp.errors import ConfigurationError, ScheduleError
from hf_tpp.pipeline_parallel.schedule import Action, Kind, backward_only, forward_only, one_f_one_b
from hf_tpp.pipeline_parallel.simulator import Event, Simulation, simulate

SIZES = [(p, m) for p in range(1, 9) for m in range(1, 2 * p + 2)]


def parse(text: str) -> list[Action]:
    return [Action.parse(word) for word in text.split()]


def one_f_one_b_all(num_stages: int, num_microbatches: int) -> list[list[Action]]:
    return [one_f_one_b(stage, num_stages, num_microbatches) for stage in range(num_stages)]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_one_f_one_b_formulas(p, m):
    simulation = simulate(one_f_one_b_all(p, m), forward_time=1.0, backward_time=2.0)
    assert simulation.makespan == 3 * (m + p - 1)
    assert simulation.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert simulation.in_flight == tuple(min(p - stage, m) for stage in range(p))


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_forward_only_formulas(p, m):
    simulation = simulate([forward_only(stage, p, m) for stage in range(p)])
    assert simulation.makespan == m + p - 1
    assert simulation.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert simulation.in_flight == (0,) * p


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_two_halves_formulas(p, m):
    """The bubble of 1F1B, but every microbatch is kept on every stage until the backwards begin."""
    simulation = simulate([forward_only(stage, p, m) + backward_only(stage, p, m) for stage in range(p)])
    assert simulation.makespan == 3 * (m + p - 1)
    assert simulation.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert simulation.in_flight == (m,) * p


@given(data=st.data())
def test_any_times_keep_dependencies_and_in_flight(data):
    p, m = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 13))
    times = st.lists(st.floats(0.01, 10), min_size=p, max_size=p)
    forward_time, backward_time = data.draw(times), data.draw(times)
    transfer_time = data.draw(st.floats(0, 5))
    simulation = simulate(one_f_one_b_all(p, m), forward_time, backward_time, transfer_time)

    assert len(simulation.events) == 2 * p * m
    assert simulation.in_flight == tuple(min(p - stage, m) for stage in range(p))
    assert 0 <= simulation.bubble + 1e-9 < 1
    found = {(event.stage, event.action): event for event in simulation.events}
    for (stage, action), event in found.items():
        step = 1 if action.kind is Kind.FORWARD else -1
        if 0 <= stage - step < p:
            assert event.start >= found[stage - step, action].end + transfer_time - 1e-6
        if action.kind is Kind.BACKWARD:
            assert event.start >= found[stage, Action(Kind.FORWARD, action.microbatch)].end - 1e-6
    for stage in range(p):
        own = [event for event in simulation.events if event.stage == stage]
        assert all(before.end <= after.start + 1e-6 for before, after in itertools.pairwise(own))


def test_two_stages_by_hand():
    """Stage 1 waits for one transfer of 0.5; the gradient takes another 0.5 back."""
    simulation = simulate(one_f_one_b_all(2, 1), forward_time=1, backward_time=[2, 3], transfer_time=0.5)
    assert simulation.events == (
        Event(0, Action.parse("F0"), 0.0, 1.0),
        Event(1, Action.parse("F0"), 1.5, 2.5),
        Event(1, Action.parse("B0"), 2.5, 5.5),
        Event(0, Action.parse("B0"), 6.0, 8.0),
    )
    assert simulation.bubble == pytest.approx(1 - 7 / 16)


def test_an_early_receive_hides_the_transfer():
    """The second transfer overlaps F0 when posted early, and starts only after F0 when posted late."""
    sender = forward_only(0, 2, 2)
    early = simulate([sender, parse("RF0 RF1 F0 F1")], forward_time=[1, 4], transfer_time=1)
    late = simulate([sender, parse("RF0 F0 RF1 F1")], forward_time=[1, 4], transfer_time=1)
    assert early.makespan == 10
    assert late.makespan == 11


def test_deadlock_names_every_stuck_stage():
    """Stage 0 wants B0's gradient before F1, stage 1 wants F1 before it runs B0."""
    schedules = [
        parse("F0 SF0 RB0 B0 F1 SF1 RB1 B1"),
        parse("RF0 F0 RF1 F1 B0 SB0 B1 SB1"),
    ]
    with pytest.raises(ScheduleError, match="deadlock: stage 0 at B0, stage 1 at F1"):
        simulate(schedules)


def test_structural_errors_come_first():
    with pytest.raises(ScheduleError, match="incomplete: stage 0 never runs B0"):
        simulate([parse("F0 F1 B1")])


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"forward_time": 0.0}, "forward_time is 0.0: pass positive"),
        ({"backward_time": [1.0]}, "backward_time has 1 entries for 2 stages: pass one per stage"),
        ({"backward_time": [1.0, float("inf")]}, "backward_time is .*: pass positive, finite times"),
        ({"transfer_time": -1.0}, "transfer_time is -1.0: pass a finite number >= 0"),
    ],
)
def test_wrong_times(times, message):
    with pytest.raises(ConfigurationError, match=message):
        simulate(one_f_one_b_all(2, 2), **times)


def test_from_measured_events():
    """Measured events come in any order and on a clock that does not start at 0."""
    forward, backward = Action.parse("F0"), Action.parse("B0")
    simulation = Simulation.from_events(
        [Event(0, backward, 103.0, 104.0), Event(1, backward, 102.0, 103.0),
         Event(0, forward, 100.0, 101.0), Event(1, forward, 101.0, 102.0)],
        num_stages=2,
    )  # fmt: skip
    assert [(event.stage, event.start) for event in simulation.events] == [(0, 0.0), (1, 1.0), (1, 2.0), (0, 3.0)]
    assert (simulation.makespan, simulation.bubble, simulation.in_flight) == (4.0, 0.5, (1, 1))


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "got no events"),
        ([Event(0, Action.parse("SF0"), 0.0, 1.0)], "event for SF0 on stage 0: pass only forwards and backwards"),
        ([Event(2, Action.parse("F0"), 0.0, 1.0)], "F0 on stage 2 of 2: pass the true num_stages"),
        ([Event(1, Action.parse("F0"), 1.0, 1.0)], "F0 on stage 1 starts at 1.0 and ends at 1.0"),
    ],
)
def test_from_wrong_events(events, message):
    with pytest.raises(ScheduleError, match=message):
        Simulation.from_events(events, num_stages=2)
