import json
import multiprocessing
import pickle
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from checkpoints import launch, load_checkpoint, near, write_checkpoint
from hub_server import HubServer, sha256
from huggingface_hub import constants

from rvdist.core.errors import BadInput, Failed
from rvdist.weights import compat
from rvdist.weights.checkpoint import hub as hub_module
from rvdist.weights.checkpoint.digest import checkpoint_digest
from rvdist.weights.checkpoint.directory import INDEX, Hub, open_checkpoint
from rvdist.weights.checkpoint.hub import BLOCK, by_ranges, download, download_weights, fetch_range, obtainable
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.stream import TensorFiles

SHARD = "model-00001-of-00002.safetensors"


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Files much larger than the part of them that is read for their headers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (3000, 256), "model.norm.weight": (257,)}
    shapes |= {f"model.layers.{layer}.mlp.up_proj.weight": (3500, 255) for layer in range(3)}
    return {name: (torch.randn(s, generator=generator) * 0.02).bfloat16() for name, s in shapes.items()}


@pytest.fixture
def server():
    server = HubServer()
    yield server
    server.stop()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server as this process's Hub, with an empty cache."""
    server.stand_in(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(hub_module, "_FIRST_WAIT", 0.01)
    hub_module._remembered_range.cache_clear()
    return server


@pytest.fixture
def published(hub, tmp_path) -> Path:
    path = write_checkpoint(tmp_path / "published", weights(), shards=2)
    hub.publish("org/name", path)
    return path


def read_all(checkpoint) -> dict[str, bytes]:
    files = TensorFiles(checkpoint)
    buffer = torch.empty(4 << 20, dtype=torch.uint8)
    found = {
        name: files.read(spec, 0, spec.numel, buffer).view(torch.uint8).numpy().tobytes()
        for name, spec in checkpoint.tensors.items()
    }
    files.close()
    return found


def test_opening_takes_headers_and_small_files_only(hub, published):
    checkpoint = open_source("org/name")
    local = open_checkpoint(published)
    assert checkpoint.tensors == local.tensors and checkpoint.metadata == local.metadata
    assert checkpoint.config == local.config and (checkpoint.path / "chat_template.jinja").exists()
    for file in checkpoint.files:
        (request,) = hub.asked(file)
        assert request.range == "bytes=0-131071" and request.nbytes == 128 << 10 < local.stamps[file].size / 10
    assert checkpoint.stamps[SHARD].etag == sha256(published / SHARD)
    checkpoint.require_unchanged()
    asked = len(hub.requests)
    open_source("org/name")
    assert len(hub.requests) == asked + 1 + 2 * 2, "the listing and two headers, each by a redirect"


def test_a_checkpoint_travels_to_workers_and_each_file_is_downloaded_at_its_first_read(hub, published, tmp_path):
    checkpoint = pickle.loads(pickle.dumps(open_source("org/name")))
    files = TensorFiles(checkpoint)
    spec = next(spec for spec in checkpoint.tensors.values() if spec.file == SHARD)
    files.read(spec, 0, 10, torch.empty(64, dtype=torch.uint8))
    assert (checkpoint.path / SHARD).exists()
    assert not (checkpoint.path / SHARD.replace("00001", "00002", 1)).exists()
    assert read_all(checkpoint) == read_all(open_checkpoint(published))
    header = 128 << 10
    assert all(hub.sent(file) == header + stamp.size for file, stamp in checkpoint.stamps.items())


def test_a_worker_uses_the_cache_of_its_own_node(hub, published, tmp_path, monkeypatch):
    checkpoint = open_source("org/name")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other node"))
    assert read_all(checkpoint) == read_all(open_checkpoint(published))
    assert not (checkpoint.path / SHARD).exists() and list((tmp_path / "other node").rglob(SHARD))


def test_an_engine_gets_a_directory(hub, published):
    checkpoint = open_source("org/name")
    download_weights(checkpoint)
    assert read_all(open_checkpoint(checkpoint.path)) == read_all(open_checkpoint(published))


def test_processes_that_want_one_file_download_it_once(hub, published):
    checkpoint = open_source("org/name")
    before = hub.sent(SHARD)
    hub.fail(SHARD, "pause")  # long enough for all to want it
    workers = [
        multiprocessing.get_context("fork").Process(target=download, args=(checkpoint.hub, SHARD)) for _ in "abc"
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert hub.sent(SHARD) - before == checkpoint.stamps[SHARD].size


def test_a_header_longer_than_the_first_range(hub, tmp_path):
    many = {f"model.layers.{k}.a_rather_long_name_for_a_tensor.weight": torch.ones(64) for k in range(2000)}
    path = write_checkpoint(tmp_path / "many", many)
    hub.publish("org/many", path)
    checkpoint = open_source("org/many")
    assert checkpoint.tensors == open_checkpoint(path).tensors
    first, second = hub.asked("model.safetensors")
    assert first.range == "bytes=0-131071" and second.range.startswith("bytes=131072-")
    assert hub.sent("model.safetensors") == min(spec.offset for spec in checkpoint.tensors.values())


def test_revisions_are_resolved_once_and_name_commits(hub, published, tmp_path):
    old = open_source("org/name")
    tagged = write_checkpoint(tmp_path / "tagged", weights(1))
    commit = hub.publish("org/name", tagged, "v1/rc")
    assert open_source("org/name@v1/rc").hub == open_source(f"org/name@{commit}").hub == Hub("org/name", commit)
    hub.publish("org/name", tagged)  # main moves on
    assert read_all(old) == read_all(open_checkpoint(published))
    assert read_all(open_source("org/name")) == read_all(open_checkpoint(tagged))


def test_a_plan_has_one_name_whether_files_are_cached_or_not(hub, published, monkeypatch):
    remote = open_source("org/name")
    digest = checkpoint_digest(remote)
    read_all(remote)
    cached = open_source("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = open_source("org/name")
    for checkpoint in (cached, offline):
        assert [astuple(stamp) for stamp in checkpoint.stamps.values()] == [
            astuple(stamp) for stamp in remote.stamps.values()
        ]
        assert checkpoint.tensors == remote.tensors and checkpoint_digest(checkpoint) == digest


def test_a_digest_takes_no_weights_and_names_contents(hub, published, tmp_path):
    one = checkpoint_digest(open_source("org/name"))
    sent = hub.sent(".safetensors")
    (published / "README.md").write_text("another commit, the same weights")
    hub.publish("org/name", published, "later")
    assert checkpoint_digest(open_source("org/name@later")) == one
    assert hub.sent(".safetensors") - sent == 2 * (128 << 10)
    hub.publish("org/other", write_checkpoint(tmp_path / "other", weights(1)))
    assert checkpoint_digest(open_source("org/other")) != one


def test_sampling_takes_kilobytes_once(hub, published, tmp_path):
    sibling = write_checkpoint(tmp_path / "sibling", near(weights(), 1))
    hub.publish("org/sibling", sibling)
    expected = compat.sampled_distance(open_checkpoint(published), open_checkpoint(sibling))
    one, other = open_source("org/name"), open_source("org/sibling")
    sent = hub.sent(".safetensors")
    assert compat.sampled_distance(one, other) == compat.sampled_distance(one, other) == expected
    assert hub.sent(".safetensors") - sent == 2 * 4 * 16 * 1024
    read_all(one)
    assert compat.sampled_distance(one, other) == expected


# Ranges


def test_a_file_of_which_little_is_needed_is_read_by_ranges(hub, published):
    checkpoint = open_source("org/name")
    norm = checkpoint.tensors["model.norm.weight"]
    half = checkpoint.stamps[SHARD].size // 2
    needs_more = {SHARD: half + 1, norm.file: norm.nbytes}
    assert by_ranges(checkpoint, needs_more).hub.ranged == {norm.file}
    assert by_ranges(checkpoint, {}).hub.ranged == set(checkpoint.files)
    assert by_ranges(open_checkpoint(published), {}).hub is None

    before = hub.sent(norm.file)
    files = TensorFiles(by_ranges(checkpoint, {norm.file: norm.nbytes}))
    buffer = torch.empty(1024, dtype=torch.uint8)
    found = torch.cat([files.read(norm, k, min(k + 100, 257), buffer).clone() for k in range(0, 257, 100)])
    assert torch.equal(found, load_checkpoint(published)["model.norm.weight"])
    assert hub.sent(norm.file) - before == norm.nbytes, "one request, none beyond the tensor"
    assert not (checkpoint.path / norm.file).exists() and files.bytes_read == norm.nbytes

    download(checkpoint.hub, norm.file)
    assert by_ranges(checkpoint, {}).hub.ranged == {SHARD}, "what is cached is not read by ranges"


def test_reading_ahead_is_bounded(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "BLOCK", 1 << 20)
    path = write_checkpoint(tmp_path / "big", {"w": torch.randn(1300, 1001)})
    hub.publish("org/big", path)
    checkpoint = by_ranges(open_source("org/big"), {})
    before = len(hub.asked("model.safetensors"))
    files, buffer, spec = TensorFiles(checkpoint), torch.empty(1 << 18, dtype=torch.uint8), checkpoint.tensors["w"]
    chunks = []
    for start in range(0, spec.numel, 50_000):
        chunks.append(files.read(spec, start, min(start + 50_000, spec.numel), buffer).clone())
        held = [len(block) for block in files._ranges._blocks.values()]
        assert len(held) <= 2 and max(held) <= 1 << 20
    assert torch.equal(torch.cat(chunks).view(1300, 1001), load_checkpoint(path)["w"])
    assert len(hub.asked("model.safetensors")) - before == 5, "5.2 MB in blocks of 1 MiB"
    assert BLOCK == 8 << 20


@pytest.mark.parametrize("kind", ["stall", "reset", "truncate", "500", "503", "429", "408"])
def test_a_range_is_had_in_spite_of_failures(hub, published, kind):
    checkpoint = open_source("org/name")
    hub.fail(SHARD, kind, times=2)
    before = hub.sent(SHARD)
    found = fetch_range(checkpoint.hub, SHARD, checkpoint.stamps[SHARD], 1000, 501_000)
    assert found == (published / SHARD).read_bytes()[1000:501_000]
    if kind in ("stall", "truncate"):
        assert [request.range for request in hub.asked(SHARD)[-2:]] == ["bytes=251000-500999", "bytes=376000-500999"]
        assert hub.sent(SHARD) - before == 500_000, "what had come was not asked for again"


def test_the_hub_says_how_long_to_wait(hub, published, monkeypatch):
    waits = []
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)
    checkpoint = open_source("org/name")
    hub.fail(SHARD, "429", Retry_After="7")
    hub.fail(SHARD, "429", RateLimit='"api";r=0;t=55')
    hub.fail(SHARD, "429", Retry_After="86400")
    hub.fail(SHARD, "503")
    fetch_range(checkpoint.hub, SHARD, checkpoint.stamps[SHARD], 0, 10)
    assert waits == [7, 55, 300, 0.08]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("stall", "timed out"), ("truncate", ""), ("500", "HTTP status 500"), ("429", "HTTP status 429")],
)
def test_patience_ends_in_one_sentence_that_invites_to_go_on(hub, published, kind, reason):
    checkpoint = open_source("org/name")
    hub.fail(SHARD, kind, times=99)
    with pytest.raises(
        Failed, match=rf"^org/name@\w+: {SHARD} is not .* in 5 attempts \(.*{reason}.*\); run"
    ) as caught:
        fetch_range(checkpoint.hub, SHARD, checkpoint.stamps[SHARD], 0, 500_000)
    assert "\n" not in str(caught.value)
    with pytest.raises(Failed, match="org/name@main|org/name: no such directory, and not to be had.*5 attempts"):
        hub.fail("/api/models", "500", times=99)
        open_source("org/name")


