"""The pictures: text literally, SVG by its structure."""

import textwrap
from xml.etree import ElementTree

import pytest

from hf_tpp.errors import ConfigurationError
from hf_tpp.pipeline_parallel import schedule, timeline
from hf_tpp.pipeline_parallel.schedule import Action, backward_only, forward_only, one_f_one_b
from hf_tpp.pipeline_parallel.simulator import Event, Simulation, simulate
from hf_tpp.pipeline_parallel.timeline import timeline_svg, timeline_text

PICTURE_4_6 = """\
slot     0         5         10        15        20        25
stage 0  0 1 2 3 . . . . . . <0> 4 <1> 5 <2> . <3> . <4> . <5>
stage 1  . 0 1 2 . . . . <0> 3 <1> 4 <2> 5 <3> . <4> . <5> . .
stage 2  . . 0 1 . . <0> 2 <1> 3 <2> 4 <3> 5 <4> . <5> . . . .
stage 3  . . . 0 <0> 1 <1> 2 <2> 3 <3> 4 <4> 5 <5> . . . . . ."""

SVG = "{http://www.w3.org/2000/svg}"


def simulate_one_f_one_b(p: int, m: int, **times: float) -> Simulation:
    return simulate([one_f_one_b(stage, p, m) for stage in range(p)], **times)


def boxes(svg: str) -> list[ElementTree.Element]:
    rects = ElementTree.fromstring(svg).iter(f"{SVG}rect")
    return [rect for rect in rects if rect.get("class", "").startswith("box ")]


def test_text_of_four_stages_six_microbatches():
    assert timeline_text(simulate_one_f_one_b(4, 6)).splitlines() == [
        *PICTURE_4_6.splitlines(),
        "legend: 0 forward of microbatch 0, <0> its backward, . idle",
        "bubble 33.3%, in flight per stage: 4 3 2 1",
    ]


def test_the_docstrings_show_the_true_pictures():
    assert textwrap.indent(PICTURE_4_6, "    ") in schedule.__doc__
    small = "\n".join(timeline_text(simulate_one_f_one_b(2, 2)).splitlines()[:3])
    assert textwrap.indent(small, "    ") in timeline.__doc__
    halves = [forward_only(stage, 2, 3) + backward_only(stage, 2, 3) for stage in range(2)]
    picture = "\n".join(timeline_text(simulate(halves)).splitlines()[:3])
    assert textwrap.indent(picture, " " * 8) in backward_only.__doc__


def test_text_widens_for_long_numbers_and_long_events():
    rows = timeline_text(simulate_one_f_one_b(1, 11)).splitlines()
    assert rows[1].endswith("9- <9--> 10 <10->")
    rows = timeline_text(simulate_one_f_one_b(1, 2, forward_time=2, backward_time=3)).splitlines()
    assert rows[1] == "stage 0  0-- <0--> 1-- <1-->"
    rows = timeline_text(simulate_one_f_one_b(2, 1, backward_time=1)).splitlines()
    assert rows[1:3] == ["stage 0  0-- .   .   <0>", "stage 1  .   0-- <0> ."]


def test_text_of_forward_only():
    rows = timeline_text(simulate([forward_only(stage, 2, 3) for stage in range(2)])).splitlines()
    assert rows[1:3] == ["stage 0  0 1 2 .", "stage 1  . 0 1 2"]


def test_text_of_measured_seconds_needs_a_slot():
    measured = Simulation.from_events(
        [Event(0, Action.parse("F0"), 5.0, 5.011), Event(0, Action.parse("B0"), 5.011, 5.03)], num_stages=1
    )
    assert timeline_text(measured, slot=0.01).splitlines()[1] == "stage 0  0 <0>"
    with pytest.raises(ConfigurationError, match=r"F0 on stage 0 lasts 0.011, too short for a slot of 1: pass a small"):
        timeline_text(measured)


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 5), (4, 6), (8, 32)])
def test_svg_has_one_box_per_compute(p, m):
    found = boxes(timeline_svg(simulate_one_f_one_b(p, m), "1F1B"))
    assert len(found) == p * m * 2
    assert sum(rect.get("class") == "box forward" for rect in found) == p * m


def test_svg_boxes_follow_the_times():
    """One stage, forward 1 and backward 2: the backward starts where the forward ends, twice as wide."""
    forward, backward = boxes(timeline_svg(simulate_one_f_one_b(1, 1), "1F1B"))
    x, width = float(forward.get("x")), float(forward.get("width"))
    assert float(backward.get("x")) == pytest.approx(x + width)
    assert float(backward.get("width")) == pytest.approx(2 * width)


def test_svg_texts():
    svg = timeline_svg(simulate_one_f_one_b(2, 3), "GPT-2 <tp=1 & pp=2>", unit="ms")
    texts = [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    for expected in ("GPT-2 <tp=1 & pp=2>", "time (ms)", "bubble 25.0%", "stage 0", "stage 1", "forward", "idle"):
        assert expected in texts
    assert [texts.count(str(microbatch)) >= 4 for microbatch in range(3)] == [True] * 3
