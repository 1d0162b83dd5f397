"""The house: which room may import which. Arrows point down only; `import rvdist` is cheap."""

import ast
from pathlib import Path

import rvdist

PACKAGE = Path(rvdist.__file__).parent
MAY_IMPORT = {
    "errors": set(),
    "point": set(),
    "recipe": {"errors", "point"},
    "record": {"errors"},
    "timing": set(),
    "log": {"timing"},
    "progress": {"log"},
    "config": {"errors", "point"},
    "checkpoint": {"errors"},
    "arithmetic": set(),
    "cluster": {"errors"},
    "ends": {"cluster"},
    "operand": {"checkpoint", "errors"},
    "vector": {"arithmetic", "checkpoint", "errors", "operand", "point"},
    "anatomy": {"arithmetic", "checkpoint", "errors", "operand", "point"},
    "pipeline": {"arithmetic", "errors"},
    "reader": {"arithmetic", "checkpoint", "operand", "pipeline", "point"},
    "configurations": set(),
    "coverage": {"checkpoint", "operand"},
    "compat": {"checkpoint", "configurations", "coverage", "errors", "point"},
    "merge": {"arithmetic", "checkpoint", "cluster", "errors", "pipeline", "point", "reader", "timing"},
    "fleet": {"checkpoint", "cluster", "errors", "log", "point", "reader", "record", "tasks", "timing"},
    "report": {"anatomy", "point", "record"},
    "pocket": set(),
    "tasks": {"errors"},
    "job": {"checkpoint", "config", "log", "point", "record", "report", "timing"},
    "scoring": {"errors", "fleet", "job", "point", "record", "report"},
    "warm": {"cluster", "config", "errors", "fleet", "timing"},
    "batch": {"config", "errors", "job", "point"},
    "preview": {"cluster", "config", "merge", "job", "point"},
    "evaluation": {"checkpoint", "cluster", "config", "errors", "fleet", "job", "point", "scoring", "warm"},
    "racing": {"config", "errors", "evaluation", "fleet", "point", "record", "report", "scoring"},
    "connectivity": {"config", "evaluation", "job", "point", "report", "scoring"},
    "analysis": {"anatomy", "checkpoint", "progress", "job", "report"},
    "publish": {"checkpoint", "config", "errors", "job", "report"},
    "merging": {"checkpoint", "config", "job", "merge", "point", "progress", "report", "vector", "warm"},
    "preparation": {
        "checkpoint", "cluster", "compat", "config", "errors", "job", "merge", "merging", "point", "publish",
        "recipe",
    },
    "stages": {
        "analysis", "batch", "checkpoint", "cluster", "config", "connectivity", "errors", "evaluation", "job", "log",
        "merging", "point", "preparation", "preview", "publish", "racing", "report", "scoring", "timing", "warm",
    },
    "api": {"arithmetic", "config", "errors", "log", "point", "record", "job", "report", "stages", "timing", "warm"},
    "verify": {"checkpoint", "errors"},
    "inspect": {"checkpoint", "config", "errors", "point", "report", "timing"},
    "multirun": {"config", "log", "job", "stages", "timing", "warm"},
    "launch": {"config", "ends", "errors", "log", "multirun", "job", "stages"},
}  # fmt: skip


def rooms_imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
            if node.module == "rvdist":
                modules = [f"rvdist.{alias.name}" for alias in node.names if alias.name != "__version__"]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        yield from (module.split(".")[1] for module in modules if module.startswith("rvdist."))


def test_arrows_point_down():
    found = {}
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, set()).update(set(rooms_imported(file)) - {room})
    assert found.keys() == MAY_IMPORT.keys(), "a new room needs a line above"
    for room, imported in found.items():
        assert imported <= MAY_IMPORT[room], f"{room} must not import {imported - MAY_IMPORT[room]}"


def test_the_map_itself_has_no_circle():
    floors = {}

    def floor(room, above=()):
        assert room not in above, f"circle: {above}"
        if room not in floors:
            floors[room] = 1 + max((floor(below, (*above, room)) for below in MAY_IMPORT[room]), default=0)
        return floors[room]

    assert floor("launch") > floor("merge") > floor("reader") > floor("checkpoint") > floor("errors")
