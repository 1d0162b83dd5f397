"""What was found out about vectors, as pictures.

Knows findings and matplotlib's object interface; measures nothing. Names are as they come: they are no mathtext here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, cycle
from statistics import median
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rvdist.report.pictures.drawing import FAINT, LINES, QUIET, empty, grid, label, legend_below, render, title
from rvdist.weights.anatomy.findings import Anatomy

_LARGE = 10.0  # times the median: from there on a logarithmic scale
_FLOOR = 1e-4  # of σ₁: what is beneath is not drawn
_NUMBERED = 14  # columns of a heat map that have room for a number in each cell


def anatomy_plots(anatomy: Anatomy) -> dict[str, bytes]:
    """PNG pictures by name: `layers`, `modules`, `spectra`, `cosines`; those for which there is something to show."""
    wanted: dict[str, Callable[[Anatomy], Figure]] = {}
    if anatomy.layers:
        wanted |= {"layers": _layers, "modules": _modules}
    if any(anatomy.spectra(vector) for vector in anatomy.vectors):
        wanted["spectra"] = _spectra
    if len(anatomy.vectors) > 1:
        wanted["cosines"] = _cosines
    return {name: png for name, draw in wanted.items() for png in render(partial(draw, anatomy), "png")}


def _layers(anatomy: Anatomy) -> Figure:
    """‖v‖ / ‖θ‖ along the layers, a line for each kind of module; what is outside of all layers beside them."""
    styles = dict(zip(_kinds_of_layers(anatomy), LINES, strict=False))
    outside = [cell for cell in anatomy.cells if cell.layer is None]
    figure = empty(7.2, 0.7 + 3.1 * len(anatomy.vectors))
    shown = [cell for cell in anatomy.cells if cell.kind in styles or cell.layer is None]
    scale = _scale([x for vector in anatomy.vectors for cell in shown if (x := cell.percent(vector))])
    ticks = _ticks(anatomy.layers[0].layer or 0, anatomy.layers[-1].layer or 0)
    places = figure.add_gridspec(len(anatomy.vectors), 2, width_ratios=[12, max(0.01, len(outside))])
    legend: dict[str, Any] = {}
    for row, vector in enumerate(anatomy.vectors):
        axes = figure.add_subplot(places[row, 0] if outside else places[row, :])
        for kind, style in styles.items():
            cells = [cell for cell in anatomy.cells if cell.kind == kind and cell.layer is not None]
            points = [
                (cell.layer, max(x, scale.vmin or 0)) for cell in cells if (x := cell.percent(vector)) is not None
            ]
            legend[label(kind)] = _line(axes, points, style)
        axes.set_xticks(ticks)
        axes.set_xlabel("layer")
        axes.set_ylabel("‖v‖ / ‖θ‖, %")
        _percent_axis(axes, scale)
        title(axes, vector)
        if outside:
            beside = figure.add_subplot(places[row, 1])
            for place, cell in enumerate(outside):
                if (x := cell.percent(vector)) is not None:
                    color, marker, _ = styles.get(cell.kind or "", (QUIET, "d", ""))
                    beside.plot(
                        [place], [max(x, scale.vmin or 0)], color=color, marker=marker, markersize=6, linestyle=""
                    )
            names = [label(cell.kind or "") for cell in outside]
            beside.set_xticks(range(len(outside)), names, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
            beside.set_xlim(-0.6, len(outside) - 0.4)
            _percent_axis(beside, scale)
            beside.tick_params(axis="y", which="both", length=0, labelleft=False)
            beside.spines["left"].set_visible(False)
    legend_below(figure, legend)
    return figure


def _modules(anatomy: Anatomy) -> Figure:
    """‖v‖ / ‖θ‖ of every cell as a map, layers across."""
    layers = [part.layer for part in anatomy.layers]
    outside = any(cell.layer is None for cell in anatomy.cells)
    columns = [*layers, None] if outside else list(layers)
    kinds = [part.kind or "" for part in anatomy.kinds]
    maps = []
    for vector in anatomy.vectors:
        shares = np.full((len(kinds), len(columns)), np.nan)
        for cell in anatomy.cells:
            percent = cell.percent(vector)
            if percent is not None:
                shares[kinds.index(cell.kind or ""), columns.index(cell.layer)] = percent
        maps.append(shares)
    scale = _scale([float(x) for shares in maps for x in shares[shares > 0]])
    width = min(11.0, max(5.2, 2.6 + 0.34 * len(columns) + 0.4 * len(columns) * (len(columns) <= _NUMBERED)))
    figure = empty(width, 0.5 + len(maps) * (0.9 + 0.26 * len(kinds)))
    for row, (vector, shares) in enumerate(zip(anatomy.vectors, maps, strict=True)):
        axes = figure.add_subplot(len(maps), 1, row + 1)
        image = axes.imshow(shares, cmap="viridis", norm=scale, aspect="auto", interpolation="nearest")
        axes.set_facecolor("#f3f4f6")  # what the vector or the target lacks
        axes.set_yticks(range(len(kinds)), [label(kind) for kind in kinds])
        ticks = [columns.index(tick) for tick in _ticks(layers[0] or 0, layers[-1] or 0) if tick in layers]
        ticks = [tick for tick in ticks if not outside or tick < len(layers) - len(layers) / 20]  # leaves room
        names = [str(columns[tick]) for tick in ticks]
        axes.set_xticks([*ticks, *[len(layers)] * outside], [*names, *["outside"] * outside])
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        if outside:
            axes.axvline(len(layers) - 0.5, color="white", linewidth=3)
        if len(columns) <= _NUMBERED:
            _numbers(axes, shares, image, lambda percent: f"{percent:#.2g}".removesuffix("."))
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=12)
        bar.set_label("‖v‖ / ‖θ‖, %")
        bar.outline.set_visible(False)
        _percent_ticks(bar.ax, scale)
        title(axes, vector)
        axes.set_xlabel("layer")
    return figure


def _spectra(anatomy: Anatomy) -> Figure:
    """σᵢ / σ₁ of the matrices of each kind: the median one at each place, and from the least to the greatest."""
    kinds = [part.kind or "" for part in anatomy.kinds]
    vectors = [vector for vector in anatomy.vectors if anatomy.spectra(vector)]
    columns = min(len(vectors), 2)
    rows = math.ceil(len(vectors) / columns)
    figure = empty(4.2 * columns + (2.0 if columns == 1 else 0.4), 3.4 * rows + 0.7)
    legend: dict[str, Any] = {}
    for place, vector in enumerate(vectors):
        axes = figure.add_subplot(rows, columns, place + 1)
        for kind, (color, _, dashes) in zip(kinds, cycle(LINES), strict=False):
            spectra = anatomy.spectra(vector, kind)
            if not spectra:
                continue
            reach = min(spectrum.ranks[-1] for spectrum in spectra)
            at = np.unique(np.geomspace(1, reach, 80).round())
            curves = np.array([np.interp(at, s.ranks, np.array(s.values) / s.values[0]) for s in spectra])
            curves[curves <= 0] = np.nan
            with np.errstate(all="ignore"):
                axes.fill_between(at, curves.min(0), curves.max(0), color=color, alpha=0.1, linewidth=0)
            legend[label(kind)] = axes.plot(at, np.median(curves, 0), color=color, linestyle=dashes, linewidth=1.3)[0]
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(max(axes.get_ylim()[0], _FLOOR), 1.15)
        _plain(axes.xaxis)
        _plain(axes.yaxis)
        axes.set_xlabel("i, the place of a singular value")
        axes.set_ylabel("σᵢ / σ₁")
        axes.grid(color=FAINT, linewidth=0.6)
        title(axes, vector)
    legend_below(figure, legend)
    return figure


def _cosines(anatomy: Anatomy) -> Figure:
    """Between all pairs of vectors: over everything as a map, and along the layers as lines."""
    count = len(anatomy.vectors)
    names = [label(vector) for vector in anatomy.vectors]
    side = 1.2 + 0.62 * count
    figure = empty(side + 1.2 + (4.4 if anatomy.layers else 0), max(3.2, side + 0.6))
    places = figure.add_gridspec(1, 2, width_ratios=[side, 4.0]) if anatomy.layers else figure.add_gridspec(1, 1)
    axes = figure.add_subplot(places[0])
    cosines = np.array([[math.nan if x is None else x for x in row] for row in anatomy.whole.cosines])
    image = axes.imshow(cosines, cmap="RdBu_r", norm=Normalize(-1, 1), interpolation="nearest")
    axes.set_xticks(range(count), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), names)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _numbers(axes, cosines, image, lambda cosine: f"{round(cosine, 2) + 0.0:.2f}".replace("-", "−"))
    title(axes, "cosine, all tensors")
    if anatomy.layers:
        along = figure.add_subplot(places[1])
        pairs = sorted(combinations(range(count), 2), key=lambda pair: -abs(np.nan_to_num(cosines[pair])))[: len(LINES)]
        for (i, j), style in zip(pairs, LINES, strict=False):
            points = [(part.layer, x) for part in anatomy.layers if (x := part.cosines[i][j]) is not None]
            _line(along, points, style).set_label(f"{names[i]} · {names[j]}")
        along.axhline(0, color=QUIET, linewidth=0.8, zorder=0)
        along.set_xticks(_ticks(anatomy.layers[0].layer or 0, anatomy.layers[-1].layer or 0))
        along.set_xlabel("layer")
        shown = [x for part in anatomy.layers for i, j in pairs if (x := part.cosines[i][j]) is not None]
        along.set_ylim(1.1 * min([-0.1, *shown]), 1.1 * max([0.1, *shown]))
        title(along, "by layer")
        grid(along, "y")
        along.legend(frameon=False, fontsize=8, loc="best")
    return figure


def _kinds_of_layers(anatomy: Anatomy) -> list[str]:
    """The kinds that layers are made of, at most as many as there are lines: those with the most of the vectors."""
    within = dict.fromkeys(cell.kind or "" for cell in anatomy.cells if cell.layer is not None)
    size = {part.kind: max((m.norm for m in part.vectors.values()), default=0.0) for part in anatomy.kinds}
    chosen = sorted(within, key=lambda kind: -size[kind])[: len(LINES)]
    return [kind for kind in within if kind in chosen]


def _scale(values: Sequence[float]) -> Normalize:
    """From 0; logarithmic where a few values are so large that the others could not be told apart. What is beneath a
    logarithmic scale, such as normalisations, which hardly change, is shown as its lowest value."""
    low, middle, high = (min(values), median(values), max(values)) if values else (0.0, 1.0, 1.0)
    if high > _LARGE * middle:
        return LogNorm(max(low, middle / _LARGE), high, clip=True)
    return Normalize(0, high)


def _percent_axis(axes: Any, scale: Normalize) -> None:
    axes.set_ylim(scale.vmin, (scale.vmax or 1) * 1.08)
    if isinstance(scale, LogNorm):
        axes.set_yscale("log")
        axes.set_ylim((scale.vmin or 1) / 1.2, (scale.vmax or 1) * 1.2)
    _percent_ticks(axes, scale)
    grid(axes, "y")


def _percent_ticks(axes: Any, scale: Normalize) -> None:
    if isinstance(scale, LogNorm):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        _plain(axes.yaxis)


def _plain(axis: Any) -> None:
    """Numbers as they are read, for logarithmic axes."""
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _numbers(axes: Any, values: Any, image: Any, text: Callable[[float], str]) -> None:
    """A number in each cell, in black or white, whichever can be read on its colour."""
    for (y, x), value in np.ndenumerate(values):
        if not math.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
            axes.text(x, y, text(value), ha="center", va="center", fontsize=7.5, color="white" if dark else "#222222")


def _line(axes: Any, points: Sequence[tuple[int | None, float]], style: tuple[str, str, str]) -> Any:
    color, marker, dashes = style
    x, y = [layer for layer, _ in points], [value for _, value in points]
    size = 4 if len(points) <= 16 else 2.5
    return axes.plot(x, y, color=color, marker=marker, linestyle=dashes, markersize=size, linewidth=1.2)[0]


def _ticks(first: int, last: int) -> list[int]:
    """Some of the layers, evenly."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, last + 1) if (last - first) / step <= 16)
    return list(range(first + -first % step, last + 1, step))
