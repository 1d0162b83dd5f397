"""The house: which room may import which, and which part of a room what. Arrows point down only, without a circle."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import rvdist

PACKAGE = Path(rvdist.__file__).parent
DOORS = {"launch", "api", "inspect", "verify"}
ROOMS = {
    "core": set(),
    "weights": {"core"},
    "merge": {"core", "weights"},
    "evaluate": {"core", "weights"},
    "report": {"core", "weights"},
    "stages": {"core", "weights", "merge", "evaluate", "report"},
    "pocket": set(),
}
# What a part must not know, though its room may. A library counts however it is imported.
BORDERS = {
    "core": {"torch", "vllm", "lm_eval"},
    "weights": {"ray", "vllm", "lm_eval"},
    "weights.checkpoint": {"rvdist.weights"},
    "weights.arithmetic": {"rvdist.weights", "rvdist.core"},
    "weights.anatomy.findings": {"torch", "rvdist.weights"},
    "merge": {"vllm", "lm_eval"},
    "merge.plan": {"ray", "torch"},
    "merge.placement": {"ray", "torch"},
    "merge.roster": {"ray", "torch"},
    "merge.worker": {"ray"},
    "evaluate.fleet": {"lm_eval", "rvdist.evaluate.suite", "rvdist.evaluate.tasks", "rvdist.evaluate.sandbox"},
    "evaluate.fleet.schedule": {"ray", "vllm", "torch"},
    "evaluate.fleet.forecast": {"ray", "vllm", "torch"},
    "evaluate.fleet.failures": {"ray", "vllm", "torch"},
    "evaluate.fleet.engine": {"ray"},
    "evaluate.fleet.swap": {"ray"},
    "evaluate.fleet.mirror": {"ray", "vllm"},
    "evaluate.tasks": {"ray", "vllm", "rvdist.evaluate.fleet"},
    "evaluate.sandbox": {"ray", "vllm", "torch", "lm_eval", "rvdist.evaluate"},
    "report": {"torch", "ray", "vllm", "lm_eval"},
    "report.statistics": {"matplotlib", "rich", "jinja2", "rvdist.weights"},
    "stages": {"torch", "vllm"},
}
# What one module of a part may know across its border: the row of facts that it makes a method from, and what a
# directory without room ends in.
THROUGH = {
    "weights.arithmetic.registry": ("core.method.MethodSpec",),
    "weights.arithmetic.aside": ("core.errors.Failed",),
}


def modules() -> Iterator[tuple[str, Path]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        if name:
            yield name, file


def imported(file: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere: `from a import b` is a.b, which may be a module or what is in one."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def is_within(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")


def test_rooms_import_only_what_lies_below():
    found = defaultdict(set)
    for name, file in modules():
        room = name.split(".")[0]
        below = {other.split(".")[1] for other in imported(file) if other.startswith("rvdist.")} - {"__version__", room}
        allowed = ROOMS.keys() - {"pocket"} if room in DOORS else ROOMS.get(room, set())
        assert below <= allowed, f"{name} must not import {below - allowed}"
        found[room] |= below
    assert found.keys() == ROOMS.keys() | DOORS, "the house has seven rooms and four doors"


def test_the_house_has_five_floors_and_no_circle():
    def floor(room: str, above: tuple[str, ...] = ()) -> int:
        assert room not in above, f"circle: {above}"
        return 1 + max((floor(below, (*above, room)) for below in ROOMS[room]), default=0)

    assert 1 + max(map(floor, ROOMS)) == 5  # and one for the doors


@pytest.mark.parametrize("place", BORDERS)
def test_a_part_does_not_know_what_lies_across_its_border(place: str):
    files = [(name, file) for name, file in modules() if is_within(name, place)]
    assert files, f"there is no rvdist.{place}"
    for name, file in files:
        for other in set(imported(file)) - {f"rvdist.{known}" for known in THROUGH.get(name, ())}:
            own = is_within(other, f"rvdist.{place}")
            crossed = {border for border in BORDERS[place] if is_within(other, border)}
            assert own or not crossed, f"rvdist.{name} must not import {other}"


def test_private_interfaces_of_a_library_stand_in_a_module_of_their_own():
    for name, file in modules():
        for other in imported(file):
            library, *parts = other.split(".")
            inside = library not in ("torch", "rvdist") and any(part[0] == "_" and part[1:2] != "_" for part in parts)
            inside |= other.startswith(("vllm.v1", "vllm.model_executor", "vllm.platforms"))
            assert not inside or "private_" in name, f"rvdist.{name} must not import {other}: see rvdist.core.private"


def test_no_module_imports_itself_in_a_circle():
    files = dict(modules())
    arrows: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        for other in imported(file):
            parts = other.removeprefix("rvdist.").split(".") if other.startswith("rvdist.") else []
            while parts and ".".join(parts) not in files:
                parts.pop()
            arrows[name] |= {".".join(parts)} - {name, ""}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...] = ()) -> None:
        assert name not in above, f"circle: {' → '.join((*above, name))}"
        if name not in done:
            for below in arrows[name]:
                visit(below, (*above, name))
            done.add(name)

    for name in arrows:
        visit(name)


def test_everything_public_says_what_it_is():
    """But for `main`, `close`, functions whose source is in every results file, and methods of a name of which another
    class, such as a protocol, says what it is."""
    without = {"main", "close", "sums", "choice", "control"}

    def public(body: list[ast.stmt], above: str = "") -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                yield f"{above}{node.name}", node
                yield from public(node.body, f"{node.name}.") if isinstance(node, ast.ClassDef) else ()

    named = [(module, *one) for module, file in modules() for one in public(ast.parse(file.read_text()).body)]
    said = {name.partition(".")[2] for _, name, node in named if "." in name and ast.get_docstring(node)}
    silent = [
        f"{module}: {name}"
        for module, name, node in named
        if not ast.get_docstring(node) and name.rpartition(".")[2] not in without
        if not ("." in name and (name.partition(".")[2] in said or isinstance(node.body[0], ast.Expr)))
    ]
    assert silent == [], "each public class and function needs a docstring"
    assert all(ast.get_docstring(ast.parse(file.read_text())) for _, file in modules()), "and each module"


def test_the_tree_in_contributing_names_every_file():
    tree = (PACKAGE.parent / "CONTRIBUTING.md").read_text().split("```text\n")[1].split("```")[0]
    drawn, above = [], []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        above[depth:] = [name]
        assert len(line.split()) > 1, f"{name} needs its line"
        if name.endswith(".py"):
            drawn.append("".join(above))
    files = [file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    assert sorted(drawn) == sorted(files)
