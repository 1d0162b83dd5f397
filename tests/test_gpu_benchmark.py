"""The benchmark of a card runs where next to nothing is installed, and says so where there is no card."""

import pytest
import torch
from absent import run_without

pytestmark = pytest.mark.heavy

ABSENT = (
    "ray", "hydra", "omegaconf", "vllm", "lm_eval", "numba", "scipy", "xxhash", "huggingface_hub", "transformers",
    "rich", "matplotlib",
)  # fmt: skip


def benchmark(tmp_path, *arguments):
    return run_without(ABSENT, "gpu.py", tmp_path, *arguments)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_needs_torch_and_numpy_alone(tmp_path, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = benchmark(tmp_path, "--device", device, "--gib", "0.01", "--rounds", "1")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(f"digests of {device} and CPU agree") == 2 and "[4, 4, 2] elements" in found.stdout
    assert f"| whole path, {device}: in and out |" in found.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["sitecustomize.py"], "it leaves nothing behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_no_card_is_one_sentence(tmp_path):
    found = benchmark(tmp_path)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr == "torch finds no CUDA device here; --device cpu runs the same code without one\n"
