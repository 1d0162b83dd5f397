"""Pairs that must fail beside the pair that works: each is told why, and the one that works nothing."""

from random import Random
from types import SimpleNamespace

import pytest
import torch
from checkpoints import POCKET, load_checkpoint, write_checkpoint
from made_up import make_records, make_task
from threadpoolctl import threadpool_limits
from transformers import AutoModelForCausalLM, AutoTokenizer

from rvdist.core.point import Arm, Term, Vector, WeightPoint
from rvdist.pocket import measure, text
from rvdist.pocket.train import supervise
from rvdist.report.findings import Findings
from rvdist.report.statistics.compare import summarise
from rvdist.report.transfer import Outcome, outcome, transfer, transfer_facts
from rvdist.weights.anatomy.analyze import analyze
from rvdist.weights.checkpoint.source import open_source

TARGET, SFT, GRPO = (str(POCKET / name) for name in ("target", "sft", "grpo"))
EMBEDDING = "model.embed_tokens.weight"
DOCUMENTS = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def shuffled(plus, minus):
    """minus and the same differences, each somewhere else in its tensor."""
    draw, made = torch.Generator().manual_seed(0), {}
    for name in minus:
        v = (plus[name].float() - minus[name].float()).flatten()
        v = v[torch.randperm(len(v), generator=draw)]
        made[name] = minus[name].float() + v.view(minus[name].shape)
    return made


def reordered(weights):
    """Another base that does just the same: its hidden and its inner dimensions stand in another order."""
    draw = torch.Generator().manual_seed(0)
    hidden, inner = torch.randperm(128, generator=draw), torch.randperm(384, generator=draw)
    made = {}
    for name, tensor in weights.items():
        kind = name.split(".")[-2]
        if kind in ("gate_proj", "up_proj"):
            tensor = tensor[inner]
        elif kind == "down_proj":
            tensor = tensor[:, inner]
        across = kind in ("o_proj", "down_proj") or (tensor.dim() == 1 and "norm" in kind)
        if across:
            tensor = tensor[hidden]
        elif tensor.dim() == 2:
            tensor = tensor[:, hidden]
        made[name] = tensor.contiguous()
    return made


