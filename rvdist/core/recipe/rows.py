"""mergekit 0.1.5's merge methods, and two that it lacks: a row each, of what its recipes may say and which
method of ours it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """What is known of a `merge_method`.

    `ours`: the method; `of_models` the one where no base_model is given, and the first model is the base. `weight`: the
    parameter that becomes α; empty where every model takes part alike. `density`: the one that becomes the density.
    `base_is_input`: a base_model is one more of the models. `others`: how many models there are beside the base, at
    least and at most. `normalize` and `rescale`: their defaults. `elects`: the sum is of terms that agree in sign.
    `options`: parameters that are the method's options, one number for all models and tensors, and their defaults.
    `only`: flags that have to be so.
    """

    ours: str
    of_models: str = ""
    weight: str = "weight"
    density: str = ""
    base_is_input: bool = False
    others: tuple[int, int] = (0, 1 << 20)
    normalize: bool = False
    rescale: bool = False
    elects: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    only: Mapping[str, bool] = field(default_factory=dict)

    def parameters(self) -> set[str]:
        """What a recipe may say beside the parameters that all methods have."""
        return {self.weight, self.density, *self.options, *self.only} - {""}


ONE = (1, 1)
ROWS = {
    "linear": Row("linear", base_is_input=True, normalize=True),
    "task_arithmetic": Row("linear"),
    "ties": Row("ties", density="density", normalize=True, elects=True),
    "dare_linear": Row("dare", density="density", rescale=True),
    "dare_ties": Row("dare_ties", density="density", rescale=True, elects=True),
    "slerp": Row("slerp", weight="t", others=ONE),
    "breadcrumbs": Row("breadcrumbs", density="density", options={"gamma": 0.01}, only={"rescale": False}),
    "breadcrumbs_ties": Row(
        "breadcrumbs_ties", density="density", elects=True, options={"gamma": 0.01}, only={"rescale": False}
    ),
    "sce": Row("sce", weight="", density="select_topk"),
    "model_stock": Row("model_stock", weight="", others=(2, 1 << 20), only={"filter_wise": False}),
    "nuslerp": Row("nuslerp", of_models="nuslerp_models", others=(2, 2), only={"nuslerp_flatten": True}),
    "multislerp": Row("multislerp", of_models="multislerp_models", normalize=True),
    "karcher": Row("karcher", weight="", base_is_input=True, options={"max_iter": 10, "tol": 1e-5}),
    "nearswap": Row("nearswap", weight="t", others=ONE),
    "della_linear": Row("della_linear", density="density", rescale=True, options={"epsilon": 0.15}),
    "della": Row("della", density="density", normalize=True, rescale=True, elects=True, options={"epsilon": 0.15}),
    "arcee_fusion": Row("arcee_fusion", weight="", others=ONE),
    "passthrough": Row("linear", weight="", others=(0, 0), base_is_input=True),
    "ram": Row("ram", weight="", options={"epsilon": 1e-5}),
    "iso_c": Row("iso_c"),  # this and the next are not mergekit's
    "tsv_m": Row("tsv_m"),
    "ramplus_tl": Row("ramplus_tl", weight="", options={"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
}
