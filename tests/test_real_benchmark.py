"""The benchmark of real models compares like with like, knows exact results, and its parts end in a table."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import real
import real_grpo
import real_models

from rvdist.core.record import Record


def test_problems_say_their_answer():
    drawn = real_models.problems(300, 1)
    assert len({one["question"] for one in drawn}) == 300
    for one in drawn:
        (first, between), (second, end) = (step.split(" = ") for step in one["steps"])
        assert eval(first) == int(between) and second.startswith(f"{between} ") and eval(second) == int(end)
        assert end == one["answer"] and int(end) >= 0
        given = real._with_choices(one)
        assert len(set(given["choices"])) == 4 and given["choices"][given["label"]] == one["answer"]


def test_rounding_is_that_of_the_exact_number():
    """Halfway between two bf16 and a little to either side, where fp32 knows no difference; and many others."""
    half, tiny = 1 + 2**-8, 2**-40
    exact = torch.tensor(
        [half, half + tiny, half - tiny, -half - tiny, -half + tiny, 3 * half, 0.0], dtype=torch.float64
    )
    assert real.round_once(exact, torch.bfloat16).tolist() == [1.0, 1 + 2**-7, 1.0, -1 - 2**-7, -1.0, 3.015625, 0.0]
    many = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for number, rounded in zip(many.tolist(), real.round_once(many, torch.bfloat16).tolist(), strict=True):
        around = torch.tensor(rounded, dtype=torch.bfloat16).view(torch.int16) + torch.tensor([-1, 0, 1]).short()
        nearest = min(around.view(torch.bfloat16).tolist(), key=lambda near: abs(Fraction(near) - Fraction(number)))
        assert rounded == nearest


def test_elements_off_the_exact_result_are_counted(tmp_path):
    numbers = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    family = {}
    for side, tensor in zip(("target", "plus", "minus"), numbers, strict=True):
        family[side] = tmp_path / side
        family[side].mkdir()
        save_file({"w": tensor.clone()}, family[side] / "model.safetensors")
    target, plus, minus = numbers.double()
    merged = real.round_once(target + 0.5 * (plus - minus), torch.bfloat16)
    merged[[3, 7]] += 1
    (tmp_path / "merged").mkdir()
    save_file({"w": merged}, tmp_path / "merged" / "model.safetensors")
    assert real.off(family, 0.5, tmp_path / "merged") == (2, 1000)


@pytest.fixture
def both():
    """Our records and lm-eval's samples of a task with an answer and one with choices, at two α's; equal."""
    records, rows = [], []
    for alpha in (0.0, 0.5):
        for task, kind, metric in (("real_problems", "strict", "exact_match"), ("real_choices", "none", "acc")):
            for k in range(3):
                said, scores = f"{alpha} {k}", {metric: float(k > 0)}
                records.append(
                    Record("arm", "", alpha, "", task, kind, 0, k, f"{k}", scores, f"{k}?", "", said, "", tokens=(4,))
                )
                rows.append([alpha, task, kind, k, f"{k}?", said, scores])
    return records, rows


def test_what_differs_is_counted(both):
    records, rows = both
    assert real.compare(records, rows) == {"samples": 12, "prompts": 0, "answers": 0, "logprobs": 0, "scores": 0}
    rows[0][4], rows[1][5], rows[2][6], rows[3][5] = "0!", "else", {"exact_match": 0.5}, "0.25"
    assert real.compare(records, rows) == {"samples": 12, "prompts": 1, "answers": 1, "logprobs": 1, "scores": 1}


def test_samples_without_a_counterpart_end_it(both):
    records, rows = both
    with pytest.raises(SystemExit, match="1 samples have no counterpart"):
        real.compare(records, rows[1:])


def test_tokens_and_scores_are_those_of_a_document_once(both):
    records, _ = both
    again = [Record(**vars(one) | {"filter": "last-number", "metrics": {"exact_match": 1.0}}) for one in records[:3]]
    assert real.written_tokens(records + again) == 12 * 4
    assert real.means(records + again)[0.0] == {
        "real_problems": pytest.approx(2 / 3),
        "real_choices": pytest.approx(2 / 3),
    }


def test_tasks_bring_their_documents(tmp_path):
    data = tmp_path / "data"
    (data / "bbh").mkdir(parents=True)
    for split in ("train", "test"):
        lines = [json.dumps({"question": f"{k}?", "answer": f"#### {k}"}) for k in range(9)]
        (data / f"gsm8k_{split}.jsonl").write_text("\n".join(lines))
    for subset in real.HARD:
        examples = [{"input": f"{k}", "target": "True"} for k in range(9)]
        (data / "bbh" / f"{subset}.json").write_text(json.dumps({"examples": examples}))
    assert real.write_tasks(tmp_path, None, 5, 3) == [real.PROBLEMS, real.CHOICES]
    names = real.write_tasks(tmp_path, data, 5, 3)
    assert len(names) == 6
    for name in names:
        settings = json.loads((tmp_path / "tasks" / f"{name}.yaml").read_text())
        file = Path(settings["dataset_kwargs"]["data_files"]["test"])
        assert settings["task"] == name and len(file.read_text().splitlines()) == (5 if name in names[:2] else 3)


def test_options_that_make_no_sense_are_refused():
    assert real.arguments(["--alphas", "1", "0"]).alphas == [0.0, 1.0]
    for wrong in (["--alphas", "0.5", "1"], ["--target", "x"], ["--only", "nothing"]):
        with pytest.raises(SystemExit):
            real.arguments(wrong)


def test_the_table_has_what_was_found():
    tool = {"wall": [4.0, 6.0], "stage": [], "resident": 2**30, "off": 5, "elements": 1000}
    ours = tool | {"wall": [2.0, 3.0], "stage": [0.5, 0.7], "off": 0, "anonymous": 200 << 20}
    sweep = {
        "alphas": [0.0, 1.0], "tasks": ["real_problems"], "threads": 1, "prefixes": False,
        "ours": {
            "wall": 50.0, "phases": {"generate": 40.0, "swap": 1.0, "engine_start": 8.0}, "fleet": {"swaps": 1},
            "tokens": 10_000,
        },
        "cold": [{"alpha": 0.0, "merge": 0.0, "evaluate": 60.0}, {"alpha": 1.0, "merge": 10.0, "evaluate": 55.0}],
        "warm": {"wall": 65.0, "start": 12.0, "generate": 50.0, "tokens": 10_000, "reload": [0.5]},
        "same": {"samples": 40, "prompts": 0, "answers": 1, "logprobs": 2, "scores": 3},
        "documents": {"real_problems": 20}, "means": {"0": {"real_problems": 0.1}, "1": {"real_problems": 0.6}},
    }  # fmt: skip
    search = {"best": "alpha=1", "samples": 30, "full_grid": 40}
    swap = {
        "architecture": "LlamaForCausalLM", "parameters": 134_515_008, "start": 10.0, "first": 2.0,
        "later": [0.4, 0.5, 0.6], "answers": 32, "different": 0, "moved": 31,
    }  # fmt: skip
    found = {
        "machine": "2 cores.", "merge": {"alpha": 0.5, "tools": {"rvdist": ours, "mergekit": tool}}, "sweep": sweep,
        "race": {"wall": 25.0, "search": search}, "swap": {"smol": swap},
    }  # fmt: skip
    text = "\n".join(real.report(found))
    assert (
        "| rvdist | 2.5 (2.0 to 3.0) | 1.0 | 0.6 (0.5 to 0.7) | 200 MiB anonymous, a process at most | 0 of 1,000 |"
        in text
    )
    assert "| mergekit | 5.0 (4.0 to 6.0) | 2.0 |  | 1.00 GiB resident | 5 of 1,000 |" in text
    assert "| rvdist, one engine | 50 | 1.0 |  | 40 | 20% | 4.00 |" in text
    assert "a process each | 125 | 2.5 | 10 |" in text and "lm-eval | 75 | 1.5 | 10 | 50 | 33% | 5.00 |" in text
    assert "Of 40 samples 0 prompts, 1 answers, 2 log-probabilities and 3 scores differ" in text
    assert "`search=racing` took 25 s, 0.33 × (b)'s time; the grid's best α is 1; the race's is alpha=1" in text
    assert "| LlamaForCausalLM | 135 M | 10.0 | 2.00 | 0.50 (0.40 to 0.60) | 5.0% | 0 of 32 | 31 of 32 |" in text
    assert real.report({"swap": {"smol": swap}})[1].startswith("| architecture |")


def test_checkpoints_appear_whole(tmp_path):
    def breaks(out):
        (out / "half").touch()
        raise OSError

    with pytest.raises(OSError):
        real_models.make(tmp_path / "m", breaks)
    assert not (tmp_path / "m").exists()
    made = real_models.make(tmp_path / "m", lambda out: (out / "all").touch())
    assert [file.name for file in made.iterdir()] == ["all"]
    real_models.make(tmp_path / "m", breaks)  # what is there is kept


def test_training_shows_steps_only_where_it_is_to():
    one = {"steps": ["3 + 4 = 7", "7 - 2 = 5"], "answer": "5"}
    assert real_models.reply(one, shown=False) == "#### 5<|im_end|>\n"
    assert real_models.reply(one, shown=True) == "3 + 4 = 7\n7 - 2 = 5\n#### 5<|im_end|>\n"


def test_a_prompt_read_once_for_its_group_gives_what_each_sample_alone_would():
    """Log-probabilities and gradients of GRPO's samples, prompts of two lengths, beside whole sequences one by one."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.tokenization_utils_base import BatchEncoding

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=64, **shape)
    model = LlamaForCausalLM(config).eval()
    asked = torch.tensor([[0, 0, 5, 6, 7], [11, 12, 13, 14, 15]])
    given = BatchEncoding({"input_ids": asked, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])})
    completions = real_grpo.roll_out(model, given, 3)
    assert completions.shape[0] == 6
    weights = torch.randn(completions.shape)
    found = real_grpo.log_probabilities(model, given, completions, 3)
    (found * weights).sum().backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
    model.zero_grad()
    alone = []
    for place, said in enumerate(completions):
        prompt = asked[place // 3][given.attention_mask[place // 3].bool()]
        logits = model(torch.cat([prompt, said])[None, :-1]).logits[0, len(prompt) - 1 :]
        alone.append(logits.log_softmax(-1).gather(1, said[:, None])[:, 0])
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-5)
    (torch.stack(alone) * weights).sum().backward()
    for name, one in model.named_parameters():
        torch.testing.assert_close(gradients[name], one.grad, rtol=1e-4, atol=1e-4)


def test_grpo_rewards_the_first_marked_number_alone():
    assert real_grpo.right("12 + 3 = 15\n#### 15", "15") and not real_grpo.right("#### 1\n#### 15", "15")
    assert not real_grpo.right("15", "15")
