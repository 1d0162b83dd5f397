"""Numbers, verdicts and formulas in words, the same on the terminal, in the page and on the card.

Knows rows and points; knows no markup, so whoever shows the words escapes them. Only the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol

from rvdist.core.point import WeightPoint, name_of
from rvdist.core.text import is_repository
from rvdist.core.text import printable as printable
from rvdist.report.summary import LEVEL, UNITS, Row

MARK = "†"
MARK_NOTE = f"{MARK} significant alone, but does not survive Holm's correction for the number of comparisons."


def metric_name(metric: str, filter_: str) -> str:
    """A score's name: of a metric that reads an answer through one of several filters, with the filter."""
    return metric if filter_ == "none" else f"{metric} ({filter_})"


def by_task(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """The primary scores, task by task."""
    return [(task, list(group)) for task, group in groupby((r for r in rows if r.primary), lambda row: row.task)]


class Scale:
    """How the numbers of one task are written: percent when the score is a share, else as they are, in their `unit`;
    differences are in `step`."""

    def __init__(self, rows: Sequence[Row]) -> None:
        ends = [x for row in rows for x in (row.value, row.ci_low, row.ci_high) if x is not None]
        own = UNITS.get(rows[0].metric) if rows else None
        self.percent = own is None and all(0 <= x <= 1 for x in ends)
        self.unit = own or "%" * self.percent
        self.step = "points" if self.percent else self.unit
        self.factor = 100 if self.percent else 1

    def number(self, x: float | None, sign: bool = False) -> str:
        """A score or a difference; ? where it is not known."""
        if x is None or not math.isfinite(x):
            return "?"
        text = f"{100 * x:+.1f}" if self.percent else f"{x:+.4g}"
        if not float(text):
            text = text[1:]  # neither +0 nor −0
        return (text if sign else text.removeprefix("+")).replace("-", "−")

    def score(self, row: Row) -> str:
        """A row's score with its interval."""
        return f"{self.number(row.value)} [{self.number(row.ci_low)}, {self.number(row.ci_high)}]"

    def delta(self, row: Row) -> str:
        """A row's change with its interval; empty for the baseline."""
        return "" if row.delta is None else self.change(row.delta, row.delta_ci_low, row.delta_ci_high)

    def change(self, delta: float, low: float | None, high: float | None) -> str:
        """A difference with its interval, each with its sign."""
        return f"{self.number(delta, sign=True)} [{self.number(low, sign=True)}, {self.number(high, sign=True)}]"

    def amount(self, x: float) -> str:
        """How large a difference is, with its unit."""
        return f"{self.number(abs(x))} {self.step}".strip()


def p_text(p: float | None) -> str:
    """A p value, to two digits or so; empty where there is none."""
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


class Tested(Protocol):
    """A difference and what its test says, or neither."""

    @property
    def delta(self) -> float | None: ...
    @property
    def p_value(self) -> float | None: ...
    @property
    def p_adjusted(self) -> float | None: ...
    @property
    def verdict(self) -> str | None: ...


def significant(tested: Tested) -> bool:
    """Whether the difference can be told from chance, taken alone."""
    return tested.p_value is not None and tested.p_value < LEVEL


def survives(tested: Tested) -> bool:
    """Whether it still can after correction for all of its table."""
    return tested.p_adjusted is not None and tested.p_adjusted < LEVEL


def mark(tested: Tested) -> str:
    """MARK where it is significant alone and not after correction."""
    return MARK * (significant(tested) and tested.p_adjusted is not None and not survives(tested))


def verdict_text(tested: Tested) -> str:
    """The verdict, with a mark where the comparison alone says more; baseline where nothing was compared."""
    return (tested.verdict or "baseline" * (tested.delta is None)) + mark(tested)


def is_hub_id(source: str) -> bool:
    """Whether a source names a Hub repository (`org/name`, perhaps `@revision`) rather than a directory."""
    return is_repository(source) and not Path(source).exists()


def source_name(source: str) -> str:
    """What to call a checkpoint in public: its Hub id, or the last component of its path."""
    return source if is_hub_id(source) else name_of(source)


def formula(point: WeightPoint, names: Mapping[str, str] | None = None) -> str:
    """The point as the paper writes it: target + 0.5 · m ⊙ (plus − minus); where that is not simply a sum, with the
    method around it: TIES(target + 0.5 · (plus − minus); density 0.2)."""

    def name(source: str) -> str:
        return names[source] if names else source_name(source)

    text = name(point.base)
    for term in point.active_terms:
        mask = "" if term.mask == type(term.mask)() else "m ⊙ "
        sign = "−" if term.alpha < 0 else "+"
        vector = " − ".join(name(source) for source in term.vector.sources())
        text += f" {sign} {abs(term.alpha):g} · {mask}({vector})"
    method = point.method
    if not method.facts.sentence:
        return text
    own = list(dict.fromkeys(number for term in point.active_terms for number in term.density))
    density = " … ".join(f"{number:g}" for number in ([min(own), max(own)] if own else [method.density]))
    values = {"density": density, "seed": str(method.seed)}
    values |= {key: f"{number:g}" for key, number in method.all_options.items()}
    given = ", ".join(f"{key} {values[key]}" for key in method.parameters)
    return f"{method.name.upper().replace('_', '-')}({text}{'; ' if given else ''}{given})"
