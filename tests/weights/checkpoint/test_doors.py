"""Doors that a stranger might come through: links and special files in a checkpoint, and a planted OUTPUT.partial."""

import os
import shutil
import subprocess
import sys

import pytest
from checkpoints import near, tensors, write_checkpoint

from rvdist.core.errors import BadInput, Failed
from rvdist.core.regular import Handle
from rvdist.weights.checkpoint.beside import carry_over
from rvdist.weights.checkpoint.directory import open_checkpoint, read_json
from rvdist.weights.checkpoint.journal import JOURNAL, MANIFEST, Journal, Manifest, Written, read_journal
from rvdist.weights.checkpoint.key import owner_key
from rvdist.weights.checkpoint.staging import Staging

SECRET = "the victim's own"
KEY = b"k" * 32


def is_seen(staging):
    """Whether the staging's probe is there, with what the driver wrote."""
    handle = staging.probe.open()
    if handle:
        handle.close()
    return handle is not None


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "home" / "secret.txt"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def stranger(tmp_path):
    return write_checkpoint(tmp_path / "stranger", tensors(0))


def carried(checkpoint, output):
    staging = Staging(output, "plan")
    try:
        carry_over(open_checkpoint(checkpoint), staging, None)
        return {str(p.relative_to(staging.partial)) for p in staging.partial.rglob("*")}
    finally:
        staging.abandon()


def plant(name, stranger, victim):
    """What a stranger's checkpoint may hold, as `name`."""
    place = stranger / "notes.txt"
    if name == "absolute link":
        place.symlink_to(victim)
    elif name == "relative link":
        place.symlink_to("../home/secret.txt")
    elif name == "chain":
        (stranger / "a").symlink_to(victim)
        place.symlink_to("a")
    elif name == "linked directory":
        (stranger / "inner").symlink_to(victim.parent)
        place.symlink_to("inner/secret.txt")
    elif name == "templates":
        (stranger / "additional_chat_templates").symlink_to(victim.parent)
    elif name == "template":
        (stranger / "additional_chat_templates").mkdir()
        (stranger / "additional_chat_templates" / "x.jinja").symlink_to(victim)
    elif name == "pipe":
        os.mkfifo(place)
    elif name == "device":
        place.symlink_to("/dev/zero")
    elif name == "endless":
        with open(place, "wb") as file:
            file.truncate(1 << 40)


PLANTS = (
    "absolute link", "relative link", "chain", "linked directory", "templates", "template", "pipe", "device", "endless"
)  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_nothing_from_elsewhere_ends_in_an_output(name, stranger, victim, tmp_path):
    plant(name, stranger, victim)
    with pytest.raises(BadInput, match=r"notes\.txt|additional_chat_templates"):
        carried(stranger, tmp_path / "out")
    assert SECRET not in "".join(p.read_text() for p in tmp_path.glob("out*/**/*") if p.is_file())


