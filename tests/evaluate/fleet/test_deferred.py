"""Tensors that are read where they are copied to, against the same ones read as they are."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from checkpoints import near, tensors, write_checkpoint
from points import read_point

from rvdist.core.method import FACTS, MethodSpec
from rvdist.core.point import Term, Vector, WeightPoint
from rvdist.evaluate.fleet.deferred import Deferred, defer_tensors
from rvdist.weights.reader import open_point

NAME, ROWS, COLUMNS = "model.embed_tokens.weight", 301, 48
METHODS = [
    MethodSpec(),
    MethodSpec("ties", 0.3),
    MethodSpec("della_linear", 0.5, 3),
    MethodSpec("iso_c"),
    MethodSpec("ram"),
]


@pytest.fixture
def point(tmp_path):
    base = tensors(0)
    weights = {"target": base, "plus": near(base, 1), "minus": near(base, 2)}
    paths = {name: str(write_checkpoint(tmp_path / name, own)) for name, own in weights.items()}
    return WeightPoint(paths["target"], (Term(0.5, Vector(paths["plus"], paths["minus"])),))


@pytest.fixture
def reader(point):
    with closing(open_point(point)) as opened:
        yield opened


def one_of(reader):
    return dict(defer_tensors(reader))[NAME]


def memory(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.full(shape, 7, dtype=dtype, device=device)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_a_copy_reads_into_its_target(alpha, method, point, monkeypatch):
    asked = WeightPoint(point.base, (replace(point.terms[0], alpha=alpha),), method)
    expected = dict(read_point(asked))
    monkeypatch.delattr(Deferred, "read")
    with closing(open_point(asked)) as reader:
        found = {name: memory(*tensor.shape).copy_(tensor) for name, tensor in defer_tensors(reader)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_rows_are_those_of_the_whole(method, point):
    asked = replace(point, method=method)
    whole = dict(read_point(asked))[NAME]
    with closing(open_point(asked)) as reader:
        tensor = one_of(reader)
        fused = memory(2 * ROWS, COLUMNS)
        fused.narrow(0, 5, 96).copy_(tensor.narrow(0, 205, 96))
        fused.narrow(0, 200, 20).copy_(tensor[100:][3:23].narrow(1, 0, COLUMNS))
    assert torch.equal(fused[5:101], whole[205:]) and torch.equal(fused[200:220], whole[103:123])
    assert (fused[:5] == 7).all() and (fused[101:200] == 7).all() and (fused[220:] == 7).all()


def test_a_matrix_of_each_expert_is_one_of_the_whole(point):
    whole = dict(read_point(point))[NAME]
    with closing(open_point(point)) as reader:
        rows, (alone,) = one_of(reader).unbind(), one_of(reader).unsqueeze(0).unbind()
        assert torch.equal(memory(COLUMNS).copy_(rows[9]), whole[9]) and len(rows) == ROWS
        assert reader.bytes_read == 3 * COLUMNS * 2
        assert torch.equal(memory(ROWS, COLUMNS).copy_(alone), whole)
        assert [part.tolist() for part in one_of(reader).unbind(1)] == whole.t().tolist()


def test_of_a_shard_of_rows_only_those_are_read(reader):
    memory(40, COLUMNS).copy_(one_of(reader).narrow(0, 200, 40))
    assert reader.bytes_read == 3 * 40 * COLUMNS * 2


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_columns_are_those_of_the_whole(alpha, method, point):
    """Of them all, of some rows, of rows of them; into a range of rows of a larger parameter."""
    asked = WeightPoint(point.base, (replace(point.terms[0], alpha=alpha),), method)
    whole = dict(read_point(asked))[NAME]
    with closing(open_point(asked)) as reader:
        tensor, fused = one_of(reader), memory(2 * ROWS, 20)
        fused.narrow(0, 5, ROWS).copy_(tensor.narrow(1, 28, 20))
        fused.narrow(0, 400, 96).copy_(tensor.narrow(0, 205, 96).narrow(1, 0, 20))
        fused.narrow(0, 500, 50).copy_(tensor.narrow(1, 7, 20).narrow(0, 11, 50))
        rows = tensor.narrow(1, 7, 20).unbind()
        assert torch.equal(memory(20).copy_(rows[9]), whole[9, 7:27])
        assert torch.equal(tensor.narrow(1, 7, 20) + 0, whole[:, 7:27])
        assert torch.equal(memory(30, 4).copy_(tensor[100:][3:33][:, 2:22][:, 5:9]), whole[103:133, 7:11])
    assert torch.equal(fused[5 : 5 + ROWS], whole[:, 28:]) and torch.equal(fused[400:496], whole[205:, :20])
    assert torch.equal(fused[500:550], whole[11:61, 7:27])
    assert (fused[:5] == 7).all() and (fused[5 + ROWS : 400] == 7).all() and (fused[550:] == 7).all()


@pytest.mark.parametrize("name", [one.name for one in FACTS if not one.whole_tensors])
def test_of_a_shard_of_columns_only_those_are_read(name, point):
    """By methods that need neither other elements nor the places of theirs."""
    asked = replace(point, method=MethodSpec(name, 0.5 if name.startswith("dare") else 1.0).without_unused())
    whole = dict(read_point(asked))[NAME]
    with closing(open_point(asked)) as reader:
        assert torch.equal(memory(ROWS, 7).copy_(one_of(reader).narrow(1, 3, 7)), whole[:, 3:10])
        assert reader.bytes_read == 3 * ROWS * (COLUMNS if name.startswith("dare") else 7) * 2


def test_columns_of_several_matrices_in_one_tensor(tmp_path):
    """Experts that are stored together: those of one, and those of all."""
    base = tensors(0)
    base["experts"] = torch.arange(5 * 6 * 8, dtype=torch.float32).view(5, 6, 8).bfloat16()
    with closing(open_point(WeightPoint(str(write_checkpoint(tmp_path / "base", base))))) as reader:
        experts = dict(defer_tensors(reader))["experts"]
        one = experts.unbind()[3]
        assert torch.equal(memory(6, 3).copy_(one.narrow(1, 4, 3)), base["experts"][3, :, 4:7])
        assert reader.bytes_read == 6 * 3 * 2
        assert torch.equal(memory(2, 6, 3).copy_(experts[1:3][..., 2:5]), base["experts"][1:3, :, 2:5])
        assert torch.equal(memory(5, 2, 8).copy_(experts.narrow(1, 2, 2)), base["experts"][:, 2:4])
        (alone,) = one.unsqueeze(0).narrow(2, 1, 4).unbind()
        assert torch.equal(memory(6, 4).copy_(alone), base["experts"][3, :, 1:5])


def test_columns_of_what_has_fewer_rows_and_of_what_is_not_finite(tmp_path):
    """A vector's missing rows stay the target's; what is not finite is counted and named."""
    base, shorter = tensors(0), tensors(1)
    base[NAME][5, 4] = float("inf")
    shorter[NAME] = shorter[NAME][:200].contiguous()
    paths = [str(write_checkpoint(tmp_path / n, own)) for n, own in (("target", base), ("plus", shorter))]
    asked = WeightPoint(paths[0], (Term(0.5, Vector(paths[1])),))
    with closing(open_point(asked)) as reader:
        expected = memory(ROWS, COLUMNS).copy_(one_of(reader))
        assert reader.nonfinite == [1]
        assert torch.equal(memory(ROWS, 9).copy_(one_of(reader).narrow(1, 2, 9)), expected[:, 2:11])
        assert reader.nonfinite == [2] and list(reader.spoiled) == [NAME]


def test_counting_elements_reads_nothing(reader):
    tensor = one_of(reader)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((ROWS, COLUMNS), torch.bfloat16, "cpu")
    memory(ROWS, COLUMNS, device="meta").copy_(tensor)
    memory(10, COLUMNS, device="meta").copy_(tensor.narrow(0, 20, 10))
    assert reader.bytes_read == 0


def test_whatever_else_is_done_to_it_it_is_read_once(point, reader):
    whole, tensor = dict(read_point(point))[NAME], one_of(reader)
    columns, rows = memory(ROWS, 7), memory(COLUMNS, ROWS)
    columns.copy_(tensor.narrow(1, 3, 7))
    rows.t().copy_(tensor)
    assert torch.equal(columns, whole[:, 3:10]) and torch.equal(rows, whole.t())
    assert torch.equal(memory(ROWS, COLUMNS, dtype=torch.float16).copy_(tensor), whole.half())
    assert torch.equal(tensor[::2], whole[::2]) and torch.equal(tensor[9], whole[9])
    assert torch.equal(torch.cat([tensor, tensor * 2]), torch.cat([whole, whole * 2]))
    assert [part.shape[0] for part in tensor.chunk(3)] == [part.shape[0] for part in whole.chunk(3)]
    with pytest.raises(RuntimeError):
        memory(ROWS, 3).copy_(tensor)
    assert reader.bytes_read == 3 * ROWS * (COLUMNS + 7) * 2, "the columns by themselves"
