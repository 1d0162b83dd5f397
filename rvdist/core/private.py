"""Private interfaces of other libraries: asked for by name, and missed in one sentence.

What relies on one stands in a module `private_LIBRARY.py` of the room that needs it, with the version it was seen on.
"""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rvdist.core.errors import Failed


@dataclass(frozen=True)
class Library:
    """A library by the name of its distribution, and the version on which its private interfaces were `seen`.
    `build` is the name of its distribution for another device."""

    name: str
    seen: str
    build: str = ""

    def get(self, place: str) -> Any:
        """What stands at MODULE:NAME.NAME, or at MODULE:NAME.NAME(PARAMETER) a function that has this parameter. Raises
        Failed where there is no such thing."""
        module, path, parameter = re.fullmatch(r"([\w.]+):([\w.]+?)(?:\((\w+)\))?", place).groups()  # type: ignore[union-attr]
        try:
            found = import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            raise self.lacks(place) from None
        if parameter and parameter not in inspect.signature(found).parameters:  # type: ignore[arg-type]
            raise self.lacks(place)
        return found

    def require(self, *places: str) -> None:
        """Raises Failed where one of these is missing."""
        for place in places:
            self.get(place)

    def lacks(self, what: object) -> Failed:
        """The sentence for what is missing."""
        return Failed(
            f"{self.name} {self.version}: has no {what} any more, which rvdist takes from {self.name} {self.seen}; "
            "install the version that constraints.txt names"
        )

    @property
    def version(self) -> str:
        """The one that is installed; "?" where none is."""
        for name in filter(None, (self.name, self.build)):
            with suppress(PackageNotFoundError):
                return version(name)
        return "?"
