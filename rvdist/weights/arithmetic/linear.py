"""Task arithmetic: r = t + Σ α·(p − m), for each term d = round(p − m), s = round(α·d), r = round(t + s), in order.

Source: Editing Models with Task Arithmetic, arXiv 2212.04089; Reasoning Vectors, arXiv 2509.01363, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from rvdist.weights.arithmetic.method import Place


class Linear:
    """The weighted sum, for any number of vectors."""

    elementwise_sum = True
    surveys_base = False

    def survey(self, place: Place, chunks: Callable[[], Iterator[list[torch.Tensor]]]) -> None:
        """Needs no survey."""

    def add(
        self, total: torch.Tensor, alphas: Sequence[float], differences: Sequence[torch.Tensor], place: Place
    ) -> None:
        for alpha, difference in zip(alphas, differences, strict=True):
            total.add_(difference if alpha == 1 else difference.mul_(alpha))
