import io
import json
import subprocess
import sys

import adapters
import pytest
import torch
from checkpoints import POCKET, load_checkpoint, near, tensors, write_checkpoint
from rich.console import Console
from safetensors.torch import save_file

from rvdist.core.config import ArmConfig, Config
from rvdist.core.errors import BadInput
from rvdist.core.point import Vector
from rvdist.core.timing import Timing
from rvdist.inspect import inspect, tree
from rvdist.report.summary import Row, write_summary
from rvdist.weights.checkpoint.journal import Written
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.staging import Staging
from rvdist.weights.store import Storage, save


def shown(facts):
    console = Console(width=1000, file=io.StringIO())
    console.print(tree(facts))
    return console.file.getvalue()


def staged(output, weights):
    """An output under construction as a merge leaves it: headers in place, a journal, here of one range."""
    save_file(weights, output.parent / "whole.safetensors")
    staging = Staging(output, "ab" * 16)
    raw = (output.parent / "whole.safetensors").read_bytes()
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    staging.allocate("model.safetensors", header, len(raw))
    (output.parent / "whole.safetensors").unlink()
    staging.journal([Written("model.safetensors", len(header), 1000, "0" * 32)])
    staging.release()
    return staging.partial


def test_a_sharded_checkpoint(tmp_path):
    weights = tensors(0)
    facts = inspect(str(write_checkpoint(tmp_path / "model", weights, shards=2)))
    assert (facts["kind"], facts["tensors"], facts["layers"]) == ("checkpoint", len(weights), 3)
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    assert facts["dtypes"] == {"BF16": {"tensors": len(weights), "bytes": nbytes}}
    assert list(facts["files"]) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert facts["names"]["model.layers.*.mlp.up_proj.weight"] == {
        "count": 3, "dtypes": ["BF16"], "shapes": [[131, 48]],
    }  # fmt: skip
    assert "model.layers.*.mlp.up_proj.weight  count 3, dtypes BF16, shapes [131, 48]" in shown(facts)


