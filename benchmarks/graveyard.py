"""What mergekit and peft do in the situations of the graveyard, beside what we do.

    python benchmarks/graveyard.py [--mergekit PYTHON] [--peft PYTHON] [--only NAME …]

PYTHON is an interpreter that has the package; without one, its column says "not installed". Each situation of
tests/graveyard/ that asks for target + α · v is made anew for every tool. mergekit gets it as task_arithmetic (base
target, plus with weight α, minus with −α, normalize false; an adapter as `target+adapter`), without options; peft
loads the target with transformers and merges the adapter at α times its scale.

An outcome is *right* where every tensor is what the situation says, to two units in the last place (`off`); *refused*
where the tool ends with a message that names what is wrong as ours must; *crashed* where it ends with another;
*silently wrong* where it ends well and tensors differ, files are lost, or no output could be right; *not judged* where
it does what we refuse, and may know how, and where peft has no scale for an adapter's part.
The table goes to benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tables import write_table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "graveyard")]

import torch  # noqa: E402
from catalogue import SITUATIONS  # noqa: E402
from checkpoints import load_checkpoint  # noqa: E402
from judge import companions, differing  # noqa: E402
from runner import Outcome, run  # noqa: E402
from situations import Asked, Refused, Right, Situation  # noqa: E402

from rvdist.core.errors import BadInput  # noqa: E402
from rvdist.weights.checkpoint.difference import needs_base  # noqa: E402
from rvdist.weights.checkpoint.source import open_source  # noqa: E402

SITUATION = {situation.name: situation for situation in SITUATIONS}
RIGHT, REFUSED, CRASHED, WRONG, UNJUDGED, NOT_ASKED = "right", "refused", "crashed", "silently wrong", "not judged", ""
SERVE = """
import json, os, signal, sys, traceback
for job in json.load(open(sys.argv[1])):
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        status = 0
        try:
            act(*job["arguments"])
        except SystemExit as end:
            status = int(bool(end.code))
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    _, ended = os.waitpid(child, 0)
    open(job["log"] + ".status", "w").write(str(os.waitstatus_to_exitcode(ended)))
"""
MERGEKIT = """
import sys
import mergekit.merge, mergekit.merge_methods, peft, transformers
from mergekit.scripts.run_yaml import main
def act(recipe, out, cache):
    main.main([recipe, out, "--lora-merge-cache", cache], standalone_mode=False)
"""
PEFT = """
from peft import PeftModel
from transformers import AutoModelForCausalLM
def act(target, adapter, alpha, out):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target, dtype="auto"), adapter)
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: scale * float(alpha) for name, scale in module.scaling.items()}
    model.merge_and_unload().save_pretrained(out)
"""


def version(python: str, package: str) -> str:
    code = f"from importlib.metadata import version as v; print(v({package!r}), v('transformers'), v('torch'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{python}: has no {package}")
    ours, transformers, torch_version = found.stdout.split()
    return f"{package} {ours} (transformers {transformers}, torch {torch_version})"


def expressible(asked: Asked) -> bool:
    """Whether the other tools can be asked for it at all: one vector, no masks, no renaming, nothing that is about our
    command, no tensors that no architecture has."""
    vector = asked.settings.vector
    return not (
        asked.typed or asked.point or asked.made_up or vector.mask.include or vector.mask.exclude or vector.mask.layers
        or vector.rename or asked.settings.overwrite or asked.settings.vectors
    )  # fmt: skip


def mergekit(asked: Asked, place: Path) -> list[str]:
    """What `act` of MERGEKIT is given."""
    settings, vector, alpha = asked.settings, asked.settings.vector, float(asked.settings.alpha)
    if vector.path:
        models = [{"model": f"{settings.target}+{vector.path}", "parameters": {"weight": alpha}}]
    else:
        models = [
            {"model": vector.plus, "parameters": {"weight": alpha}},
            {"model": vector.minus, "parameters": {"weight": -alpha}},
        ]
    recipe = {
        "merge_method": "task_arithmetic", "base_model": settings.target, "parameters": {"normalize": False},
        "models": models,
    }  # fmt: skip
    if dtype := settings.dtype or stored_dtype(Path(settings.target)):
        recipe["dtype"] = dtype
    (place / "recipe.yml").write_text(json.dumps(recipe))  # JSON is YAML
    return [str(place / "recipe.yml"), str(place / "theirs"), str(place / "loras")]


def stored_dtype(target: Path) -> str | None:
    """The dtype of the target's tensors, as one would give it; None where they have several, so that each is kept."""
    found = set()
    with suppress(Exception):
        found = {str(t.dtype).removeprefix("torch.") for t in load_checkpoint(target).values()}
    dtypes = found & {"float16", "bfloat16", "float32", "float64"}
    return dtypes.pop() if len(dtypes) == len(found) == 1 else None if dtypes == found and dtypes else "bfloat16"


