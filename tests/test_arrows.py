"""The house: which room may import which. Arrows point down only; `import rvdist` is cheap."""

import ast
from pathlib import Path

import rvdist

PACKAGE = Path(rvdist.__file__).parent
MAY_IMPORT = {
    "core": set(),
    "pocket": set(),
    "weights": {"core"},
    "evaluate": {"core", "weights"},
    "merge": {"core", "weights"},
    "report": {"core", "weights"},
    "verify": {"core", "weights"},
    "inspect": {"core", "report", "weights"},
    "stages": {"core", "evaluate", "merge", "report", "weights"},
    "api": {"core", "report", "stages", "weights"},
    "launch": {"core", "stages"},
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

    assert floor("launch") > floor("merge") > floor("weights") > floor("core")
