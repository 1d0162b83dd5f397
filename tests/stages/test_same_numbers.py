"""The same name, the same number: what a summary says of a metric is what lm-eval says, to the last digits."""

from __future__ import annotations

import json
import math

import pytest
from checkpoints import POCKET
from lm_eval.tasks import TaskManager
from lm_eval_logs import Scripted, log_samples
from transformers import AutoTokenizer

from rvdist.core.point import Arm, WeightPoint
from rvdist.evaluate.replay import Recording
from rvdist.evaluate.suite import Suite
from rvdist.report.findings import Findings
from rvdist.report.statistics.compare import summarise
from rvdist.report.wording import Scale
from rvdist.stages.score import groups_of

ARM = Arm("baseline", WeightPoint("t"), alpha=0.0)
# The last three documents of `twice` are the same one, and are asked in the same words.
SIZES = {"few": range(7), "twice": [*range(9), 8, 8], "many": range(40)}
GENERATED = """output_type: generate_until
generation_kwargs: {until: ['STOP'], max_gen_toks: 8}
filter_list:
  - {name: flexible, filter: [{function: regex, regex_pattern: '(\\d)'}, {function: take_first}]}
  - {name: strict-match, filter: [{function: regex, regex_pattern: '#(\\d)'}, {function: take_first}]}
metric_list: [{metric: exact_match}]
"""
CHOSEN = 'output_type: multiple_choice\ndoc_to_choice: ["0", "1"]\nmetric_list: [{metric: acc}, {metric: f1}]\n'
ROLLED = "output_type: loglikelihood_rolling\nmetric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]\n"
TASKS = {"few": GENERATED, "twice": GENERATED, "many": GENERATED, "chosen": CHOSEN, "rolled": ROLLED}
GROUP = """group: all_of_it
task: [few, twice, many]
aggregate_metric_list:
  - {metric: exact_match, filter_list: [flexible], weight_by_size: true}
  - {metric: exact_match, filter_list: [strict-match], weight_by_size: false}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("same")
    for name, settings in TASKS.items():
        rows = [
            {"q": f"{name} {'x' * (k * k % 23)} {k}", "a": str(k % 3), "n": k % 2} for k in SIZES.get(name, range(12))
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        target = {"chosen": "n", "rolled": "'{{q}}'"}.get(name, "'{{a}}'")
        (place / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {place}/{name}.jsonl}}}}\n"
            f"test_split: test\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: {target}\n{settings}"
        )
    (place / "group.yaml").write_text(GROUP)
    return place


def reply(arguments, repeat):
    """By the words and by how often they were asked: the same document is answered right once, and wrong then."""
    digit = (sum(map(ord, arguments[0])) + repeat) % 4
    return f"so {digit}" if digit % 2 else f"#{digit} is it"


def score(arguments, repeat):
    return -float(sum(map(ord, arguments[-1])) % 17) - 0.25, False


def scored(place, names, answerer):
    """lm-eval's own results of these tasks, and our rows of a replay of its log."""
    tasks = TaskManager(include_path=[place], include_defaults=False).load(names)
    out = place / "out" / "-".join(names)
    published = log_samples(answerer, tasks, out)
    suite = Suite.load(names, include_path=place, chat=False)
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    answers, _, shortened = Recording(out).answers(suite.documents_asked(tokenizer), "", 0, "baseline")
    results, records = suite.score(ARM, "", tokenizer, suite.requests(tokenizer), answers, 0)
    tasks = suite.infos(records)
    groups = groups_of(suite, tasks)
    rows = summarise([ARM], records, tasks, None, groups)
    assert shortened == 0
    return published["results"], results["results"], rows, Findings([ARM], rows, records, tasks, groups)


def numbers(results):
    """Every number by (task, metric, filter), but for what counts documents and for standard errors."""
    return {
        (task, *key.split(",")): value
        for task, own in results.items()
        for key, value in own.items()
        if "," in key and "stderr" not in key
    }


def test_every_number_of_a_group_is_lm_evals(place):
    published, ours, rows, _ = scored(place, ["all_of_it"], Scripted(reply, score))
    assert numbers(ours) == numbers(published)
    found = {(row.task, row.metric, row.filter): row.value for row in rows}
    assert found.keys() == numbers(published).keys() and len(found) == 8
    assert found == pytest.approx(numbers(published), rel=1e-12)
    twice, whole = (next(row for row in rows if row.task == name) for name in ("twice", "all_of_it"))
    assert (twice.n, whole.n) == (11, 58), "a document that is there three times is three"
    by_size, unweighted = (found["all_of_it", "exact_match", name] for name in ("flexible", "strict-match"))
    members = [found[name, "exact_match", "strict-match"] for name in SIZES]
    assert unweighted == pytest.approx(sum(members) / 3) and 0 < by_size != unweighted


