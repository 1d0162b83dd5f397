"""Computed tensors: equal to whole-tensor references, and the same bits for every range."""

import json
from contextlib import closing

import pytest
import torch
from adapters import RANK, close, differences, factors, write_adapter
from checkpoints import write_checkpoint
from safetensors.torch import save_file

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.operand import open_operand
from rvdist.weights.products import multiply


def read(path, name, step=None):
    source = open_source(str(path))
    operand, spec = open_operand(source), source.tensors[name]
    step = step or max(1, spec.numel)
    buffer = torch.empty(step * 8, dtype=torch.uint8)
    chunks = [operand.read(name, b, min(b + step, spec.numel), buffer).clone() for b in range(0, spec.numel, step)]
    assert operand.bytes_read > 0
    operand.close()
    return torch.cat(chunks).view(spec.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_is_its_products(tmp_path, dtype):
    tensors = factors(dtype=dtype)
    path = write_adapter(tmp_path / "a", tensors)
    for name, exact in differences(tensors).items():
        found = read(path, name)
        assert found.dtype == torch.float32 and found.shape == exact.shape and close(found, exact)
        for step in (1, 47, 48, 49, 1000):
            assert torch.equal(read(path, name, step), found), (name, step)


def test_fan_in_fan_out_stores_the_transpose(tmp_path):
    path = write_adapter(tmp_path / "a", factors(), fan_in_fan_out=True)
    exact = differences(factors())["model.layers.2.mlp.up_proj.weight"]
    assert close(read(path, "model.layers.2.mlp.up_proj.weight", 100), exact.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("across", [False, True])
def test_factors_are_those_of_what_is_read(tmp_path, across, dtype):
    tensors = factors(dtype=dtype)
    path = write_adapter(tmp_path / "a", tensors, fan_in_fan_out=across)
    operand = open_operand(open_source(str(path)))
    for name in differences(tensors):
        left, right = operand.factors(name, 0)
        assert left.dtype == right.dtype == torch.float64 and left.shape[1] == RANK
        assert close(read(path, name), left @ right)


def test_what_is_not_stored_as_factors_has_none(tmp_path):
    directory = write_checkpoint(tmp_path / "plain", {"x": torch.zeros(2, 2)})
    refused = pytest.raises(BadInput, match=f"{directory}: holds tensor x not as two factors")
    with closing(open_operand(open_source(str(directory)))) as plain, refused:
        plain.factors("x", 0)


def test_products_do_not_depend_on_threads():
    left, right = torch.randn(300, RANK), torch.randn(RANK, 500)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        multiply(left, right, 0.3, 0, out := torch.empty(150_000))
        torch.set_num_threads(before)
        results.append(out)
    assert torch.equal(*results)


def test_what_is_not_a_number_stays_so(tmp_path):
    tensors = factors()
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, 5] = float("nan")
    found = read(write_adapter(tmp_path / "a", tensors), "model.layers.0.self_attn.q_proj.weight")
    assert found[:, 5].isnan().all() and found.isnan().sum() == 48


def write_vector(path, parts, entries):
    path.mkdir()
    save_file(parts, path / "vector.safetensors", metadata={"rvdist": "vector"})
    (path / "vector.json").write_text(json.dumps({"version": 1, "tensors": entries}))
    return path


def sparse(tmp_path, indices, values, shape=(5, 4)):
    parts = {"x.indices": torch.tensor(indices, dtype=torch.int32), "x.values": torch.tensor(values)}
    return write_vector(tmp_path / "v", parts, {"x": {"form": "sparse", "shape": shape}})


@pytest.mark.parametrize("step", [1, 3, 4, 7, 20])
def test_sparse_tensors_are_zero_elsewhere(tmp_path, step):
    found = read(sparse(tmp_path, [0, 3, 4, 19], [1.0, 2.0, 3.0, 4.0]), "x", step)
    exact = torch.zeros(20)
    exact[[0, 3, 4, 19]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(found, exact.view(5, 4))


@pytest.mark.parametrize("indices", [[3, 0, 4], [0, 4, 4], [0, 21, 3]])
def test_indices_that_do_not_ascend_are_refused(tmp_path, indices):
    with pytest.raises(BadInput, match="indices of tensor x do not ascend"):
        read(sparse(tmp_path, indices, [1.0, 2.0, 3.0]), "x")


@pytest.mark.parametrize(
    ("parts", "entry"),
    [
        ({"x": torch.zeros(4, 5)}, {"form": "dense", "shape": [5, 4]}),
        ({"x": torch.zeros(5, 4, dtype=torch.int32)}, {"form": "dense", "shape": [5, 4]}),
        ({"x": torch.zeros(5, 4)}, {"form": "dense"}),
        ({"x": torch.zeros(5, 4)}, {"form": "../dense", "shape": [5, 4]}),
        ({"x": torch.zeros(5, 4)}, {"form": "sparse", "shape": [5, 4]}),
        ({"x": torch.zeros(5, 4), "y": torch.zeros(1)}, {"form": "dense", "shape": [5, 4]}),
        ({"x": torch.zeros(5, 4)}, ["dense"]),
        ({"x.left": torch.zeros(5, 2), "x.right": torch.zeros(3, 4)}, {"form": "low_rank", "shape": [5, 4]}),
        ({"x.left": torch.zeros(5, 2), "x.right": torch.zeros(2, 4)}, {"form": "low_rank", "shape": [4, 5]}),
        ({"x.left": torch.zeros(5, 2).double(), "x.right": torch.zeros(2, 4)}, {"form": "low_rank", "shape": [5, 4]}),
        ({"x.indices": torch.zeros(2), "x.values": torch.zeros(2)}, {"form": "sparse", "shape": [5, 4]}),
        ({"x.indices": torch.zeros(9).int(), "x.values": torch.zeros(9)}, {"form": "sparse", "shape": [2, 4]}),
        ({"x.indices": torch.zeros(2).int(), "x.values": torch.zeros(2)}, {"form": "sparse", "shape": [-5, -4]}),
        ({"x.indices": torch.zeros(2).int(), "x.values": torch.zeros(2)}, {"form": "sparse", "shape": [2**70]}),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(tmp_path, parts, entry):
    with pytest.raises(BadInput, match=r"vector.json: does not fit the weight files beside it") as refused:
        open_source(str(write_vector(tmp_path / "v", parts, {"x": entry})))
    assert "\n" not in str(refused.value)


def test_a_vector_without_its_description_or_of_another_version(tmp_path):
    path = write_vector(tmp_path / "v", {"x": torch.zeros(3)}, {"x": {"form": "dense", "shape": [3]}})
    (path / "vector.json").write_text('{"version": 3}')
    with pytest.raises(BadInput, match="of version 3, which this rvdist does not know"):
        open_source(str(path))
    (path / "vector.json").unlink()
    with pytest.raises(BadInput, match=r"a stored vector without its vector.json"):
        open_source(str(path))
