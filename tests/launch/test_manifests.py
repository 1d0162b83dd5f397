"""launch/'s manifests and Dockerfile: what the tools they are for would say of them, and that the command takes what
they pass to it."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import launch

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"

# Field → type of the parts of Kubernetes' PodSpec that are used, and of ray.io/v1 RayJob as KubeRay 1.7.0 defines it;
# `!` where it is required, `*` for any key.
POD = {
    "metadata": "object",
    "spec": {
        "containers!": [
            {
                "name!": "string",
                "image": "string",
                "env": [
                    {
                        "name!": "string",
                        "value": "string",
                        "valueFrom": {"secretKeyRef": {"name!": "string", "key!": "string", "optional": "boolean"}},
                    }
                ],
                "ports": [{"containerPort!": "integer", "name": "string"}],
                "resources": {"requests": {"*": "quantity"}, "limits": {"*": "quantity"}},
                "volumeMounts": [{"name!": "string", "mountPath!": "string"}],
            }
        ],
        "securityContext": {
            "runAsUser": "integer",
            "runAsGroup": "integer",
            "fsGroup": "integer",
            "fsGroupChangePolicy": "string",
        },
        "tolerations": [{"key": "string", "operator": "string", "effect": "string"}],
        "volumes": [
            {
                "name!": "string",
                "persistentVolumeClaim": {"claimName!": "string"},
                "emptyDir": {"medium": "string", "sizeLimit": "quantity"},
            }
        ],
    },
}
GROUP = {
    "labels": {"*": "string"},
    "rayStartParams": {"*": "string"},
    "resources": {"*": "string"},
    "template!": POD,
}
RAYJOB = {
    "apiVersion!": "string",
    "kind!": "string",
    "metadata": {"name": "string", "generateName": "string"},
    "spec": {
        "activeDeadlineSeconds": "integer",
        "backoffLimit": "integer",
        "clusterSelector": {"*": "string"},
        "deletionStrategy": "object",
        "entrypoint": "string",
        "entrypointNumCpus": "number",
        "entrypointNumGpus": "number",
        "entrypointResources": "string",
        "jobId": "string",
        "managedBy": "string",
        "metadata": {"*": "string"},
        "preRunningDeadlineSeconds": "integer",
        "rayClusterSpec": {
            "authOptions": {"enableK8sTokenAuth": "boolean", "mode": "disabled|token", "secretName": "string"},
            "autoscalerOptions": "object",
            "enableInTreeAutoscaling": "boolean",
            "gcsFaultToleranceOptions": "object",
            "headGroupSpec!": GROUP | {"enableIngress": "boolean", "headService": "object", "serviceType": "string"},
            "headServiceAnnotations": {"*": "string"},
            "managedBy": "string",
            "networkPolicy": "object",
            "rayVersion": "string",
            "suspend": "boolean",
            "tlsOptions": "object",
            "upgradeStrategy": "object",
            "workerGroupSpecs": [
                GROUP
                | {
                    "groupName!": "string",
                    "idleTimeoutSeconds": "integer",
                    "maxReplicas!": "integer",
                    "minReplicas!": "integer",
                    "numOfHosts": "integer",
                    "priority": "integer",
                    "replicas": "integer",
                    "scaleStrategy": "object",
                    "suspend": "boolean",
                }
            ],
        },
        "runtimeEnvYAML": "string",
        "shutdownAfterJobFinishes": "boolean",
        "submissionMode": "string",
        "submitterConfig": "object",
        "submitterPodTemplate": POD,
        "suspend": "boolean",
        "ttlSecondsAfterFinished": "integer",
    },
}
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?")
IS = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "quantity": lambda value: bool(QUANTITY.fullmatch(str(value))),
    "disabled|token": lambda value: value in ("disabled", "token"),
}


def wrong(value: Any, types: Any, path: str = "") -> list[str]:
    """What a server would refuse: fields that are not known, lack, or are of another type."""
    if isinstance(types, str):
        return [] if IS[types](value) else [f"{path}: {value!r} is no {types}"]
    if not isinstance(value, type(types)):
        return [f"{path}: {value!r} is no {type(types).__name__}"]
    if isinstance(types, list):
        return [line for inner in value for line in wrong(inner, types[0], f"{path}[]")]
    known = {key.removesuffix("!"): inner for key, inner in types.items()}
    found = [f"{path}.{key[:-1]}: lacks" for key in types if key.endswith("!") and key[:-1] not in value]
    for key, inner in value.items():
        if key in known or "*" in known:
            found += wrong(inner, known.get(key, known.get("*")), f"{path}.{key}")
        else:
            found.append(f"{path}.{key}: not known")
    return found


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())


def pods(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_rayjob_has_only_fields_that_kuberay_knows(rayjob: dict[str, Any]) -> None:
    assert wrong(rayjob, RAYJOB) == []
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    assert rayjob["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")


def test_the_table_finds_what_is_wrong(rayjob: dict[str, Any]) -> None:
    spec = rayjob["spec"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    lacking = {key: value for key, value in workers.items() if key != "minReplicas"}
    lacking |= {"rayStartParams": {"block": True}, "template": {"spec": {"containers": [{"image": "x"}]}}}
    cluster = spec["rayClusterSpec"] | {"workerGroupSpecs": [lacking], "head": {}, "authOptions": []}
    here = ".spec.rayClusterSpec"
    assert set(wrong({"kind": "RayJob", "spec": {"entrypoint": 3, "rayClusterSpec": cluster}}, RAYJOB)) == {
        ".apiVersion: lacks",
        ".spec.entrypoint: 3 is no string",
        f"{here}.authOptions: [] is no dict",
        f"{here}.head: not known",
        f"{here}.workerGroupSpecs[].minReplicas: lacks",
        f"{here}.workerGroupSpecs[].rayStartParams.block: True is no string",
        f"{here}.workerGroupSpecs[].template.spec.containers[].name: lacks",
    }


@pytest.mark.heavy
def test_the_rayjob_runs_a_command_that_is_ours(rayjob: dict[str, Any], tmp_path: Path) -> None:
    words = shlex.split(rayjob["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "rvdist.launch"]
    done = launch(*words[3:], "--cfg", "job", "--resolve", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    composed = yaml.safe_load(done.stdout)
    (workers,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]
    assert composed["cluster"] == {"address": "auto", "nodes": 1 + workers["replicas"], "timeout": 1800.0}
    (run_directory,) = (word.partition("=")[2] for word in words if word.startswith("hydra.run.dir="))
    for pod in pods(rayjob):
        (container,) = pod["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
        kept = (run_directory, composed["output"], composed["cache"]["dir"], composed["target"])
        assert all(path.startswith(mounted["shared"] + "/") for path in kept)


def test_every_pod_of_the_rayjob_has_the_same(rayjob: dict[str, Any]) -> None:
    """One image, since versions must agree; the image's user, who may write on the volume; what is downloaded once."""
    (user,) = {word for name, rest in instructions() if name == "RUN" for word in re.findall(r"--uid (\d+)", rest)}
    for pod in pods(rayjob):
        (container,) = pod["containers"]
        assert container["image"] == pods(rayjob)[0]["containers"][0]["image"]
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user)
        home, token = container["env"]
        assert home == {"name": "HF_HOME", "value": "/shared/huggingface"}
        assert token["name"] == "HF_TOKEN" and token["valueFrom"]["secretKeyRef"]["optional"] and "value" not in token
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pods(rayjob)[1]["tolerations"]