def test_the_command_refuses_a_link_to_elsewhere_before_anything_is_written(stranger, victim, tmp_path):
    donors = {n: write_checkpoint(tmp_path / n, near(tensors(0), k)) for k, n in enumerate(("plus", "minus"), 1)}
    plant("absolute link", stranger, victim)
    asked = [f"target={stranger}", *(f"vector.{n}={p}" for n, p in donors.items()), f"output={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "rvdist.launch", *asked, f"hydra.run.dir={tmp_path / 'run'}"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "outside of its checkpoint" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_links_within_a_checkpoint_and_into_a_repository_s_own_blobs_are_followed(stranger, victim, tmp_path):
    (stranger / "copy.json").symlink_to("config.json")
    assert "copy.json" in carried(stranger, tmp_path / "out")
    repository = tmp_path / "cache" / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(stranger, snapshot)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1").write_text("{}")
    (snapshot / "extra.json").symlink_to("../../blobs/1")
    assert "extra.json" in carried(snapshot, tmp_path / "out")
    shutil.rmtree(repository / "blobs")
    (repository / "blobs").symlink_to(victim.parent)  # blobs that are elsewhere are not its own
    (snapshot / "extra.json").unlink()
    (snapshot / "extra.json").symlink_to("../../blobs/secret.txt")
    with pytest.raises(BadInput, match="outside of its checkpoint"):
        carried(snapshot, tmp_path / "out")


@pytest.mark.parametrize("name", ["lock", "model.safetensors", "README.md", "journal.jsonl.new"])
def test_a_planted_link_in_a_partial_directory_is_never_written_through(name, victim, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "lock").touch()
    (partial / name).unlink(missing_ok=True)
    (partial / name).symlink_to(victim)
    try:
        staging = Staging(tmp_path / "out", "plan")
        staging.allocate("model.safetensors", b"head", 100)
        staging.write_text("README.md", "card")
        staging.commit()
    except (BadInput, Failed):
        pass
    assert victim.read_text() == SECRET and not victim.is_symlink()


def test_a_link_in_place_of_the_partial_directory_is_refused(victim, tmp_path):
    (tmp_path / "out.partial").symlink_to(victim.parent)
    with pytest.raises(BadInput, match="in the way"):
        Staging(tmp_path / "out", "plan")
    assert os.listdir(victim.parent) == ["secret.txt"]


def test_a_partial_directory_that_others_may_write_is_refused_and_ours_is_closed_to_them(tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    partial.chmod(0o777)
    with pytest.raises(BadInput, match="others can write in it"):
        Staging(tmp_path / "out", "plan")
    partial.chmod(0o755)
    staging = Staging(tmp_path / "out", "plan")
    assert partial.stat().st_mode & 0o777 == 0o700
    staging.commit()
    (tmp_path / "made").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "made").stat().st_mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_partial_directory_of_another_user_is_refused(tmp_path):
    (tmp_path / "out.partial").mkdir()
    os.chown(tmp_path / "out.partial", 12345, -1)
    with pytest.raises(BadInput, match=r"another user .uid 12345"):
        Staging(tmp_path / "out", "plan")


def test_what_is_put_in_the_place_of_a_partial_directory_is_neither_written_nor_published(tmp_path):
    staging = Staging(tmp_path / "out", "plan")
    staging.partial.rename(tmp_path / "aside")
    staging.partial.mkdir()
    (staging.partial / "lock").write_text("forged")
    staging.allocate("model.safetensors", b"head", 100)
    assert os.listdir(staging.partial) == ["lock"] and (tmp_path / "aside" / "model.safetensors").exists()
    assert not is_seen(staging)
    with pytest.raises(Failed, match="replaced by someone else"):
        staging.commit()
    staging.release()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["journal", "manifest"])
def test_a_forged_record_is_not_gone_on_from(form, tmp_path):
    """Whoever knows the plan can write lines that look right; only this user's key seals them."""
    forged = Written("model.safetensors", 4, 10, "d" * 32)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    if form == "journal":
        (partial / "lock").touch()
        Journal(Handle(partial), "plan", [forged]).close()
    else:
        (partial / MANIFEST).write_text(Manifest("plan", (forged,)).to_json())
    staging = Staging(tmp_path / "out", "plan", key=KEY)
    assert not staging.claims
    staging.journal([forged])
    staging.release()
    again = Staging(tmp_path / "out", "plan", key=KEY)
    assert list(again.claims.values()) == [forged], "our own are"
    again.release()
    assert list(read_journal(partial, "plan", key=b"o" * 32)) == []
    lines = (partial / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(lines[0].replace(b'"plan"', b'"another"') + b"".join(lines[1:]))
    assert list(read_journal(tmp_path, "another", key=KEY)) == [], "nor are they another plan's"


def test_a_key_is_this_user_s_alone(tmp_path):
    key = owner_key(tmp_path)
    (file,) = tmp_path.iterdir()
    assert len(key) == 32 and owner_key(tmp_path) == key and file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    assert owner_key(tmp_path) != key, "others could have read it"
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    assert len(owner_key(tmp_path)) == 32
    assert len(owner_key(tmp_path / "key")) == 32


def test_a_key_is_durable_before_anything_is_sealed_with_it(disk):
    """A merge was begun anew where a power cut took the key, and left the journal."""
    key = owner_key(disk.place / "cache")
    disk.stop()
    disk.begin_again()
    assert owner_key(disk.place / "cache") == key


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p)])
def test_only_regular_files_are_read(make, tmp_path):
    make(tmp_path / "config.json")
    with pytest.raises(BadInput, match=r"config\.json: cannot be read"):
        read_json(tmp_path / "config.json")
