from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from made_up import make_arm, make_experiment, make_records, make_task
from PIL import Image

from rvdist.report.pictures.alpha import alpha_figure
from rvdist.report.pictures.drawing import render
from rvdist.report.statistics.compare import summarise

BLUE, PINK = (0, 114, 178), (204, 121, 167)  # the first curve, the first mark


def alpha_plot(rows) -> bytes:
    (png,) = render(lambda: alpha_figure(rows), "png")
    return png


def picture(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def has(pixels: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((pixels == color).all(axis=-1).any())


@pytest.mark.parametrize(
    "alphas,tasks", [((0.0,), 1), ((1.0, 0.0), 2), ((-1.0, 0.0, 0.25, 0.5, 1.0), 1), ((0.0, 1.0), 7)]
)
def test_draws_curve_and_mark(alphas, tasks):
    arms, records, infos = make_experiment(alphas, tasks, n=20)
    pixels = picture(alpha_plot(summarise(arms, records, infos, "baseline")))
    assert has(pixels, BLUE) and has(pixels, PINK)
    assert (pixels[0] == 255).all() and (pixels[-1] == 255).all()  # nothing runs off the paper


def test_no_curve_goes_through_two_prompt_styles():
    arms = [make_arm(f"{prompt} {a:g}", a, prompt) for prompt in ("plain", "think") for a in (0.0, 0.5, 1.0)]
    records = [record for k, arm in enumerate(arms) for record in make_records(arm.name, [1.0] * k + [0.0] * (9 - k))]
    [axes] = alpha_figure(summarise(arms, records, [make_task()], "plain 0")).axes
    curves = [line for line in axes.lines if line.get_marker() in "os" and len(line.get_xdata()) > 1]
    assert [list(curve.get_xdata()) for curve in curves] == [[0.0, 0.5, 1.0]] * 2
    assert [list(curve.get_ydata()) for curve in curves] == [
        pytest.approx([0, 100 / 9, 200 / 9]), pytest.approx([300 / 9, 400 / 9, 500 / 9]),
    ]  # fmt: skip


def test_arms_off_the_line_alone():
    arms, records = [make_arm("donor")], make_records("donor", [1.0, 0.0])
    pixels = picture(alpha_plot(summarise(arms, records, [make_task()], None)))
    assert has(pixels, PINK) and not has(pixels, BLUE)


def test_names_are_not_mathtext():
    arms = [make_arm("$\\frac{", 0.0), make_arm("_$x", None)]
    records = make_records("$\\frac{", [1.0, 0.0], "$a_{") + make_records("_$x", [1.0, 0.0], "$a_{")
    assert alpha_plot(summarise(arms, records, [make_task("$a_{")], None)).startswith(b"\x89PNG")


def test_leaves_no_global_state():
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from rvdist.report.pictures.drawing import render; from rvdist.report.pictures.alpha import alpha_figure\n"
        "from rvdist.report.summary import Row\n"
        "row = Row('a', 'p', 1.0, 'plain', 't', 'acc', 'none', True, True, 0, 0.5, 0.1, 0.4, 0.6, 9)\n"
        "render(lambda: alpha_figure([row]), 'png', 'pdf')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and before == matplotlib.rcParams.copy()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
