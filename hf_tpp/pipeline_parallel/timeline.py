"""Draw a simulation (or a measured step) as stages x time, in text or as an SVG.

The text form of two stages and two microbatches; every slot is two characters wide, a backward lasts two slots:

    slot     0         5
    stage 0  0 1 . . <0> . <1>
    stage 1  . 0 <0> 1 <1> . .

Source: the layout is figure 4 of Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU
Clusters Using Megatron-LM".
"""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

from hf_tpp.errors import ConfigurationError
from hf_tpp.pipeline_parallel.schedule import Kind
from hf_tpp.pipeline_parallel.simulator import Event, Simulation

_RULER_STEP = 5  # slots between two numbers of the text ruler

# SVG geometry, in pixels: margins around a plot of fixed width, one row per stage.
_WIDTH = 1000
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 84, 84, 56
_ROW, _BOX = 44, 34
_PLOT = _WIDTH - _LEFT - _RIGHT
_SMALLEST_FONT = 7

_STYLE = """
  text { font-family: Helvetica, Arial, sans-serif; font-size: 13px; fill: #334155 }
  .title { font-size: 18px; font-weight: bold; fill: #0f172a }
  .middle { text-anchor: middle }
  .end { text-anchor: end }
  .page { fill: #ffffff }
  .idle { fill: #eef1f5 }
  .grid { stroke: #cbd5e1; stroke-width: 1 }
  .forward { fill: #3b75b5; stroke: #ffffff; stroke-width: 1 }
  .backward { fill: #f3a955; stroke: #ffffff; stroke-width: 1 }
  .on-forward { fill: #ffffff }
  .on-backward { fill: #3b2508 }
"""


def timeline_text(simulation: Simulation, slot: float = 1.0) -> str:
    """Draw a simulation as a grid of characters.

    Args:
        simulation: What to draw.
        slot: Length of one column, in the unit of the simulation; starts and ends are rounded to whole slots.

    Returns:
        A ruler, one row per stage, a legend, and a line with the bubble and the microbatches in flight.

    Raises:
        ConfigurationError: If an event is too short to fill a slot.
    """
    spans = [(event, *_slots(event, slot)) for event in simulation.events]
    num_slots = max(end for _, _, end in spans)
    # The narrowest slot in which every label still fits, with a space after it.
    width = max(math.ceil((len(_label(event, 0)) + 1) / (end - start)) for event, start, end in spans)
    rows = []
    for stage in range(len(simulation.in_flight)):
        cells = {start: (event, end - start) for event, start, end in spans if event.stage == stage}
        row, column = "", 0
        while column < num_slots:
            event, length = cells.get(column, (None, 1))
            row += ("." if event is None else _label(event, length * width - 1)).ljust(length * width)
            column += length
        rows.append(f"stage {stage}".ljust(9) + row.rstrip())
    ruler = "".join(str(column).ljust(_RULER_STEP * width) for column in range(0, num_slots, _RULER_STEP))
    return "\n".join(
        [
            "slot".ljust(9) + ruler.rstrip(),
            *rows,
            "legend: 0 forward of microbatch 0, <0> its backward, . idle",
            f"bubble {simulation.bubble:.1%}, in flight per stage: {' '.join(map(str, simulation.in_flight))}",
        ]
    )


def _slots(event: Event, slot: float) -> tuple[int, int]:
    start, end = round(event.start / slot), round(event.end / slot)
    if start == end:
        raise ConfigurationError(
            f"{event.action} on stage {event.stage} lasts {event.end - event.start:g}, too short for a slot of "
            f"{slot:g}: pass a smaller slot"
        )
    return start, end


def _label(event: Event, length: int) -> str:
    """``3`` for a forward and ``<3>`` for a backward, stretched with dashes to a number of characters."""
    if event.action.kind is Kind.FORWARD:
        return str(event.action.microbatch).ljust(length, "-")
    return f"<{str(event.action.microbatch).ljust(length - 2, '-')}>"


