"""What goes wrong while a merge runs: it finishes or stops with one sentence, and the same call goes on from there."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import uuid
from collections import defaultdict
from pathlib import Path

import forked
import pytest
import torch
from checkpoints import POCKET, launch, near, tensors, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rvdist.core.ends import KEPT
from rvdist.core.errors import BadInput, Failed
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.merge import accounts, crew
from rvdist.merge import plan as planning
from rvdist.merge.actor import WorkerSettings
from rvdist.merge.driver import merge
from rvdist.merge.plan import build_plan
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.checkpoint.staging import Staging

MIB = 1 << 20
STOPPED = "has been stopped for 10 s"


def digests(path):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.glob("*.safetensors*"))}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Siblings of 8 MiB in four files."""
    place = tmp_path_factory.mktemp("faults")
    base = {f"layers.{k}.w": tensors(k)["model.embed_tokens.weight"].repeat(72, 1) for k in range(4)}
    made = {"target": base, "plus": near(base, 1), "minus": near(base, 2)}
    return {name: write_checkpoint(place / name, weights, 4) for name, weights in made.items()}


@pytest.fixture
def run(family, ray_local, monkeypatch):
    """`run(out, plus=…, then=…)` merges with one worker in units of 256 KiB and calls `then` once the first of them
    are journalled, when the others are not begun."""
    monkeypatch.setattr(planning, "UNIT_BYTES", 256 << 10)
    monkeypatch.setattr(accounts, "SYNC_BYTES", 512 << 10)
    journal = Staging.journal

    def merge_it(out, then=lambda: None, workers=1, silence=900.0, say=print, alone=False, **paths):
        called = []

        def telling(self, written):
            journal(self, written)
            if not called:
                called.append(True)
                then()

        monkeypatch.setattr(Staging, "journal", telling)
        names = {name: str(path) for name, path in (family | paths).items()}
        point = WeightPoint(names["target"], (Term(1.0, Vector(names["plus"], names["minus"])),))
        sources = {source: open_source(source) for source in point.sources()}
        return merge(
            build_plan({out: point}, sources),
            sources,
            defaultdict(str),
            WorkerSettings(workers, timeout=60, silence=silence, alone=alone),
            say=say,
        )

    return merge_it


@pytest.fixture(scope="module")
def right(family, ray_local, tmp_path_factory):
    """The digests of a merge that nothing disturbed."""
    out = tmp_path_factory.mktemp("right") / "out"
    point = WeightPoint(str(family["target"]), (Term(1.0, Vector(str(family["plus"]), str(family["minus"]))),))
    sources = {source: open_source(source) for source in point.sources()}
    merge(build_plan({out: point}, sources), sources, defaultdict(str), WorkerSettings(1))
    return digests(out)


def copy(family, name, place):
    return Path(shutil.copytree(family[name], place / name))


def goes_on(run, out, right, **paths):
    """The same call redoes only what the journal lacks, and the bytes are the right ones."""
    stats = run(out, **paths)
    assert stats.bytes_written < sum(path.stat().st_size for path in out.glob("*.safetensors")) - 256 * 1024
    assert digests(out) == right


