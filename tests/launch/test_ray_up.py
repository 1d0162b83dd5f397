"""launch/ray-up.yaml for real: `ray up` and `ray exec` on two machines within this one, by an `ssh` and an `rsync` of
ours. Each machine has a home, and in it an environment that is already set up: that of these tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from checkpoints import POCKET
from machines import ADDRESSES, connected

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path(__file__).with_name("ssh")
TEMPORARY = f"/tmp/rvdist-{os.getpid()}-up"
PYTHON = """#!/bin/bash
exec {python} "$@"
"""
RAY = """#!/bin/bash
# `ray stop` ends every Ray that this user can see, on all machines within this one.
[[ "$1" == stop ]] || exec {python} -m ray.scripts.scripts "$@"
"""

Ray = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("up")


@pytest.fixture(scope="module")
def ray(place: Path) -> Iterator[Ray]:
    """`ray` as it is typed at the root of the checkout, on a machine that is none of the two."""
    machines = connected(place)
    if not machines:
        pytest.skip("namespaces are not permitted here")
    for machine, address in zip(machines, ADDRESSES, strict=True):
        (place / address).write_text(str(machine.pid))
        environment = place / f"home-{address}" / "rvdist" / ".venv"
        (environment / "bin").mkdir(parents=True)
        for name, script in (("python", PYTHON), ("ray", RAY)):
            (environment / "bin" / name).write_text(script.format(python=sys.executable))
            (environment / "bin" / name).chmod(0o755)
        (environment / "ready").touch()
        (environment.parents[1] / ".bashrc").write_text(f"export PATH={STUBS}:$PATH\n")
    config = yaml.safe_load((ROOT / "launch" / "ray-up.yaml").read_text())
    config |= {"provider": {"type": "local", "head_ip": ADDRESSES[0], "worker_ips": [ADDRESSES[1]]}}
    config |= {"min_workers": 1, "max_workers": 1, "cluster_name": f"rvdist-{os.getpid()}"}
    (place / "ray-up.yaml").write_text(yaml.safe_dump(config))
    (place / "home").mkdir()
    inside = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "HOME": str(place / "home"),
        "NODES": str(place),
        "TEMPORARY": TEMPORARY,
        "RAY_TMPDIR": f"{TEMPORARY}-here",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{STUBS}:{os.environ['PATH']}",
    }

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        return subprocess.run(
            command, cwd=ROOT, env=inside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400
        )

    yield run
    for machine in machines:
        machine.end()
    for left in Path("/tmp").glob(Path(TEMPORARY).name + "-*"):
        shutil.rmtree(left, ignore_errors=True)


@pytest.mark.slow
def test_a_merge_on_the_machines_of_ray_up(ray: Ray, place: Path, tmp_path: Path) -> None:
    config = str(place / "ray-up.yaml")
    made = ray("get-auth-token", "--generate")
    assert made.returncode == 0, made.stdout
    up = ray("up", "--yes", "--no-config-cache", config)
    assert up.returncode == 0, up.stdout
    donors = f"target={POCKET}/target vector.plus={POCKET}/grpo vector.minus={POCKET}/sft"
    keys = f"cluster=existing cluster.nodes=2 {donors} output={tmp_path}/out hydra.run.dir={tmp_path}/run"
    done = ray("exec", config, f"cd ~/rvdist && .venv/bin/python -m rvdist.launch {keys}")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out/model.safetensors").exists()
    assert "not seen" not in done.stdout
    steps = (place / "steps").read_text().splitlines()
    starts = ("start --head", "start --address=$RAY_HEAD_IP")
    for address, start in zip(ADDRESSES, starts, strict=True):
        told = [line for line in steps if line.startswith(address)]
        assert any("RAY_AUTH_MODE=token" in line and f"/ray {start}" in line for line in told)
        home = place / f"home-{address}"
        assert (home / ".ray/auth_token").read_text() == made.stdout.splitlines()[-1]
        assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
        assert (home / "rvdist/rvdist/conf/config.yaml").exists() and (home / "rvdist/Makefile").exists()
