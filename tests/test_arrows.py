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
    "fleet": {"checkpoint", "cluster", "errors", "log", "point", "reader", "record", "tasks"},
    "report": {"anatomy", "point", "record"},
    "pocket": set(),
    "tasks": {"errors"},
    "run": {"checkpoint", "config", "errors", "log", "point", "record", "report", "timing"},
    "warm": {"cluster", "config", "errors", "fleet", "timing"},
    "batch": {"config", "errors", "evaluation", "point", "run"},
    "preview": {"cluster", "config", "merge", "point", "run"},
    "evaluation": {"cluster", "config", "errors", "fleet", "point", "record", "report", "run", "warm", "checkpoint"},
    "racing": {"config", "errors", "evaluation", "fleet", "point", "record", "report", "run", "warm"},
    "connectivity": {"config", "evaluation", "point", "report", "run"},
    "analysis": {"anatomy", "checkpoint", "progress", "report", "run"},
    "publish": {"checkpoint", "config", "errors", "point", "report", "run"},
    "merging": {"checkpoint", "config", "merge", "point", "progress", "report", "run", "timing", "vector", "warm"},
    "preparation": {
        "checkpoint", "cluster", "compat", "config", "connectivity", "errors", "merge", "merging", "point", "publish",
        "recipe", "run",
    },
    "stages": {
        "analysis", "batch", "checkpoint", "cluster", "config", "connectivity", "errors", "evaluation", "log",
        "merging", "point", "preparation", "preview", "publish", "racing", "report", "run", "timing", "warm",
    },
    "api": {"arithmetic", "config", "errors", "log", "point", "record", "report", "run", "stages", "timing", "warm"},
    "verify": {"checkpoint", "errors"},
    "inspect": {"checkpoint", "config", "errors", "point", "report", "timing"},
    "multirun": {"config", "log", "run", "stages", "timing", "warm"},
    "launch": {"config", "ends", "errors", "log", "multirun", "run", "stages"},
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