def command(place, mark, *arguments, hold=0.0, **joining):
    """The command in a process group of its own, in small units, standing still for `hold` seconds at every batch."""
    script = place / "command.py"
    script.write_text(COMMAND)
    package = str(Path(crew.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": package, "HOLD": str(hold), "MARK": mark, **joining},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


COMMAND = """
import os, signal, time
from rvdist.weights.checkpoint.staging import Staging
from rvdist.launch import main
from rvdist.merge import accounts, plan

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs tests in the background has it ignored
plan.UNIT_BYTES, accounts.SYNC_BYTES = 64 << 10, 128 << 10
journal = Staging.journal
def telling(self, written):
    journal(self, written)
    print("journalled", flush=True)
    time.sleep(float(os.environ["HOLD"]))
Staging.journal = telling
main()
"""
AT_WORK = """
import signal, time
from rvdist.launch import main
from rvdist.merge import accounts, plan

signal.signal(signal.SIGINT, signal.default_int_handler)
plan.UNIT_BYTES, counted, count = 64 << 10, [], accounts.Accounts.count
def telling(self, *given):
    count(self, *given)
    counted.append(given)
    if len(counted) == 5:
        print("counted", flush=True)
        time.sleep(60)
accounts.Accounts.count = telling
main()
"""


def processes(mark):
    """Those that were started by a command with this mark, whoever their parents are now."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"MARK={mark}".encode() in Path(f"/proc/{process}/environ").read_bytes():
                found.append(Path(f"/proc/{process}/cmdline").read_bytes().strip(b"\0").decode())
    return found


def wait_until_gone(mark, seconds):
    deadline = time.monotonic() + seconds
    while left := processes(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def journalled(out):
    return len((out / "journal.jsonl").read_text().splitlines()) - 1


def wait_for_journal(process):
    for line in process.stdout:
        if line.startswith("journalled"):
            return
    pytest.fail(process.stderr.read())


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """An output whose run was killed, then interrupted, and then went to its end; the second on a Ray of its own."""
    place = tmp_path_factory.mktemp("command")
    arguments = [f"target={POCKET / 'target'}", f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}"]
    arguments += ["output=out", "merge.workers=1", "max_shard_size=300KB", "hydra.run.dir=run"]
    mark = uuid.uuid4().hex
    killed = command(place, mark, *arguments, hold=60, **forked.ray())
    wait_for_journal(killed)
    killed.kill()
    killed.communicate()
    first = journalled(place / "out.partial")

    interrupted = command(place, mark + "2", *arguments, hold=60)
    wait_for_journal(interrupted)
    os.killpg(interrupted.pid, signal.SIGINT)  # as Ctrl-C does
    _, errors = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130 and errors == f"rvdist: interrupted; {KEPT}\n", errors
    wait_until_gone(mark + "2", 1)
    second = journalled(place / "out.partial")
    assert 0 < first < second  # what was journalled before is in it

    done = forked.run("command", arguments, place, {**os.environ, **forked.ray(), "HOLD": "0"}, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not list(place.glob("*.partial"))
    return place, arguments


def test_the_command_is_killed_and_interrupted_and_goes_on(resumed):
    place, arguments = resumed
    total = open_source(str(place / "out")).nbytes
    assert 0 < json.loads((place / "run/timing.json").read_text())["bytes_written"] < total - 256 * 1024
    undisturbed = launch(*arguments, "output=undisturbed", cwd=place)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert digests(place / "out") == digests(place / "undisturbed")
    weight_map = json.loads((place / "out/model.safetensors.index.json").read_text())["weight_map"]
    target = load_file(POCKET / "target/model.safetensors")
    assert weight_map.keys() == target.keys()
    for name, file in weight_map.items():
        with safe_open(place / "out" / file, "pt") as opened:
            assert opened.get_slice(name).get_shape() == list(target[name].shape)


@pytest.mark.heavy
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_workers_wrote_before_an_interrupt_is_kept(tmp_path, number, status):
    """Also what they had not made durable when it came."""
    arguments = [f"target={POCKET / 'target'}", f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}"]
    arguments += ["output=out", "merge.workers=1", "hydra.run.dir=run", "cache.dir=cache"]
    package = str(Path(crew.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": package, **forked.ray()}
    command = [sys.executable, "-c", AT_WORK, *arguments]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True) as running:
        assert "counted\n" in iter(running.stdout.readline, "")
        running.send_signal(number)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == status and errors.endswith(f"; {KEPT}\n") and errors.count("\n") == 1, errors
    kept = journalled(tmp_path / "out.partial")
    assert kept >= 4, "all but the one that was being counted"
    done = subprocess.run(
        [sys.executable, "-c", AT_WORK.replace("== 5", "< 0"), *arguments], cwd=tmp_path, env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    written = json.loads((tmp_path / "run/timing.json").read_text())["bytes_written"]
    assert written <= open_source(str(tmp_path / "out")).nbytes - kept * (60 << 10)


def part_of(mark, name):
    """A process of Ray's that a command with this mark started."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            called = Path(f"/proc/{process}/comm").read_text().strip()
            if called == name and f"MARK={mark}".encode() in Path(f"/proc/{process}/environ").read_bytes():
                return int(process)
    raise AssertionError(name)


@pytest.mark.slow
def test_an_end_that_is_not_ours_gets_our_sentence_and_the_same_command_goes_on(tmp_path):
    """SIGTERM, then a GCS and a raylet that are killed or stopped, each in the middle of the merge; within 10 s, or 25
    of a stop."""
    arguments = [f"target={POCKET / 'target'}", f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}"]
    arguments += ["output=out", "merge.workers=1", "max_shard_size=100KB", "hydra.run.dir=run"]
    ends = (
        ("python", signal.SIGTERM, 143, rf"terminated \(SIGTERM\); {KEPT}"),
        ("gcs_server", signal.SIGKILL, 1, rf"the Ray cluster is lost: its GCS \(process \d+\) ended; {KEPT}"),
        ("raylet", signal.SIGKILL, 1, rf"the Ray cluster is lost: its raylet \(process \d+\) ended; {KEPT}"),
        ("gcs_server", signal.SIGSTOP, 1, rf"the Ray cluster is lost: its GCS \(process \d+\) {STOPPED}; {KEPT}"),
        ("raylet", signal.SIGSTOP, 1, rf"the Ray cluster is lost: its raylet \(process \d+\) {STOPPED}; {KEPT}"),
    )
    before = 0
    for victim, with_signal, status, sentence in ends:
        mark = uuid.uuid4().hex
        running = command(tmp_path, mark, *arguments, hold=60)
        wait_for_journal(running)
        began = time.monotonic()
        os.kill(running.pid if victim == "python" else part_of(mark, victim), with_signal)
        _, errors = running.communicate(timeout=60)
        assert time.monotonic() - began < (25 if with_signal == signal.SIGSTOP else 10)
        assert running.returncode == status and re.fullmatch(f"rvdist: {sentence}\n", errors), errors
        wait_until_gone(mark, 1)
        now = journalled(tmp_path / "out.partial")
        assert now > before
        before = now
    done = command(tmp_path, uuid.uuid4().hex, *arguments)
    _, errors = done.communicate(timeout=300)
    assert done.returncode == 0 and not errors, errors
    assert (
        json.loads((tmp_path / "run/timing.json").read_text())["bytes_written"]
        < open_source(str(tmp_path / "out")).nbytes
    )


def flip(out):
    file = min(out.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-999] ^= 1
    file.write_bytes(content)


def lose_a_shard(out):
    max(out.glob("*.safetensors")).unlink()


def misplace(out):
    index = out / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(name for name, file in content["weight_map"].items() if "00001" in file)
    content["weight_map"][name] = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps(content))


def spoil(out):
    file = max(out.glob("*.safetensors"))
    weights = load_file(file)
    weights[min(weights)].view(-1)[0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})


