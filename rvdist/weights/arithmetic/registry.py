"""The methods by name: a row of `rvdist/core/method.py` becomes the object that computes."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from rvdist.core.method import MethodSpec
from rvdist.weights.arithmetic.method import Method


def build(spec: MethodSpec) -> Method:
    """The method of that name. Raises ValueError where there is none or its density is out of range."""
    spec.check()
    file, made_by = spec.facts.made_by.split(".")
    return cast(Method, getattr(import_module(f"rvdist.weights.arithmetic.{file}"), made_by)(**spec.parameters))