def timeline_svg(simulation: Simulation, title: str, unit: str = "forward times") -> str:
    """Draw a simulation as a self-contained SVG image, 1000 pixels wide.

    Args:
        simulation: What to draw.
        title: Heading of the image.
        unit: Unit of the simulation's times, for the axis ("s", "ms", ...).

    Returns:
        The SVG document. Each event is one ``rect`` of class ``box forward`` or ``box backward``.
    """
    num_stages = len(simulation.in_flight)
    bottom = _TOP + num_stages * _ROW
    parts = [
        f'<rect class="page" width="{_WIDTH}" height="{bottom + _BOTTOM}"/>',
        f'<text class="title" x="{_LEFT}" y="32">{escape(title)}</text>',
        *_legend(simulation),
        *(_row(stage, in_flight) for stage, in_flight in enumerate(simulation.in_flight)),
        *_axis(simulation.makespan, bottom, unit),
        *(_box(event, simulation.makespan, unit) for event in simulation.events),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + _BOTTOM}" '
            f'width="{_WIDTH}" height="{bottom + _BOTTOM}" role="img">',
            f"<style>{_STYLE}</style>",
            *parts,
            "</svg>\n",
        ]
    )


def _legend(simulation: Simulation) -> list[str]:
    parts, x = [], _LEFT
    for name in ("forward", "backward", "idle"):
        parts.append(f'<rect class="{name}" x="{x}" y="48" width="18" height="14" rx="2"/>')
        parts.append(f'<text x="{x + 24}" y="60">{name}</text>')
        x += 110
    parts.append(f'<text x="{x}" y="60">bubble {simulation.bubble:.1%}</text>')
    parts.append(f'<text class="end" x="{_WIDTH - 12}" y="60">in flight</text>')
    return parts


def _row(stage: int, in_flight: int) -> str:
    """The idle background of a stage, its name on the left and its microbatches in flight on the right."""
    top = _TOP + stage * _ROW
    baseline = top + _BOX / 2 + 5
    return (
        f'<text class="end" x="{_LEFT - 12}" y="{baseline:g}">stage {stage}</text>'
        f'<rect class="idle" x="{_LEFT}" y="{top}" width="{_PLOT}" height="{_BOX}" rx="2"/>'
        f'<text class="end" x="{_WIDTH - 12}" y="{baseline:g}">{in_flight}</text>'
    )


def _axis(makespan: float, bottom: int, unit: str) -> list[str]:
    step = _round_step(makespan / 10)
    parts = []
    for index in range(math.floor(makespan / step) + 1):
        x = _LEFT + _PLOT * index * step / makespan
        parts.append(f'<line class="grid" x1="{x:.2f}" y1="{_TOP - 6}" x2="{x:.2f}" y2="{bottom}"/>')
        parts.append(f'<text class="middle" x="{x:.2f}" y="{bottom + 18}">{index * step:g}</text>')
    parts.append(f'<text class="middle" x="{_LEFT + _PLOT / 2:g}" y="{bottom + 42}">time ({escape(unit)})</text>')
    return parts


def _round_step(at_least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below a value: 2.7 -> 5."""
    power: float = 10.0 ** math.floor(math.log10(at_least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= at_least * (1 - 1e-9))


def _box(event: Event, makespan: float, unit: str) -> str:
    """One event, with its microbatch number where the box is wide enough and a tooltip everywhere."""
    kind = "forward" if event.action.kind is Kind.FORWARD else "backward"
    x, width = _LEFT + _PLOT * event.start / makespan, _PLOT * (event.end - event.start) / makespan
    y = _TOP + event.stage * _ROW
    tooltip = f"stage {event.stage} {event.action}: {event.start:.4g} to {event.end:.4g} {escape(unit)}"
    box = (
        f'<rect class="box {kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BOX}" rx="2">'
        f"<title>{tooltip}</title></rect>"
    )
    number = str(event.action.microbatch)
    font_size = min(13.0, (width - 2) / (0.6 * len(number)))  # a digit is about 0.6 of the font size wide
    if font_size < _SMALLEST_FONT:
        return box
    baseline = y + _BOX / 2 + 0.36 * font_size
    style = f'class="middle on-{kind}" style="font-size: {font_size:.1f}px"'
    return box + f'<text {style} x="{x + width / 2:.2f}" y="{baseline:.1f}">{number}</text>'