def test_kuberay_gives_the_token(rayjob: dict[str, Any]) -> None:
    assert rayjob["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


@pytest.mark.heavy
def test_ray_up_takes_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled and checked by Ray's own functions, as `ray up` does before it does anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((LAUNCH / "ray-up.yaml").read_text())
    config = prepare_config(given)
    validate_config(config)
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])
    monkeypatch.chdir(ROOT)
    local = set(given["file_mounts"].values())
    assert all(Path(path).exists() for path in local if not path.startswith("~"))
    needed = re.findall(r"^\$\(VENV\)/ready: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(needed[0].split()) | {"Makefile", "rvdist", "conf", "README.md", "LICENSE"} <= local
    assert "~/.ray/auth_token" in given["file_mounts"]
    (made,) = [command for command in given["setup_commands"] if command.startswith("make ")]
    assert {"EXTRA=cpu", "PYTHON=python3.11"} < set(made.split()), "the same on machines with a GPU and without"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in given[key] if "ray start" in command]
        assert start.startswith("RAY_AUTH_MODE=token ")


@pytest.mark.heavy
def test_ray_up_refuses_what_it_does_not_know() -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((LAUNCH / "ray-up.yaml").read_text())
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(given | {"head_start_commands": []}))


INSTRUCTIONS = {"FROM", "ARG", "RUN", "USER", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, with continued lines joined and comments left out, as Docker reads it."""
    lines = [line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def test_the_dockerfile() -> None:
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS and found[0][0] == "FROM"
    assert all("/" not in rest and "://" not in rest for name, rest in found if name == "FROM")
    copied = [word for name, rest in found if name == "COPY" for word in rest.split()[:-1]]
    assert copied and all((ROOT / path).exists() for path in copied)
    kept = {line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert set(copied) == kept, "what is copied, and nothing else, is in the build's context"
    declared = {rest.partition("=")[0] for name, rest in found if name == "ARG"}
    used = {word for _, rest in found for word in re.findall(r"\$\{?([A-Z_]+)", rest)}
    assert used <= declared
    entry = next(rest for name, rest in found if name == "ENTRYPOINT")
    assert yaml.safe_load(entry) == ["python", "-m", "rvdist.launch"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert dict(rest.split("=") for name, rest in found if name == "ARG")["EXTRA"] in extras and "gpu" in extras


def test_nothing_is_fetched_from_a_place_that_we_chose() -> None:
    assert not [file.name for file in LAUNCH.iterdir() if "://" in file.read_text()]
