"""One training step as it ran: what every stage computed and when, gathered and drawn next to the schedule on paper."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from hf_tpp.parallel_model import ParallelState
from hf_tpp.pipeline_parallel.schedule import Action, one_f_one_b
from hf_tpp.pipeline_parallel.simulator import Event, Simulation, simulate
from hf_tpp.pipeline_parallel.timeline import timeline_svg, timeline_text

__all__ = ["Timelines", "draw", "gather_timelines"]

Timelines = list[list[tuple[str, float, float]]]
"""Per stage the actions in order: name, start and end in seconds."""

_LABEL, _COLUMNS = 9, 108  # of the text drawing: "stage 0  ", and what is printed behind it in one line


def gather_timelines(state: ParallelState) -> Timelines:
    """The last recorded pass of every stage's first tensor-parallel rank. Collective: every rank of the job."""
    mine = [(str(timed.action), timed.start, timed.end) for timed in state.calls.runner.timeline]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (state.mesh.pp.rank, state.mesh.tp.rank, mine))
    return [timeline for _, tp_rank, timeline in sorted(everyone) if tp_rank == 0]


def draw(timelines: Timelines, num_microbatches: int, folder: Path) -> None:
    """Print the step that ran; write it to timeline.svg, and 1F1B on paper to schedule.svg."""
    ran = _computes(timelines)
    ideal = simulate([one_f_one_b(stage, len(timelines), num_microbatches) for stage in range(len(timelines))])
    (folder / "timeline.svg").write_text(timeline_svg(ran, "One training step as it ran", unit="ms"))
    (folder / "schedule.svg").write_text(timeline_svg(ideal, "1F1B on paper"))
    slot = 0.99 * min(event.end - event.start for event in ran.events)
    lines = timeline_text(ran, slot).splitlines()
    grid, rest = lines[: len(timelines) + 1], lines[len(timelines) + 1 :]
    print(
        f"\nthe step that ran, {ran.makespan:.0f} ms in slots of {slot:.1f} ms ({ideal.bubble:.1%} bubble on paper):\n"
    )
    for start in range(_LABEL, max(map(len, grid)), _COLUMNS):
        print("\n".join((line[:_LABEL] + line[start : start + _COLUMNS]).rstrip() for line in grid) + "\n")
    print("\n".join(rest))


def _computes(timelines: Timelines) -> Simulation:
    """The forwards and backwards of all stages, in milliseconds; processes of one machine read the same clock."""
    events = [
        Event(stage, action, 1e3 * start, 1e3 * end)
        for stage, timeline in enumerate(timelines)
        for action, start, end in ((Action.parse(name), start, end) for name, start, end in timeline)
        if action.kind.is_compute
    ]
    return Simulation.from_events(events, len(timelines))