def truncate(out):
    file = max(out.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 100)


@pytest.mark.parametrize(
    ("harm", "status", "reason"),
    [
        (None, 0, "out: sound"),
        (flip, 1, "model-00001-of-00003.safetensors: bytes .* are not what was written"),
        (lose_a_shard, 2, "model-00003-of-00003.safetensors: cannot be read"),
        (misplace, 2, "model.safetensors.index.json: says tensor .* is in model-00002"),
        (spoil, 1, "has 1 values that are infinite or not a number"),
        (truncate, 2, "model-00003-of-00003.safetensors: truncated"),
    ],
)
def test_verify_finds_a_resumed_output_sound_and_every_harm(
    resumed, tmp_path, harm, status, reason, capsys, monkeypatch
):
    from rvdist import verify

    out = Path(shutil.copytree(resumed[0] / "out", tmp_path / "out"))
    if harm:
        harm(out)
    monkeypatch.setattr(sys, "argv", ["verify", str(out)])
    with pytest.raises(SystemExit) as ended:
        verify.main()
    said = "".join(capsys.readouterr())
    assert ended.value.code == status, said
    assert re.search(reason, said), said


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("dies", "3 workers died while writing it, perhaps"), ("raises", "3 workers failed while writing it .*ECC error")],
)
def test_a_unit_at_which_every_worker_fails_ends_the_merge(kind, reason, run, right, tmp_path, monkeypatch):
    """It is named, and not the one before it, of which a worker that dies may have told nothing yet."""
    real, take = crew.WorkerActor, crew.Roster.take
    given, deaths, partial = tmp_path / "given", tmp_path / "deaths", tmp_path / "out.partial"
    deaths.touch()

    def taking(*asked):
        unit = take(*asked)
        if unit and unit.file.startswith("model-00003"):
            with open(given, "a") as log:
                log.write(".")
        return unit

    monkeypatch.setattr(crew.Roster, "take", taking)

    class Failing(real):
        def run(self, unit, claims):
            if unit.file.startswith("model-00003"):
                if kind == "raises":
                    raise RuntimeError("CUDA error: uncorrectable ECC error")
                with open(deaths, "a") as log:
                    log.write(".")
                os.kill(os.getpid(), signal.SIGKILL)
            done = real.run(self, unit, claims)
            is_last = unit.start + unit.nbytes == (partial / unit.file).stat().st_size
            if kind == "dies" and is_last and "00002" in unit.file:  # its answer is lost if it dies at what comes next
                while not given.exists():  # for the first time
                    time.sleep(0.01)
                if given.stat().st_size > deaths.stat().st_size:
                    with open(deaths, "a") as log:
                        log.write(".")
                    os.kill(os.getpid(), signal.SIGKILL)
            return done

    monkeypatch.setattr(crew, "WorkerActor", Failing)
    with pytest.raises(Failed, match=f"model-00003.*: {reason}.*the same command goes on"):
        run(tmp_path / "out")
    monkeypatch.setattr(crew, "WorkerActor", real)
    goes_on(run, tmp_path / "out", right)


