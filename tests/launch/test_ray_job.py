"""`ray job submit` against a real head with its job API on loopback, a token, and a tree of which not all is to go."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import POCKET, launch

ROOT = Path(__file__).resolve().parents[2]
RAY = (sys.executable, "-m", "ray.scripts.scripts")
FAMILY = ("target=rvdist/pocket/target", "vector.plus=rvdist/pocket/grpo", "vector.minus=rvdist/pocket/sft")
DECOYS = (
    ".git/config",
    ".venv/lib/torch.py",
    "outputs/demo/report.html",
    "out.partial/journal.jsonl",
    "model.safetensors",
    "models/target/model.safetensors",
    "rvdist/pocket/mine/deep/model.safetensors",
    "tests/core/test_config.py",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which somebody has worked."""
    made = tmp_path_factory.mktemp("job") / "tree"
    for name in ("rvdist", "conf", "launch"):
        shutil.copytree(ROOT / name, made / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml"):
        shutil.copy(ROOT / name, made)
    for name in DECOYS:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).touch()
    return made


def files(place: Path) -> set[str]:
    """Every file under `place`, through links to directories, by its path there."""
    found = set()
    for directory, _, names in os.walk(place, followlinks=True):
        found |= {str((Path(directory) / name).relative_to(place)) for name in names}
    return {name for name in found if "__pycache__" not in name}


@pytest.mark.heavy
def test_what_a_job_takes_along(tree: Path, tmp_path: Path) -> None:
    """Packed by Ray's own function."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package, unzip_package

    excludes = get_runtime_env_default_excludes()
    create_package(str(tree), tmp_path / "package.zip", include_gitignore=True, excludes=excludes)
    unzip_package(str(tmp_path / "package.zip"), str(tmp_path / "unpacked"), False, False)
    assert files(tmp_path / "unpacked") == files(tree) - set(DECOYS)
    assert (tmp_path / "unpacked/rvdist/pocket/grpo/model.safetensors").exists()
    assert (tmp_path / "unpacked/conf/benchmarks/none.yaml").exists()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("output", ("output=out",)),
        ("vector.save", ("vector.save=v", "hydra.run.dir={kept}")),
        ("hydra.run.dir", ("output={kept}/out",)),
        ("hydra.sweep.dir", ("-m", "alpha=0.5,1", "output={kept}/out-{{alpha}}")),
    ],
)
def test_nothing_is_written_where_it_would_be_deleted(key: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    job = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_0"
    job.mkdir(parents=True)
    family = [argument.replace("rvdist/pocket", str(POCKET)) for argument in FAMILY]
    done = launch(*(argument.format(kept=tmp_path / "kept") for argument in arguments), *family, cwd=job)
    assert done.returncode == 2
    for sentence in done.stderr.splitlines():
        assert key in sentence.split(": /")[0]
        assert sentence.endswith("is in the working directory of a Ray job and deleted with it; give an absolute path")
    assert done.stderr and not (tmp_path / "kept").exists()
    assert not [path for path in job.rglob("*") if path.is_file() and path.name != "multirun.yaml"], "Hydra's own"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which `ray job` reaches a head that wants a token."""
    place = tmp_path_factory.mktemp("head")
    token = place / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    port, dashboard, agent, client = (str(one.getsockname()[1]) for one in sockets)
    for one in sockets:
        one.close()
    inside = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    options = [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    options += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    short = Path(f"/tmp/rvdist-{os.getpid()}-head")
    command = [*RAY, "start", "--head", "--block", *options, f"--temp-dir={short}"]
    log = (place / "log").open("w")
    inside["PATH"] = f"{Path(sys.executable).parent}:{inside['PATH']}"
    running = subprocess.Popen(command, env=inside, stdout=log, stderr=log)
    inside |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "GCS": f"127.0.0.1:{port}"}
    yield inside
    running.terminate()
    running.wait(60)
    shutil.rmtree(short, ignore_errors=True)


def submit(environment: dict[str, str], cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Submits and waits for the end; tries again while the head is still starting."""
    line = [*RAY, "job", "submit", "--working-dir", ".", "--", *command]
    deadline = time.monotonic() + 180
    while True:
        done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)
        starting = "Failed to connect" in done.stderr or "try again later" in done.stderr
        if not starting or time.monotonic() > deadline:
            return done


@pytest.mark.slow
def test_a_job_merges_on_the_cluster_it_was_submitted_to(tree: Path, head: dict[str, str], tmp_path: Path) -> None:
    kept = ("output={0}/out", "hydra.run.dir={0}/run")
    command = ["python", "-m", "rvdist.launch", *FAMILY, *(argument.format(tmp_path) for argument in kept)]
    done = submit(head, tree, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"wrote {tmp_path}/out" in done.stdout
    assert (tmp_path / "out/model.safetensors").exists() and (tmp_path / "run/config.yaml").exists()
    assert "session_" not in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.slow
def test_without_the_token_nobody_gets_in(head: dict[str, str], tree: Path, tmp_path: Path) -> None:
    """Also shows that the cluster of the test above did want it."""
    submit(head, tree, "true")
    stranger = {key: value for key, value in head.items() if not key.startswith("RAY_AUTH")} | {"HOME": str(tmp_path)}
    done = submit(stranger, tree, "true")
    assert done.returncode != 0 and "AuthenticationError" in done.stderr
    merge = [sys.executable, "-m", "rvdist.launch", *FAMILY, f"output={tmp_path}/out", f"hydra.run.dir={tmp_path}/run"]
    merge.append(f"cluster.address={head['GCS']}")
    for mode in ({}, {"RAY_AUTH_MODE": "token"}):
        done = subprocess.run(merge, cwd=tree, env=stranger | mode, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2, done.stderr
        assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file" in done.stderr.splitlines()[-1]
        assert not (tmp_path / "out").exists()