def test_no_tensor_is_read(tmp_path):
    """A terabyte that takes no room: to read it would take the rest of the day."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2**39], "data_offsets": [0, 2**40]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**40)
    assert inspect(str(tmp_path))["dtypes"]["BF16"]["bytes"] == 2**40


@pytest.mark.parametrize(
    ("storage", "stored", "dtypes"),
    [
        (Storage(), {"dense": 9}, {"F32": 9}),
        (Storage("BF16", rank=2), {"dense": 2, "low_rank": 7, "ranks": [2], "scales": [1.0]}, {"BF16": 16}),
        (Storage("BF16", density=0.1), {"sparse": 9}, {"BF16": 9, "I32": 9}),
    ],
)
def test_a_stored_vector(tmp_path, storage, stored, dtypes):
    base = tensors(0)
    vector = Vector(*(str(write_checkpoint(tmp_path / name, near(base, k))) for k, name in enumerate("pm")))
    save(vector, {source: open_source(source) for source in vector.sources()}, tmp_path / "v", storage)
    facts = inspect(str(tmp_path / "v"))
    assert facts["kind"] == "vector" and facts["tensors"] == len(base)
    assert {key: value for key, value in facts["made_of"]["stored"].items() if value} == stored
    assert {dtype: total["tensors"] for dtype, total in facts["dtypes"].items()} == dtypes
    assert facts["made_of"]["formula"] == "v = plus − minus"
    assert (facts["made_of"]["plus"], facts["made_of"]["minus"]) == ("p", "m")
    plus, minus = (load_checkpoint(tmp_path / name) for name in "pm")
    equal = sum(int((plus[name] == minus[name]).sum()) for name in base)
    assert equal > 0 and facts["made_of"]["equal_elements"] == equal / sum(t.numel() for t in base.values())


def test_an_adapter(tmp_path):
    facts = inspect(str(adapters.write_adapter(tmp_path / "adapter", adapters.factors())))
    assert facts["kind"] == "adapter" and facts["tensors"] == 3
    assert facts["made_of"] == {
        "trained_on": "org/base", "stored": {"low_rank": 3, "ranks": [4], "scales": [2.5]},
    }  # fmt: skip
    assert facts["dtypes"]["F32"]["tensors"] == 6


def test_a_run(tmp_path):
    from omegaconf import OmegaConf

    settings = Config(target="pocket/target", alpha=[0.5, 1.0], arms=[ArmConfig("donor", weights="pocket/grpo")])
    settings.benchmarks.tasks = ["sums"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(settings)))
    told = {"metric": "acc", "filter": "none", "higher_is_better": True, "seed": 0, "stderr": 0.1, "n": 40}
    rows = [
        Row("baseline", "p", 0.0, "plain", "sums", primary=True, value=0.5, ci_low=0.4, ci_high=0.6, **told),
        Row("donor", "q", None, "plain", "sums", primary=True, value=0.75, ci_low=0.6, ci_high=0.9, **told,
            p_value=0.01, p_adjusted=0.02, verdict="better"),
        Row("donor", "q", None, "plain", "sums", primary=False, value=0.1, ci_low=0, ci_high=1, **told),
    ]  # fmt: skip
    write_summary(tmp_path / "summary.json", rows)
    Timing({"merge": 1.5}, bytes_read=10).write(tmp_path / "timing.json")
    facts = inspect(str(tmp_path))
    assert facts["kind"] == "run" and facts["arms"] == ["baseline", "donor"]
    assert facts["settings"].keys() == {"target", "alpha", "arms", "benchmarks.tasks"}
    assert facts["tasks"] == {"sums": {"metric": "acc", "filter": "none", "documents": 40}}
    assert facts["scores"]["sums"]["donor"]["value"] == 0.75
    assert facts["timing"]["phases"] == {"merge": 1.5}
    text = shown(facts)
    assert "donor  value 0.75, ci low 0.6, ci high 0.9, p adjusted 0.02, verdict better" in text
    assert "benchmarks.tasks  sums" in text and "phases  merge 1.5" in text


def test_an_unfinished_output(tmp_path):
    weights = tensors(0)
    partial = staged(tmp_path / "out", weights)
    facts = inspect(str(partial))
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    assert (facts["kind"], facts["plan"], facts["ranges_done"]) == ("unfinished output", "ab" * 16, 1)
    assert (facts["bytes_done"], facts["bytes"], facts["done"]) == (1000, nbytes, f"{1000 / nbytes:.1%}")
    assert facts["files"] == {"model.safetensors": {"ranges_done": 1, "bytes_done": 1000, "bytes": nbytes}}
    with pytest.raises(BadInput, match=r"out: is not written yet; inspect .*out\.partial"):
        inspect(str(tmp_path / "out"))
    with open(partial / "journal.jsonl", "ab") as journal:
        journal.write(b'["torn')
    assert inspect(str(partial))["ranges_done"] == 1


def _checksummed(entry):
    import xxhash

    text = json.dumps(entry, separators=(",", ":"))
    return json.dumps([xxhash.xxh3_64_hexdigest(text.encode()), entry], separators=(",", ":")) + "\n"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ("nonsense\n", "is not the journal of an output"),
        ("3\n", "is not the journal of an output"),
        (_checksummed([1, "p"]) + _checksummed([]), "is not the journal of an output"),
        (_checksummed([1, "p"]) + _checksummed([["x"], {}, None, 1]), "is not the journal of an output"),
        (_checksummed([1, "p"]) + _checksummed(["model.safetensors", 0, 1 << 60, ""]), "does not have"),
        (_checksummed([1, "p"]) + _checksummed(["model.safetensors", 9, -5, ""]), "is not of a file beside"),
        (_checksummed([1, "p"]) + _checksummed(["../other", 0, 1, ""]), "is not of a file beside"),
    ],
)
def test_a_hostile_journal(tmp_path, entries, reason):
    partial = staged(tmp_path / "out", tensors(0))
    (partial / "journal.jsonl").write_text(entries)
    with pytest.raises(BadInput, match=reason):
        inspect(str(partial))


DEEP = "[" * 100_000
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 9))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("summary.json", "{}{", "is not the summary of a run"),
        ("summary.json", DEEP, "nests more than 64 levels"),
        ("summary.json", '[{"arm": "a"}]', "is not the summary of a run"),
        ("summary.json", "[3]", "is not the summary of a run"),
        ("summary.json", '{"a": 1}', "is not the summary of a run"),
        ("timing.json", '{"phases": [[]]}', "is not the timing of a run"),
        ("timing.json", '{"phases": {"merge": {}}}', "is not the timing of a run"),
        ("timing.json", '{"faces": {}}', "is not the timing of a run"),
        ("timing.json", "[]", "is not a JSON object"),
        ("config.yaml", LAUGHS, "stands for more than 100,000 values"),
        ("config.yaml", DEEP, "nests more than 64 levels"),
        ("config.yaml", "- 1\n", "it is not a mapping"),
        ("config.yaml", "a: !!python/object/apply:os.system [x]\n", "is not the configuration of a run"),
        ("config.yaml", "\x00\xff", "is not the configuration of a run"),
        ("model.safetensors", "short", "not a whole safetensors file"),
    ],
)
def test_hostile_files(tmp_path, file, content, reason):
    (tmp_path / file).write_text(content)
    with pytest.raises(BadInput, match=reason):
        inspect(str(tmp_path))


def test_a_hostile_manifest_and_card(tmp_path):
    path = write_checkpoint(tmp_path / "model", tensors(0))
    (path / "README.md").write_bytes(b"\xff    \xce\xb8 = x\n")
    (path / "rvdist.json").write_text('{"version": 1, "plan": 3, "ranges": [["f", "x", 1, ""]]}')
    with pytest.raises(BadInput, match=r"rvdist\.json: is damaged"):
        inspect(str(path))


def test_names_cannot_write_to_the_terminal(tmp_path):
    weights = {"\x1b[2Jmodel.\u202ew": torch.zeros(2), "[red]b[/red]": torch.zeros(2)}
    text = shown(inspect(str(write_checkpoint(tmp_path / "model", weights))))
    assert "\x1b" not in text and "\u202e" not in text and "[red]b[/red]" in text


def test_the_command_and_its_exit_status(tmp_path):
    def command(*arguments):
        return subprocess.run([sys.executable, "-m", "rvdist.inspect", *arguments], capture_output=True, text=True)

    facts = command(str(POCKET / "target"), "--json")
    assert facts.returncode == 0 and json.loads(facts.stdout)["model"]["model_type"] == "qwen2"
    seen = command(str(POCKET / "target"))
    assert seen.returncode == 0 and "architecture Qwen2ForCausalLM" in seen.stdout and "BF16" in seen.stdout
    missing = command(str(tmp_path / "gone"))
    assert missing.returncode == 2 and missing.stderr.startswith("rvdist: ") and "Traceback" not in missing.stderr
    assert len(missing.stderr.splitlines()) == 1
    file = command(__file__)
    assert file.returncode == 2 and "give the directory it stands in" in file.stderr