@pytest.mark.parametrize("kind", ["raises", "hangs", "is stopped"])
def test_a_worker_that_raises_or_hangs_is_replaced(kind, run, right, tmp_path, monkeypatch, capfd):
    real, mark = crew.WorkerActor, tmp_path / "once"

    class Faulty(real):
        def run(self, unit, claims):
            if unit.file.startswith("model-00003") and not mark.exists():
                mark.touch()
                if kind == "raises":
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
                time.sleep(600) if kind == "hangs" else os.kill(os.getpid(), signal.SIGSTOP)
            return real.run(self, unit, claims)

    monkeypatch.setattr(crew, "WorkerActor", Faulty)
    said = []
    run(tmp_path / "out", silence=900.0 if kind == "raises" else 3.0, say=said.append)
    assert digests(tmp_path / "out") == right and mark.exists()
    reason = "CUDA error: an illegal memory" if kind == "raises" else "it said nothing for 3 s; .* raise merge.timeout"
    assert any(re.search(rf"failed \({reason}.*another takes its place", sentence) for sentence in said), said


def test_workers_that_all_die_before_they_begin_are_said_to(run, tmp_path, monkeypatch):
    class Dying(crew.WorkerActor):
        def hello(self, *given):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(crew, "WorkerActor", Dying)
    with pytest.raises(Failed, match="^every worker died before it could begin; .*; what is done is kept"):
        run(tmp_path / "out")


def test_a_worker_that_cannot_start_says_why(run, tmp_path, monkeypatch):
    class Here(crew.WorkerActor):
        pass

    only_here = types.ModuleType("only_here")
    only_here.Here = Here
    Here.__module__, Here.__qualname__ = "only_here", "Here"
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    monkeypatch.setattr(crew, "WorkerActor", Here)
    with pytest.raises(Failed, match="no worker could start: .*only_here"):
        run(tmp_path / "out")