def peft(asked: Asked, place: Path) -> list[str] | None:
    """What `act` of PEFT is given; None where there is no adapter."""
    settings = asked.settings
    if not settings.vector.path:
        return None
    return [settings.target, settings.vector.path, str(settings.alpha), str(place / "theirs")]


def has_scale(asked: Asked) -> bool:
    """Whether the scale that PEFT multiplies is all of α: what was trained itself has none."""
    if float(asked.settings.alpha) == 1:
        return True
    with suppress(BadInput):
        return not needs_base(open_source(str(asked.settings.vector.path)))
    return True


def serve(python: str, program: str, jobs: Mapping[Path, list[str]]) -> dict[Path, tuple[int, str]]:
    """Runs each job in a child of one interpreter that has imported everything: its exit status and what it said."""
    with tempfile.TemporaryDirectory() as scratch:
        todo = [{"log": str(place / "log"), "arguments": arguments} for place, arguments in jobs.items()]
        (Path(scratch) / "jobs.json").write_text(json.dumps(todo))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [python, "-c", program + SERVE, f"{scratch}/jobs.json"]
        subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)
    return {
        place: (int((place / "log.status").read_text()), (place / "log").read_text(errors="replace")) for place in jobs
    }


def message(text: str) -> str:
    """The last line of an error, without paths and at most 120 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = re.sub(r"(/[\w.+-]+)+/", "", lines[-1] if lines else "")
    return (said[:117] + "…" if len(said) > 118 else said).replace("|", "\\|")


def judge(asked: Asked, status: int, log: str, place: Path, companioned: bool) -> tuple[str, str]:
    """The outcome of another tool, and why; `companioned`: files beside the weights count, too."""
    verdict = asked.verdict
    if status:
        said = message(log)
        named = isinstance(verdict, Refused) and any(re.search(words, log[-2000:]) for words in specific(verdict))
        return REFUSED if named else CRASHED, said
    try:
        found = load_checkpoint(place / "theirs")
    except Exception as error:
        return WRONG, f"the output cannot be read: {message(str(error))}"
    if isinstance(verdict, Refused):
        if verdict.possible:
            return UNJUDGED, "writes a model"
        return WRONG, "writes a model, and says nothing"
    wrong = off(found, dict(verdict.weights) | {n: t for n, t in verdict.may.items() if n in found}, originals(asked))
    wrong = wrong or still(place / "theirs", verdict)
    lost = missing(asked, place / "theirs", verdict) if companioned else ""
    return (WRONG, wrong or lost) if wrong or lost else (RIGHT, "")


def still(theirs: Path, verdict: Right) -> str:
    """A key that the output's config must not have any more."""
    said = json.loads((theirs / "config.json").read_text())
    left = [key for key, value in verdict.config.items() if value is ... and key in said]
    return f"config.json still has {left[0]}" if left else ""


def specific(verdict: Refused) -> list[str]:
    """The words of a refusal that name what is wrong, not where."""
    return [
        words for words in verdict.words if words not in ("target", "plus", "minus", "plus: ", "minus: ", "adapter: ")
    ]


def originals(asked: Asked) -> dict[str, torch.Tensor]:
    try:
        return load_checkpoint(Path(asked.settings.target))
    except Exception:
        return {}