def test_other_bytes_than_asked_for_are_never_taken(hub, published):
    checkpoint = open_source("org/name")
    size = checkpoint.stamps[SHARD].size
    hub.fail(SHARD, "whole")
    with pytest.raises(Failed, match=f"{SHARD} is not .*it announces {size} bytes where 5 are due"):
        fetch_range(checkpoint.hub, SHARD, checkpoint.stamps[SHARD], 5, 10)
    hub.fail(SHARD, "whole")
    with pytest.raises(Failed, match=f"asked for a range from 0 of {size} bytes, it gives no range"):
        fetch_range(checkpoint.hub, SHARD, checkpoint.stamps[SHARD], 0, size)
    larger = replace(checkpoint.stamps[SHARD], size=size + 1)
    with pytest.raises(Failed, match=f"{SHARD} is not .*asked for a range from 5 of {size + 1} bytes"):
        fetch_range(checkpoint.hub, SHARD, larger, 5, 10)


@pytest.mark.parametrize("kind", ["stall", "reset", "truncate", "500", "429"])
def test_a_download_survives_failures(hub, published, kind):
    checkpoint = open_source("org/name")
    hub.fail(SHARD, kind)
    assert download(checkpoint.hub, SHARD).read_bytes() == (published / SHARD).read_bytes()


