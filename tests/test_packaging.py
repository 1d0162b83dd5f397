"""The wheel, built from a copy of the tree and used far from it: what is installed must not need the repository."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkpoints import POCKET

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without a network and without an environment of its own."""
    pytest.importorskip("setuptools", "77", "setuptools 77 or newer is what builds the wheel")
    place = tmp_path_factory.mktemp("wheel")
    (place / "tree").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "tree")
    for name in ("rvdist", "conf"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, place / "tree" / name, symlinks=True, ignore=ignored)
    built = subprocess.run([sys.executable, "-c", BUILD, place], cwd=place / "tree", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def launch(wheel):
    """The console script of the installed wheel, in a directory of its own."""
    site, elsewhere = wheel.parent / "site", wheel.parent / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    scripts = configparser.ConfigParser()
    scripts.read(next(site.glob("*.dist-info")) / "entry_points.txt")
    module, function = scripts["console_scripts"]["rvdist"].split(":")

    def run(*arguments, command=("-c", f"from {module} import {function}; {function}()")):
        environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
        line = [sys.executable, *command, *arguments]
        return subprocess.run(line, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120)

    found = run(command=("-c", "import rvdist; print(rvdist.__file__)"))
    assert found.stdout.strip() == str(site / "rvdist/__init__.py")
    return run


def test_the_wheel_has_every_file_of_the_package(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    options = {f"rvdist/conf/{file.relative_to(ROOT / 'conf')}" for file in (ROOT / "conf").rglob("*.yaml")}
    tracked = subprocess.run(["git", "ls-files", "rvdist"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert options | {name for name in tracked if not (ROOT / name).is_symlink()} <= held
    assert not [name for name in held if name.startswith(("conf/", "tests/"))]


def test_help_of_the_installed_command(launch):
    by_module = launch("--help", command=("-m", "rvdist.launch"))
    by_name = launch("--help")
    assert by_module.returncode == by_name.returncode == 0, by_name.stderr
    assert by_module.stdout == by_name.stdout
    assert "benchmarks: none, paper, pocket" in by_name.stdout


def test_a_plan_elsewhere(launch):
    donors = (f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}")
    done = launch(f"target={POCKET / 'target'}", *donors, "method=ties", "output=out", "stages=[plan]")
    assert done.returncode == 0, done.stderr
    assert "2,564,352" in done.stdout


def test_options_of_ones_own(launch, tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method/mine.yaml").write_text("# @package merge\nmethod: dare\ndensity: 0.375\n")
    done = launch("--config-dir", str(tmp_path), "method=mine", "--cfg", "job", "--package", "merge")
    assert done.returncode == 0, done.stderr
    assert "density: 0.375" in done.stdout and "method: dare" in done.stdout