def off(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> str:
    """What differs by more than two units in the last place of the larger of result and target, or of the root of the
    tensor's mean square where both are smaller; empty if nothing."""
    if found.keys() != wanted.keys():
        less, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        return f"lacks {less[0]}" if less else f"has {more[0]} too"
    for name, exact in wanted.items():
        got = found[name]
        if got.shape != exact.shape:
            return f"{name} has shape {list(got.shape)}"
        if not exact.is_floating_point():
            if not torch.equal(got.to(exact.dtype), exact):
                return f"{name} has other numbers"
            continue
        size = exact.double().abs()
        if name in base and base[name].shape == exact.shape and base[name].is_floating_point():
            size = torch.maximum(size, base[name].double().abs())
        size = size.clamp(min=float(exact.double().square().mean().sqrt()) if exact.numel() else 0.0)
        room = 2 * torch.finfo(exact.dtype).eps * size + 1e-12
        if not bool(((got.double() - exact.double()).abs() <= room).all()):
            return f"{name} has other numbers"
        if got.dtype != exact.dtype:
            return f"{name} is {str(got.dtype).removeprefix('torch.')}"
    return ""


def missing(asked: Asked, theirs: Path, verdict: Right) -> str:
    """A file beside the target's weights that is lost, unless what it says stands in another."""
    ours, found = companions(Path(asked.settings.target)), companions(theirs)
    everything = b"\n".join(found.values())
    for name, content in ours.items():
        if name in found or name in verdict.left or name.endswith((".pt", ".pth", ".bin", "trainer_state.json")):
            continue
        if "template" in name and text_of(content) in everything.decode(errors="ignore"):
            continue
        return f"loses {name}"
    return ""


def text_of(content: bytes) -> str:
    text = content.decode()
    said = json.loads(text).get("chat_template", text) if text.startswith('{"') else text
    return json.dumps(said)[1:-1]


def ours(situation: Situation, outcome: Outcome) -> str:
    """Judged as the tests judge, but for notes and companions."""
    verdict, error = outcome.asked.verdict, outcome.error
    if error:
        good = isinstance(error, BadInput) and isinstance(verdict, Refused)
        return REFUSED if good and all(re.search(w, str(error)) for w in verdict.words) else CRASHED
    if isinstance(verdict, Refused):
        return WRONG
    found = load_checkpoint(Path(str(outcome.asked.settings.output)))
    return (
        WRONG
        if differing(found, dict(verdict.weights) | {n: t for n, t in verdict.may.items() if n in found})
        else RIGHT
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", metavar="PYTHON", help="an interpreter with mergekit")
    parser.add_argument("--peft", metavar="PYTHON", help="an interpreter with peft")
    parser.add_argument("--only", nargs="+", default=[], help="names of situations")
    arguments = parser.parse_args()
    tools = {"mergekit": (arguments.mergekit, MERGEKIT, mergekit), "peft": (arguments.peft, PEFT, peft)}
    versions = [version(tool[0], name) for name, tool in tools.items() if tool[0]]
    wanted = [s for s in SITUATIONS if not s.slow and (not arguments.only or s.name in arguments.only)]
    work = Path(tempfile.mkdtemp(prefix="graveyard-"))
    (work / "ours").mkdir()
    outcomes = run(wanted, work / "ours")
    cells = {
        name: {"rvdist": (ours(SITUATION[name], outcome), "")}
        for name, outcome in outcomes.items()
        if expressible(outcome.asked)
    }
    for tool, (python, program, arguments_of) in tools.items():
        asked, jobs = {}, {}
        for name in cells:
            place = work / tool / name
            place.mkdir(parents=True)
            asked[name] = SITUATION[name].build(place)
            if (given := arguments_of(asked[name], place)) is not None:
                jobs[place] = given
        ended = serve(python, program, jobs) if python else {}
        for name in cells:
            place = work / tool / name
            companioned = SITUATION[name].group == "companions"
            done = judge(asked[name], *ended[place], place, companioned) if place in ended else None
            if tool == "peft" and done and done[0] == WRONG and not has_scale(asked[name]):
                done = UNJUDGED, "writes a model"
            cells[name][tool] = done or (NOT_ASKED if python else "not installed", "")
            print(name, tool, *cells[name][tool], flush=True)
    counts = {tool: Counter(found[tool][0] for found in cells.values()) for tool in ("rvdist", *tools)}
    rows = [
        [SITUATION[name].what, *(f"{kind}{': ' * bool(why)}{why}" for kind, why in found.values())]
        for name, found in cells.items()
    ]
    shutil.rmtree(work)
    write(rows, counts, versions)


def write(rows: list[list[str]], counts: Mapping[str, Counter[str]], versions: list[str]) -> None:
    kinds = [RIGHT, REFUSED, CRASHED, WRONG, UNJUDGED]
    head = [
        f"{', '.join(versions) or 'no other tool was installed'}. {len(rows)} situations that all can be asked for.",
        "",
    ]
    head += [f"| tool | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    head += [f"| {name} | {' | '.join(str(found[kind]) for kind in kinds)} |" for name, found in counts.items()]
    body = ["", "| situation | rvdist | mergekit | peft |", "|---|---|---|---|"]
    body += ["| " + " | ".join(row) + " |" for row in rows]
    write_table("graveyard.py", head + body)


if __name__ == "__main__":
    main()