def test_a_damaged_remote_header_is_bad_input(hub, published):
    content = bytearray((published / SHARD).read_bytes())
    content[9] = 0
    (published / SHARD).write_bytes(content)
    hub.publish("org/name", published)
    with pytest.raises(BadInput, match=rf"org/name@\w+: {SHARD}: its safetensors header is damaged"):
        open_source("org/name")


# What the Hub refuses


def test_what_does_not_exist_is_bad_input(hub, published):
    with pytest.raises(BadInput, match="org/nothing: no such directory, and not to be had.*no such repository"):
        open_source("org/nothing")
    with pytest.raises(BadInput, match="org/name@v9: no such directory, and not to be had.*no such revision"):
        open_source("org/name@v9")
    hub.fail("config.json", "403", X_Error_Code="GatedRepo")
    with pytest.raises(BadInput, match="config.json is not to be had from the Hub .it is gated; ask for access"):
        open_source("org/name")


@pytest.mark.parametrize("source", ["org/name@../../x", "org/name@/etc", "org/name@a/../b", "../org/name", "org/.."])
def test_no_name_leads_out_of_the_cache(hub, published, source):
    with pytest.raises(BadInput, match="no such checkpoint directory"):
        open_source(source)
    assert hub.requests == []


def test_a_hub_that_names_files_elsewhere_gets_nowhere(hub, published, tmp_path):
    index = json.loads((published / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../escape.safetensors")
    (published / INDEX).write_text(json.dumps(index))
    (published / "modeling.py").write_text("raise SystemExit")
    (published / "pytorch_model.bin").write_bytes(b"pickle")
    (published / "onnx").mkdir()
    (published / "onnx" / "config.json").write_text("{}")
    hub.publish("org/name", published)
    with pytest.raises(BadInput, match="not a safetensors file of its directory"):
        open_source("org/name")
    assert {request.file for request in hub.requests} == {
        "", INDEX, "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "modeling.py"
    }, "code is text like any other: it is carried, and not run"  # fmt: skip


def test_an_index_may_not_name_what_is_not_there(hub, published):
    (published / SHARD).unlink()
    hub.publish("org/name", published)
    with pytest.raises(BadInput, match=f"org/name@.*lacks {SHARD}, which its index names"):
        open_source("org/name")


def test_pickled_weights_are_to_be_downloaded_whole(hub, published):
    """Then they are read as they stand; what would convert them needs them, too."""
    (published / INDEX).unlink()
    for file in published.glob("*.safetensors"):
        file.rename(published / f"pytorch_{file.stem}.bin")
    (published / "pytorch_model.bin.index.json").write_text("{}")
    hub.publish("org/name", published)
    with pytest.raises(BadInput, match=r"^org/name@\w+: .*\(hf download org/name --revision \w+ --local-dir DIR\)"):
        open_source("org/name")


def test_a_token_is_shown_to_the_hub_alone(hub, published, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    read_all(by_ranges(open_source("org/name"), {SHARD: 1 << 30}))
    assert {request.authorized for request in hub.requests if "warehouse" in request.path} == {False}
    assert {request.authorized for request in hub.requests if "warehouse" not in request.path} == {True}


# Offline


def test_offline_works_on_what_is_cached_and_names_what_is_not(hub, published, monkeypatch):
    checkpoint = open_source("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    with pytest.raises(
        BadInput, match=rf"org/name@{checkpoint.hub.commit}: {SHARD} is not .*HF_HUB_OFFLINE=1"
    ) as caught:
        open_source("org/name")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=f"{SHARD} is not to be had.*HF_HUB_OFFLINE=1"):
        read_all(checkpoint)  # as on a node that has another cache than the driver's
    for source in ("org/other", "org/name@v1", "org/name@" + "0" * 40):
        with pytest.raises(BadInput, match=f"{source}: no such directory, and not to be had from the Hub.*OFFLINE"):
            open_source(source)
    assert len(hub.requests) == asked and not obtainable(checkpoint.hub, SHARD)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert obtainable(checkpoint.hub, SHARD)
    read_all(checkpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert obtainable(checkpoint.hub, SHARD)
    asked = len(hub.requests)
    for source in ("org/name", "org/name@main", f"org/name@{checkpoint.hub.commit}"):
        assert read_all(open_source(source)) == read_all(open_checkpoint(published))
    assert len(hub.requests) == asked


def test_a_cache_without_links_serves_too(hub, published, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    found = read_all(open_source("org/name"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_all(open_source("org/name")) == found == read_all(open_checkpoint(published))


def test_offline_a_single_file_that_is_not_cached_is_named(hub, tmp_path, monkeypatch):
    hub.publish("org/one", write_checkpoint(tmp_path / "one", weights()))
    open_source("org/one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=r"org/one@\w+: model.safetensors is not to be had.*HF_HUB_OFFLINE=1"):
        open_source("org/one")


@pytest.mark.slow
@pytest.mark.heavy
def test_the_command_merges_from_the_hub_and_again_offline(server, tmp_path):
    base = weights()
    paths = {
        "target": write_checkpoint(tmp_path / "target", base, shards=2),
        "plus": write_checkpoint(tmp_path / "plus", near(base, 1)),
        "minus": write_checkpoint(tmp_path / "minus", near(base, 2), shards=2),
    }
    for name, path in paths.items():
        server.publish(f"org/{name}", path)
    local = [f"target={paths['target']}", f"vector.plus={paths['plus']}", f"vector.minus={paths['minus']}"]
    remote = ["target=org/target", "vector.plus=org/plus@main", "vector.minus=org/minus"]
    environment = {
        "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    here = tmp_path / "work"
    here.mkdir()

    def merge(sources, output, **more):
        done = launch(*sources, "alpha=1", "merge.workers=2", f"output={output}", cwd=here, **environment, **more)
        assert done.returncode == 0, done.stderr
        return {
            file.name: file.read_bytes()
            for file in sorted((here / output).iterdir())
            if file.name not in ("README.md", "rvdist.json")
        }

    expected = merge(local, "local", HF_HUB_OFFLINE="1")
    assert not server.requests
    assert merge(remote, "remote", HF_HUB_OFFLINE="0") == expected
    for file in {file.name for path in paths.values() for file in path.glob("*.safetensors")}:
        sizes = sum((path / file).stat().st_size for path in paths.values() if (path / file).exists())
        assert sizes < server.sent(file) < 1.3 * sizes, "once whole, and a header and samples before"
    asked = len(server.requests)
    assert merge(remote, "remote", HF_HUB_OFFLINE="1") == expected  # already complete: the plan has the same name
    server.stop()
    assert merge(remote, "offline", HF_HUB_OFFLINE="1") == expected
    assert len(server.requests) == asked