def reversing(random):
    question, answer = text.reversing(random)
    return text.DONOR.prompt.format(question), answer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(plus, minus) by name; real checkpoints in files."""
    place = tmp_path_factory.mktemp("pairs")
    target, sft, grpo = map(load_checkpoint, map(POCKET.__truediv__, ("target", "sft", "grpo")))
    other = AutoModelForCausalLM.from_pretrained(SFT, dtype=torch.float32)
    random = Random("another skill")
    supervise(other, lambda: reversing(random), 16, 12, 1e-3)
    tokens = grpo | {EMBEDDING: grpo[EMBEDDING].flip(0)}
    twice = {name: target[name].float() + grpo[name].float() - sft[name].float() for name in target}
    weights = {"reordered sft": reordered(sft), "reordered grpo": reordered(grpo), "shuffled": shuffled(grpo, sft)}
    weights |= {"tokens": tokens, "twice": twice, "reverse": {name: other.state_dict()[name] for name in sft}}
    files = {name: str(write_checkpoint(place / name, own)) for name, own in weights.items()}
    return files, {
        "works": (GRPO, SFT),
        "another base": (files["reordered grpo"], files["reordered sft"]),
        "two bases": (files["reordered grpo"], SFT),
        "shuffled": (files["shuffled"], SFT),
        "tokens": (files["tokens"], SFT),
        "another skill": (files["reverse"], SFT),
    }


def analyzed(pairs, target=TARGET):
    sources = {path: open_source(path) for path in {target, *(path for pair in pairs.values() for path in pair)}}
    return analyze({name: Vector(*pair) for name, pair in pairs.items()}, target, sources)


@pytest.fixture(scope="module")
def anatomy(pairs):
    """Of all of them, in one pass."""
    return analyzed(pairs[1])


def names(found):
    return [reason.name for reason in found.reasons]


@pytest.mark.parametrize(
    ("vector", "expected"),
    [
        ("works", []),
        ("another skill", []),  # which weights cannot tell
        ("another base", ["another base"]),
        ("two bases", ["donors of two bases", "embeddings"]),
        ("shuffled", ["noise"]),
        ("tokens", ["embeddings"]),
    ],
)
def test_what_weights_say(anatomy, vector, expected):
    found = transfer(anatomy, vector, Outcome())
    assert names(found)[: len(expected)] == expected if vector == "two bases" else names(found) == expected
    said = found.sentences()
    assert len(said) == len(found.reasons) and all(f"“{vector}” may not help: " in sentence for sentence in said)
    assert all(reason.measured >= reason.limit and reason.advice.endswith(".") for reason in found.reasons)


def test_limits_are_not_near_what_works(anatomy):
    """Each lies well above what is measured of the vector that works, and well below what fails."""
    found = {name: transfer(anatomy, name, Outcome()) for name in anatomy.vectors}
    assert found["works"].outside < 0.05 < 0.8 < found["tokens"].outside
    assert anatomy.whole.vectors["works"].distance < 0.1 and anatomy.whole.vectors["another base"].distance > 1.1
    (noise,) = found["shuffled"].reasons
    assert noise.measured > 0.9


def test_facts_of_the_pocket_pair(anatomy):
    said = transfer_facts({"works": transfer(anatomy, "works", Outcome())})
    assert said == [
        "“works” is 0.448 times as long as the way from minus to the target; in 1 of 2 layers it points against that "
        "way (cosines −0.023 to 0.016).",
        "“works” changes embeddings and head by 0.396 % of their norm, everything else by 1.86 %.",
    ]


@pytest.mark.parametrize(("alphas", "expected"), [((1, 4), []), ((2,), []), ((3, 4), ["too far"]), ((-1,), [])])
def test_an_alpha_that_is_too_large(anatomy, alphas, expected):
    """Exact answers of 100: 100 at α = 1, 88 at 2, 20 at 3, none at 4. The smallest that was tried counts."""
    found = transfer(anatomy, "works", Outcome(helps=False, alphas=alphas))
    assert names(found) == expected
    said = found.sentences()
    assert "Take a smaller α: 1.3 and less." in said[0] if expected else "nothing in its weights says why" in said[0]


def test_a_target_that_has_the_vector_already(pairs):
    anatomy = analyzed({"works": (GRPO, SFT)}, pairs[0]["twice"])
    (reason,) = transfer(anatomy, "works", Outcome(helps=False)).reasons
    assert (reason.name, reason.measured) == ("already there", pytest.approx(1, abs=0.05))


def line(name, *bits):
    first, last = bits[0], bits[-1]
    above = [b - (first + k / (len(bits) - 1) * (last - first)) for k, b in enumerate(bits)]
    return SimpleNamespace(name=name, bits=bits, barrier=max(above))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([line("donors", 7.654, 7.697, 7.738), line("target", 7.473, 7.501, 7.529, 7.576)], []),  # as measured
        ([line("target", 4.025, 4.003, 3.967, 3.964, 4.580)], ["loss"]),  # the same vector, four times as long
        ([line("donors", 2.0, 3.5, 2.1), line("target", 2.0, 2.0, 2.0)], ["a barrier"]),
    ],
)
def test_what_the_loss_along_alpha_says(anatomy, lines, expected):
    assert names(transfer(anatomy, "works", Outcome(), lines)) == expected


def scored(files, arms):
    """Real answers of real points, as the fleet would have them."""
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    loaded = {path: {n: t.float() for n, t in load_checkpoint(POCKET.parent / path).items()} for path in files}
    records = []
    for arm in arms:
        weights = dict(loaded[arm.point.base])
        for term in arm.point.terms:
            plus, minus = (loaded[source] for source in term.vector.sources())
            weights = {name: w + term.alpha * (plus[name] - minus[name]) for name, w in weights.items()}
        model.load_state_dict(weights | {"lm_head.weight": weights[EMBEDDING]})
        records += make_records(arm.name, measure.sums(model, tokenizer, DOCUMENTS), "pocket_sums")
    tasks = [make_task("pocket_sums")]
    return Findings(arms, summarise(arms, records, tasks, "baseline"), records, tasks)


def test_a_vector_of_another_skill_beside_the_one_that_works(pairs, anatomy):
    """Its weights are like those of one that works; that its plus does no better than its minus tells."""
    own, works = Vector(*pairs[1]["another skill"]), Vector(GRPO, SFT)
    arms = [Arm("baseline", WeightPoint(TARGET), alpha=0.0)]
    arms += [Arm(name, WeightPoint(TARGET, (Term(1.0, v),)), alpha=1.0) for name, v in (("w", works), ("s", own))]
    arms += [Arm(name, WeightPoint(path)) for name, path in (("sft", SFT), ("grpo", GRPO), ("reverse", own.plus))]
    findings = scored({TARGET, SFT, GRPO, own.plus}, arms)
    found = outcome(works, findings)
    assert (found.helps, found.donors) == (True, True)
    assert transfer(anatomy, "works", found).sentences() == []
    failed = outcome(own, findings)
    assert (failed.helps, failed.donors, failed.alphas) == (False, False, (1.0,))
    assert transfer(anatomy, "another skill", failed).sentences() == [
        "“another skill” does not help: plus itself does not do better than minus on pocket_sums. It does not hold "
        "this skill; take another donor."
    ]
    (reason,) = transfer(anatomy, "another skill", failed).reasons
    assert (reason.measured, reason.limit) == (None, None), "no number says it, and none is made up"
    unasked = outcome(own, Findings(arms[:3], summarise(arms[:3], findings.records, findings.tasks, "baseline"),
                                    findings.records, findings.tasks))  # fmt: skip
    beside = Findings(
        arms, summarise(arms, findings.records, findings.tasks, "reverse"), findings.records, findings.tasks
    )
    assert outcome(works, beside).helps is None, "that it does better than another model says nothing"
    (sentence,) = transfer(anatomy, "another skill", unasked).sentences()
    assert (
        "nothing in its weights says why" in sentence and "score plus and minus as arms beside the target" in sentence
    )