def test_what_has_the_name_of_lm_evals_metric_has_its_number(place):
    published, ours, rows, findings = scored(place, ["chosen", "rolled"], Scripted(reply, score))
    assert numbers(ours) == numbers(published)
    same = {key: value for key, value in numbers(published).items() if key[1] not in ("f1", "byte_perplexity")}
    found = {(row.task, row.metric, row.filter): row for row in rows}
    assert same.keys() == found.keys() - {("rolled", "log2_byte_perplexity", "none")} and len(same) == 2
    for key, value in same.items():
        assert found[key].value == pytest.approx(value, rel=1e-12)
    pooled, plain = (found["rolled", name, "none"] for name in ("bits_per_byte", "log2_byte_perplexity"))
    assert pooled.value != pytest.approx(plain.value), "a mean over documents is another number"
    assert pooled.ci_low < pooled.value < pooled.ci_high
    scale = Scale([pooled])
    assert (scale.percent, scale.unit, scale.factor) == (False, "bits per byte", 1)
    assert scale.amount(0.05) == "0.05 bits per byte" and findings.scales["rolled"].unit == "bits per byte"


def test_the_interval_of_what_is_pooled_holds():
    """Documents of very different lengths, whose bits for each byte differ: intervals hold the ratio of sums."""
    import numpy as np

    from rvdist.report.statistics.compare import compare, score_interval
    from rvdist.report.statistics.sample import Sample

    rng, held, called, rounds = np.random.default_rng(0), 0, 0, 400
    truth = 1.0 + 0.1 * math.exp(0.5**2)  # bits are 1 + 0.1 · length / its mean
    for _ in range(rounds):
        lengths = rng.lognormal(0, 0.5, 150)
        bits = 1 + 0.1 * lengths / math.exp(0.125) + 0.2 * rng.standard_normal((2, 150))
        weights = lengths / lengths.mean()
        own, other = (Sample((), one, weights, (150,), False, False, "", frozenset([0])) for one in bits)
        low, high = score_interval(own)
        held += low <= truth <= high
        called += compare(own, other).p_value < 0.05
        assert own.score == pytest.approx((lengths * bits[0]).sum() / lengths.sum())
    assert held / rounds >= 0.92 and called / rounds <= 0.075


def test_a_recorded_text_ends_where_an_engine_would_have(place, tmp_path):
    suite = Suite.load(["few"], include_path=place, chat=False)
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    samples = [
        {"doc_id": k, "doc": doc, "resps": [[f"#{doc['a']}" + " STOP and on: #9" * (k % 2)]]}
        for k, doc in enumerate(suite.tasks["few"].eval_docs)
    ]
    file = tmp_path / "samples_few_2025-01-01T00-00-00.jsonl"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    answers, reworded, shortened = Recording(tmp_path).answers(suite.documents_asked(tokenizer), "", 0, "baseline")
    assert (reworded, shortened) == (7, 3)
    assert [answer.text for answer in answers["few"]] == [f"#{k % 3}" + " " * (k % 2) for k in range(7)]


def test_records_say_how_long_answers_are_and_why_they_end(place):
    from rvdist.evaluate.request import Completion

    suite = Suite.load(["few"], include_path=place, chat=False)
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    requests = suite.requests(tokenizer)
    answers = [Completion("#1" if k < 4 else "1", "length" if k > 4 else "stop", 9, k) for k in range(7)]
    for part, kept in ((suite, range(7)), (suite.restrict({"few": [2, 5]}), [2, 5])):
        given = {"few": [answers[k] for k in kept]}
        _, records = part.score(ARM, "", tokenizer, part.requests(tokenizer), given, 0)
        for filtered in ("flexible", "strict-match"):
            own = [record for record in records if record.filter == filtered]
            assert [record.doc_id for record in own] == list(kept)
            assert [record.tokens for record in own] == [(k,) for k in kept]
            assert [record.finish for record in own] == [(answers[k].finish,) for k in kept]
            assert [record.in_format for record in own] == [k < 4 for k in kept], "as its strict-match asks for it"
    _, records = suite.score(ARM, "", tokenizer, requests, {"few": [Completion("#1", "", 0, 0)] * 7}, 0)
    assert {record.tokens for record in records} == {()}, "nobody wrote it down"


def test_records_of_an_older_run_are_read(tmp_path):
    from made_up import make_records

    from rvdist.core.errors import BadInput
    from rvdist.core.record import read_records

    records = make_records("baseline", [1.0, 0.0])
    newer = ("weights", "tokens", "finish", "in_format")
    old = [{key: value for key, value in vars(record).items() if key not in newer} for record in records]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(one) + "\n" for one in old))
    assert list(read_records(tmp_path / "old.jsonl")) == records
    for wrong in ({"tokens": [1.5]}, {"tokens": 3}, {"finish": ["why"]}, {"in_format": 1}, {"weights": []}):
        (tmp_path / "wrong.jsonl").write_text(json.dumps(old[0] | wrong) + "\n")
        with pytest.raises(BadInput, match="line 1 is no record"):
            list(read_records(tmp_path / "wrong.jsonl"))
