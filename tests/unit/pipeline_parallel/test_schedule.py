"""The schedules themselves, and the errors for schedules that were broken by hand."""

import itertools

import pytest

from hf_tpp.errors import ScheduleError
from hf_tpp.pipeline_parallel.schedule import (
    Action,
    Kind,
    backward_only,
    check_schedules,
    forward_only,
    has_neighbour,
    one_f_one_b,
)

SIZES = [(p, m) for p in range(1, 9) for m in range(1, 2 * p + 2)]


def parse(text: str) -> list[Action]:
    return [Action.parse(word) for word in text.split()]


def one_f_one_b_all(num_stages: int, num_microbatches: int) -> list[list[Action]]:
    return [one_f_one_b(stage, num_stages, num_microbatches) for stage in range(num_stages)]


@pytest.mark.parametrize("kind", Kind)
def test_action_round_trip(kind):
    action = Action(kind, 13)
    assert str(action) == f"{kind.value}13"
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F", "3", "X3", "RB-1", "RF 3", "f3", "F3 ", "RSF1"])
def test_action_parse_rejects(text):
    with pytest.raises(ScheduleError, match=r"cannot read .* as an action: write F, B"):
        Action.parse(text)


def test_the_list_in_the_module_docstring():
    expected = "RF0 RF1 F0 SF0 RB0 F1 SF1 RF2 B0 SB0 RB1 F2 SF2"
    assert one_f_one_b(2, 4, 6)[:13] == parse(expected)


def test_first_and_last_stage_have_one_neighbour():
    assert one_f_one_b(0, 2, 2) == parse("F0 SF0 RB0 F1 SF1 RB1 B0 B1")
    assert one_f_one_b(1, 2, 2) == parse("RF0 F0 RF1 B0 SB0 F1 B1 SB1")


def test_one_stage_does_not_communicate():
    assert one_f_one_b(0, 1, 2) == parse("F0 B0 F1 B1")
    assert forward_only(0, 1, 3) == parse("F0 F1 F2")
    assert backward_only(0, 1, 3) == parse("B0 B1 B2")


def test_forward_only():
    assert forward_only(1, 3, 2) == parse("RF0 RF1 F0 SF0 F1 SF1")


def test_backward_only():
    assert backward_only(1, 3, 2) == parse("RB0 RB1 B0 SB0 B1 SB1")


def both_halves(num_stages: int, num_microbatches: int) -> list[list[Action]]:
    sizes = (num_stages, num_microbatches)
    return [forward_only(stage, *sizes) + backward_only(stage, *sizes) for stage in range(num_stages)]


def test_half_a_pass_is_no_schedule():
    with pytest.raises(ScheduleError, match="incomplete: stage 0 never runs F0"):
        check_schedules([backward_only(stage, 2, 3) for stage in range(2)])


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_complete_and_ordered(p, m):
    check_schedules(one_f_one_b_all(p, m))
    check_schedules([forward_only(stage, p, m) for stage in range(p)])
    check_schedules(both_halves(p, m))


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_warm_up_then_alternating_then_cool_down(p, m):
    for stage, actions in enumerate(one_f_one_b_all(p, m)):
        kinds = "".join(action.kind.value for action in actions if action.kind.is_compute)
        warm_up = min(p - stage - 1, m)
        assert kinds == "F" * warm_up + "FB" * (m - warm_up) + "B" * warm_up


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_receives_are_posted_one_compute_early(p, m):
    receive_of = {Kind.FORWARD: Kind.RECV_FORWARD, Kind.BACKWARD: Kind.RECV_BACKWARD}
    for stage, actions in enumerate(one_f_one_b_all(p, m)):
        computes = [action for action in actions if action.kind.is_compute]
        for previous, compute in itertools.pairwise(computes):
            receive = Action(receive_of[compute.kind], compute.microbatch)
            if has_neighbour(receive.kind, stage, p):
                assert actions.index(receive) == actions.index(previous) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 2, 1), "got stage 2 of 2: pass a stage from 0 to 1"),
        ((-1, 2, 1), "got stage -1 of 2"),
        ((0, 0, 1), "num_stages >= 1 and num_microbatches >= 1, got 0 and 1"),
        ((0, 1, 0), "num_stages >= 1 and num_microbatches >= 1, got 1 and 0"),
    ],
)
def test_wrong_sizes(arguments, message):
    for schedule in (one_f_one_b, forward_only, backward_only):
        with pytest.raises(ScheduleError, match=message):
            schedule(*arguments)


def test_no_actions():
    with pytest.raises(ScheduleError, match="without any action"):
        check_schedules([[], []])


# Edits of a schedule, by the printed names of its actions.


def drop(name):
    return lambda actions: [action for action in actions if str(action) != name]


def swap(one, other):
    names = {one: other, other: one}
    return lambda actions: [Action.parse(names.get(str(action), str(action))) for action in actions]


def duplicate(name):
    return lambda actions: [*actions, Action.parse(name)]


def move_after(name, anchor):
    def edit(actions):
        rest = drop(name)(actions)
        position = rest.index(Action.parse(anchor)) + 1
        return [*rest[:position], Action.parse(name), *rest[position:]]

    return edit


@pytest.mark.parametrize(
    ("stage", "edit", "message"),
    [
        (1, drop("F2"), "incomplete: stage 1 never runs F2: add it once"),
        (2, drop("B3"), "incomplete: stage 2 never runs B3"),
        (1, duplicate("F2"), "duplicate: stage 1 has F2 2 times: keep one"),
        (0, duplicate("RB1"), "duplicate: stage 0 has RB1 2 times"),
        (2, swap("F1", "B1"), "stage 2 runs B1 before its forward: put F1 first"),
        (1, swap("F1", "SF1"), "stage 1 issues SF1 without its compute: put F1 first"),
        (1, swap("B1", "SB1"), "stage 1 issues SB1 without its compute: put B1 first"),
        (1, drop("RF2"), "stage 1 runs F2 but its receive was never posted: put RF2 first"),
        (0, drop("RB2"), "stage 0 runs B2 but its receive was never posted: put RB2 first"),
        (1, move_after("RF2", "F2"), "stage 1 runs F2 but its receive was never posted: put RF2 first"),
        (0, swap("SF2", "SF3"), "stage 0 issues SF3 without its compute"),
        (
            1,
            swap("RF0", "RF1"),
            "from stage 0 to stage 1: message 0 is sent as SF0 and received as RF1: use one order on both sides",
        ),
        (0, drop("SF3"), "from stage 0 to stage 1: message 3 is sent as nothing and received as RF3"),
        (2, drop("SB0"), "from stage 2 to stage 1: message 0 is sent as SB1 and received as RB0"),
        (0, duplicate("RF0"), "stage 0 of 3 has RF0, but no stage on that side: remove it"),
        (2, duplicate("SF0"), "stage 2 of 3 has SF0, but no stage on that side: remove it"),
    ],
)
def test_broken_schedules(stage, edit, message):
    """One stage of the p=3, m=4 schedule is edited; the error names it."""
    schedules = one_f_one_b_all(3, 4)
    schedules[stage] = edit(schedules[stage])
    with pytest.raises(ScheduleError, match=message):
        check_schedules(schedules)
