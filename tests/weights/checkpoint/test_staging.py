import subprocess
import sys

import pytest
from checkpoints import tensors, write_checkpoint

from rvdist.core.errors import BadInput, Failed
from rvdist.weights.checkpoint.journal import Written
from rvdist.weights.checkpoint.staging import Staging


def is_seen(staging):
    """Whether the staging's probe is there, with what the driver wrote."""
    handle = staging.probe.open()
    if handle:
        handle.close()
    return handle is not None


def stage(output, text, overwrite=False):
    staging = Staging(output, "plan", overwrite)
    staging.allocate("model.safetensors", b"head", 100)
    staging.write_text("config.json", text)
    return staging


def test_an_output_appears_whole_or_not_at_all(tmp_path):
    staging = stage(tmp_path / "out", "one")
    assert not (tmp_path / "out").exists()
    staging.commit()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "rvdist.json"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == 100
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_abandoning_leaves_nothing(tmp_path):
    stage(tmp_path / "out", "one").abandon()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_unless_overwrite(tmp_path):
    stage(tmp_path / "out", "one").commit()
    with pytest.raises(BadInput, match="already exists"):
        Staging(tmp_path / "out", "plan")
    stage(tmp_path / "out", "two", overwrite=True).commit()
    assert (tmp_path / "out" / "config.json").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_replaces_what_is_no_checkpoint(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(BadInput, match="is not a checkpoint"):
        Staging(tmp_path / "home", "plan", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="not a directory"):
        Staging(tmp_path / "file", "plan", overwrite=True)


def test_a_partial_directory_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("years")
    with pytest.raises(BadInput, match="not ours to clear"):
        Staging(tmp_path / "out", "plan")
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "years"


def test_a_run_that_died_just_before_its_rename_is_started_over(tmp_path):
    staging = stage(tmp_path / "out", "one")
    staging.release()
    (tmp_path / "out.partial" / "rvdist.json").write_text("{}")
    for name in ("lock", "journal.jsonl"):
        (tmp_path / "out.partial" / name).unlink()
    stage(tmp_path / "out", "two").commit()
    assert (tmp_path / "out" / "config.json").read_text() == "two"


def test_a_run_of_the_same_plan_that_died_there_goes_on_from_its_manifest(tmp_path, monkeypatch):
    staging = stage(tmp_path / "out", "one")
    staging.journal([Written("model.safetensors", 4, 96, "d" * 32)])

    def die(self, target):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(Failed, match="out.partial: cannot be written .Input/output"):
        patch.setattr(type(tmp_path), "rename", die)
        staging.commit()
    staging.release()
    assert sorted(p.name for p in (tmp_path / "out.partial").iterdir()) == [
        "config.json",
        "model.safetensors",
        "rvdist.json",
    ]
    again = stage(tmp_path / "out", "two")
    assert list(again.claims) == [("model.safetensors", 4, 96)]
    again.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bad_input_does_not_cost_what_an_earlier_run_journalled(tmp_path):
    staging = stage(tmp_path / "out", "one")
    staging.journal([Written("model.safetensors", 4, 10, "d" * 32)])
    staging.release()
    stage(tmp_path / "out", "one").abandon()
    again = Staging(tmp_path / "out", "plan")
    assert again.claims
    again.release()


def test_another_directory_of_the_same_name_is_not_the_output(tmp_path):
    staging = stage(tmp_path / "out", "one")
    assert is_seen(staging)
    staging.release()
    again = Staging(tmp_path / "out", "plan")
    assert is_seen(again) and not is_seen(staging), "what it holds is another run's"
    again.abandon()
    assert not is_seen(again)


def test_one_writer_at_a_time_and_the_dead_do_not_count(tmp_path):
    output = tmp_path / "out"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from rvdist.weights.checkpoint.staging import Staging\n"
            "s = Staging(Path(sys.argv[1]), 'plan'); s.write_text('left', 'over')\n"
            "print('held', flush=True); sys.stdin.read()",
            str(output),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BadInput, match="being written by another run"):
        Staging(output, "plan")
    assert (tmp_path / "out.partial" / "left").exists(), "a refused writer touches nothing"
    holder.kill()
    holder.wait()
    stage(output, "mine").commit()
    assert not (output / "left").exists()


def test_a_full_name_in_the_way_is_one_sentence(tmp_path):
    write_checkpoint(tmp_path / "c", tensors(0))
    with pytest.raises(BadInput, match="cannot be created"):
        Staging(tmp_path / "c" / "config.json" / "out", "plan")


def test_what_a_dead_run_of_the_same_plan_journalled_is_kept(tmp_path):
    output = tmp_path / "out"
    first = stage(output, "one")
    first.journal([Written("model.safetensors", 4, 10, "d" * 32)])
    first.release()
    again = Staging(output, "plan")
    assert list(again.claims) == [("model.safetensors", 4, 10)] and not again.restarted
    assert (output.with_name("out.partial") / "model.safetensors").stat().st_size == 100
    again.release()
    other = Staging(output, "another plan")
    assert other.restarted and not other.claims and not (output.with_name("out.partial") / "model.safetensors").exists()
    other.abandon()


def test_a_run_that_died_before_anything_was_durable_is_no_other_run(tmp_path):
    output = tmp_path / "out"
    stage(output, "one").release()
    again = Staging(output, "plan")
    assert not again.claims and not again.restarted
    again.abandon()


def test_no_room_is_one_sentence(tmp_path):
    staging = Staging(tmp_path / "out", "plan")
    with pytest.raises(Failed, match=r"no \d+ bytes can be had there .*; make room, and run"):
        staging.allocate("model.safetensors", b"head", 1 << 60)
    staging.abandon()
