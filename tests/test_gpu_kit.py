"""The kit for a card: what of it needs next to nothing runs where next to nothing is installed, and a red check stops
it. The rest of it has other tests' parts, and is run by hand (`--device cpu`)."""

import json

import pytest
import torch
from absent import BENCHMARKS, run_without

from rvdist.core.method import FACTS

pytestmark = pytest.mark.heavy

ABSENT = (
    "ray", "hydra", "omegaconf", "vllm", "lm_eval", "scipy", "statsmodels", "huggingface_hub", "transformers", "rich",
    "matplotlib", "datasets", "tokenizers",
)  # fmt: skip


def kit(tmp_path, *arguments, before=""):
    done = run_without(ABSENT, "gpu_kit.py", tmp_path, *arguments, before=before)
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def test_two_checks_need_torch_numpy_numba_xxhash_and_safetensors_alone(tmp_path):
    done, (first, second) = kit(tmp_path, "1", "2", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (first["check"], first["name"], first["ok"], first["compared"]) == (1, "bytes", True, 9 * len(FACTS))
    assert (second["check"], second["name"], second["ok"]) == (2, "copies", True)
    rates = {key for key in second if key.endswith("_gb_per_second")}
    assert {"pageable_gb_per_second", "pinned_gb_per_second", "readers_16_gb_per_second"} < rates
    assert [path.name for path in tmp_path.iterdir()] == ["sitecustomize.py"], "it leaves nothing behind"


def test_it_stops_at_the_first_red_check_and_says_why(tmp_path):
    """Where torch gives other bits on what stands for the card."""
    wrong = (
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import gpu\n"
        "own, calls = gpu.digests, []\n"
        "gpu.digests = lambda reader: (calls.append(0), own(reader), len(calls))[1:]\n"
    )
    done, lines = kit(tmp_path, "1", "2", "--device", "cpu", before=wrong)
    (line,) = lines
    assert done.returncode == 1 and line["ok"] is False
    assert line["why"].startswith("linear, torch.bfloat16 to torch.bfloat16: ")


def test_a_check_that_there_is_not_is_said(tmp_path):
    done, lines = kit(tmp_path, "9", "--device", "cpu")
    assert done.returncode == 2 and not lines and "there is no check 9" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_no_card_is_one_sentence(tmp_path):
    done, lines = kit(tmp_path)
    assert done.returncode == 2 and not lines
    assert done.stderr == "torch finds no CUDA device here; --device cpu runs the same code without one\n"