def test_sources_that_change_in_the_middle(run, family, right, tmp_path):
    plus = copy(family, "plus", tmp_path)
    last = plus / "model-00004-of-00004.safetensors"
    whole = last.read_bytes()
    with pytest.raises(BadInput, match="plus/model-00004.*: (ends inside tensor layers.3.w; it )?changed"):
        run(tmp_path / "out", lambda: os.truncate(last, len(whole) // 2), plus=plus)
    assert not list(tmp_path.glob("out*")), "bad input leaves nothing"
    last.write_bytes(whole)
    aside = last.with_name("aside")
    with pytest.raises(Failed, match="plus/model-00004.*: cannot be read .No such file"):
        run(tmp_path / "out", lambda: last.rename(aside), plus=plus)
    aside.rename(last)  # which is a change, as far as one can tell
    run(tmp_path / "out", plus=plus)
    assert digests(tmp_path / "out") == right


@pytest.mark.parametrize("alone", [True, False])
def test_a_link_that_led_elsewhere_for_a_while_leaves_nothing_to_go_on_from(alone, run, family, right, tmp_path):
    """To another donor of the same name and size: neither that run nor a later one takes any of its ranges."""

    def stop():
        raise Failed("stopped")

    def lead(to):
        (tmp_path / "next").symlink_to(to)
        (tmp_path / "next").rename(link)

    weights = {
        name: tensor for file in family["plus"].glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    link, other = tmp_path / "plus", write_checkpoint(tmp_path / "other", near(weights, 3), 4)
    lead(family["plus"])
    with pytest.raises(Failed, match="stopped"):
        run(tmp_path / "out", stop, plus=link, alone=alone)
    kept = journalled(tmp_path / "out.partial")
    with pytest.raises(BadInput, match="plus/model-0000.*: changed while it was being read"):
        run(tmp_path / "out", lambda: lead(other), plus=link, alone=alone)
    assert 0 < kept <= journalled(tmp_path / "out.partial")
    lead(family["plus"])
    run(tmp_path / "out", plus=link, alone=alone)
    assert digests(tmp_path / "out") == right


def test_what_stands_beside_weights_changes_in_the_middle(run, family, right, tmp_path):
    """The output has no file beside its weights that its digest is not of."""
    target = copy(family, "target", tmp_path)
    template = target / "chat_template.jinja"
    template.write_text("one")
    for change in (lambda: template.write_text("two"), template.unlink, lambda: template.write_text("three")):
        with pytest.raises(BadInput, match="target/chat_template.jinja: (changed while it was|cannot be read)"):
            run(tmp_path / "out", change, target=target, alone=True)
        assert not list(tmp_path.glob("out*"))
    run(tmp_path / "out", target=target, alone=True)
    assert digests(tmp_path / "out") == right and (tmp_path / "out/chat_template.jinja").read_text() == "three"


def test_a_disk_that_cannot_be_read(run, family, right, tmp_path, mount):
    """A donor lies on a file system whose device loses its second half, and gets it back."""
    image, good = tmp_path / "image", tmp_path / "good"
    image.write_bytes(b"")
    os.truncate(image, 24 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True)
    disk = mount(tmp_path / "disk", "-o", "loop", str(image))
    plus = copy(family, "plus", disk)
    subprocess.run(["umount", str(disk)], check=True)
    shutil.copyfile(image, good)
    mount(disk, "-o", "loop,ro", str(image))

    def lose():
        for file in plus.glob("*.safetensors"):
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.truncate(image, 4 * MIB)

    with pytest.raises(Failed, match=r"plus/model-0000\d-of-00004.safetensors: cannot be read .Input/output error"):
        run(tmp_path / "out", lose, plus=plus)
    with open(image, "r+b") as repaired:
        repaired.write(good.read_bytes())
    goes_on(run, tmp_path / "out", right, plus=plus)


@pytest.mark.parametrize(("unit", "where"), [(32 << 10, "out.partial"), (MIB, "out.partial/[a-z_.]+")])
def test_a_disk_that_fills_up_in_the_middle(run, right, tmp_path, mount, monkeypatch, unit, where):
    """The weights have their room; the journal of many small units, or else the files beside the weights, do not."""
    monkeypatch.setattr(planning, "UNIT_BYTES", unit)
    disk = mount(tmp_path / "disk", "-t", "tmpfs", "-o", "size=16m", "tmpfs")

    def fill():
        with open(disk / "other", "wb", buffering=0) as other, pytest.raises(OSError) as full:
            while True:
                other.write(bytes(4096))
        assert full.value.errno == errno.ENOSPC

    with pytest.raises(
        Failed, match=f"disk/{where}: cannot be written .No space left on device.; what is done is kept"
    ):
        run(disk / "out", fill)
    with pytest.raises(Failed, match="cannot be written .No space left on device"):
        run(disk / "out")
    (disk / "other").unlink()
    goes_on(run, disk / "out", right)


@pytest.mark.heavy
def test_a_disk_without_room_is_found_before_any_work(tmp_path, mount):
    disk = mount(tmp_path / "disk", "-t", "tmpfs", "-o", "size=500k", "tmpfs")
    sources = [f"target={POCKET / 'target'}", f"vector.plus={POCKET / 'grpo'}", f"vector.minus={POCKET / 'sft'}"]
    done = launch(*sources, "output=disk/out", "merge.workers=1", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert "model.safetensors: no " in sentence and "bytes can be had there (No space left on device)" in sentence
    assert not list(disk.iterdir()), "and what was taken is given back"
