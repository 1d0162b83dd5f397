"""fp8 with block scales: what is read is what whole tensors give, and what is not that is refused in one sentence."""

import json

import pytest
import torch
from checkpoints import near, tensors, write_checkpoint
from fp8 import E4M3, dequantized, quantize, quantized, spread, write_fp8

from rvdist.core.errors import BadInput
from rvdist.core.timing import anonymous_bytes
from rvdist.weights import compat, operand
from rvdist.weights.checkpoint.fp8 import FP8 as KIND
from rvdist.weights.checkpoint.fp8 import Scaled, without_quantization
from rvdist.weights.checkpoint.header import build_header
from rvdist.weights.checkpoint.source import open_source
from rvdist.weights.operand import open_operand

BLOCK = (32, 20)


def read(path, name, chunk):
    source = open_source(str(path))
    reading, numel = open_operand(source), source.tensors[name].numel
    cuts = [(begin, min(begin + chunk, numel)) for begin in range(0, numel, chunk)]
    parts = [reading.read(name, b, e, torch.empty(8 * (e - b), dtype=torch.uint8)).clone() for b, e in cuts]
    assert sum(e - b for b, e in cuts) <= reading.bytes_read
    return torch.cat(parts).view(source.tensors[name].shape)


def test_the_value_of_every_code():
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    ours, theirs = torch.from_numpy(KIND.values), codes.float()
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.signbit(), theirs.signbit())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((131, 48), (128, 128)), ((131, 48), BLOCK), ((96, 40), BLOCK), ((7, 300), (1, 128)), ((3, 50, 30), BLOCK),
     ((5, 1), (2, 2))],
)  # fmt: skip
def test_an_element_is_its_code_times_the_scale_of_its_block(tmp_path, monkeypatch, shape, block, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize(matrix, block)
    scale = scale.to(dtype)
    write_fp8(tmp_path / "m", {"any.name": codes, "any.name_scale_inv": scale, "norm": torch.ones(3)}, block)
    exact = codes.float() * spread(scale.float(), codes.shape, block)
    for chunk, held in ((1 << 20, 1 << 20), (1000, 7), (37, 1 << 20), (1 << 20, 1)):
        monkeypatch.setattr(operand, "_SCALES", held)
        assert torch.equal(read(tmp_path / "m", "any.name", chunk), exact)
    assert torch.equal(read(tmp_path / "m", "norm", 2), torch.ones(3))
    assert open_source(str(tmp_path / "m")).tensors.keys() == {"any.name", "norm"}


def test_few_scales_of_a_stack_are_held(tmp_path):
    """All of these have 128 MiB."""
    shapes = {"experts": ("F8_E4M3", (64, 1024, 1024)), "experts_scale_inv": ("F32", (64, 1024, 512))}
    header, placed = build_header([(name, *spec) for name, spec in shapes.items()], "m", {"format": "pt"})
    path = write_fp8(tmp_path / "m", {"norm": torch.ones(3)}, (1, 2))
    with open(path / "model.safetensors", "wb") as opened:
        opened.write(header)
        opened.truncate(placed[-1].offset + placed[-1].nbytes)  # of holes
    reading, room = open_operand(open_source(str(path))), torch.ones(8 << 18, dtype=torch.uint8)
    before = anonymous_bytes()
    for begin in (0, 1 << 25, (1 << 26) - (1 << 18)):
        assert not reading.read("experts", begin, begin + (1 << 18), room).any()
    assert anonymous_bytes() - before < 16 << 20
    assert reading.bytes_read <= 3 * ((1 << 18) + 2 * 4 * (1 << 17))


def test_scales_may_be_in_another_file(tmp_path):
    weights = quantized(tensors(0), BLOCK)
    path = write_fp8(tmp_path / "m", weights, BLOCK, shards=5)
    source = open_source(str(path))
    assert isinstance(source, Scaled) and source.block == BLOCK
    assert any(source.tensors[name].file != scale.file for name, scale in source.scales.items())
    for name, tensor in dequantized(weights, BLOCK).items():
        assert torch.equal(read(path, name, 999), tensor), name


def refused(tmp_path, weights, quantization, *reasons, **config):
    path = write_checkpoint(tmp_path / "m", weights, config={"quantization_config": quantization, **config})
    with pytest.raises(BadInput) as error:
        open_source(str(path))
    sentence = str(error.value)
    assert "\n" not in sentence and "convert it to bfloat16" in sentence
    assert all(reason in sentence for reason in (str(path), *reasons)), sentence


FP8 = {"quant_method": "fp8", "weight_block_size": [2, 2]}
CODES = torch.ones(4, 4).to(E4M3)


def test_every_other_quantisation_is_refused_with_its_reason(tmp_path):
    cases = [
        ({"w": CODES}, FP8, "tensor w as F8_E4M3 without the block scales w_scale_inv"),
        ({"w": CODES, "w_scale": torch.ones(())}, {}, "without the block scales"),
        ({"w": CODES, "w_scale_inv": torch.ones(2, 2), "w_scale": torch.ones(())}, FP8, "has both w_scale_inv and"),
        ({"w": CODES, "w_scale": torch.ones(4, 1)}, FP8, "without the block scales"),
        ({"w": CODES, "w_scale_inv": torch.ones(2, 2)}, {"quant_method": "fp8"}, "has no weight_block_size"),
        ({"w": CODES, "w_scale_inv": torch.ones(2, 3)}, FP8, "shape [2, 3]", "2 × 2 of [4, 4]"),
        ({"w": CODES, "w_scale_inv": torch.ones(2, 2).int()}, FP8, "dtype I32"),
        ({"w": CODES[0].clone(), "w_scale_inv": torch.ones(2)}, FP8, "shape [2]"),
        ({"w": CODES.to(torch.float8_e5m2), "w_scale_inv": torch.ones(2, 2)}, FP8, "tensor w as F8_E5M2"),
        ({"w": torch.ones(2)}, {"quant_method": "gptq", "bits": 4}, "is quantised by gptq"),
        ({"w": torch.ones(2)}, {"quant_method": "compressed-tensors"}, "is quantised by compressed-tensors"),
        ({"a.qweight": torch.ones(2, 2).int()}, {}, "tensor a.qweight holds packed integers"),
        ({"w": torch.ones(4, 4), "w_scale_inv": torch.ones(2, 2)}, FP8, "has the scales w_scale_inv, and w is F32"),
    ]
    for number, (weights, quantization, *reasons) in enumerate(cases):
        refused(tmp_path / str(number), weights, quantization, *reasons)
    path = write_checkpoint(
        tmp_path / "tower",
        {"w": torch.ones(2)},
        config={"text_config": {"quantization_config": {"quant_method": "awq"}}},
    )
    with pytest.raises(BadInput, match="is quantised by awq"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("shape", "block", "scales"),
    [((0, 8), [4, 4], (0, 2)), ((8, 0), [4, 4], (2, 0)), ((8, 0), None, ()), ((0, 8, 8), None, (0, 1, 1))],
)
def test_a_quantised_matrix_without_elements_is_refused(tmp_path, shape, block, scales):
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    weights = {"w": torch.zeros(shape).to(E4M3), "w_scale_inv": torch.ones(scales)}
    path = write_checkpoint(tmp_path / "m", weights, config=said)
    with pytest.raises(BadInput, match="tensor w is quantised and has no elements"):
        open_source(str(path))


def test_a_config_loses_every_word_of_quantisation():
    config = {"a": 1, "quantization_config": {"b": 2}, "text_config": {"quantization_config": {}, "c": [3]}}
    assert without_quantization(config) == {"a": 1, "text_config": {"c": [3]}}


def test_the_distance_to_a_sibling_is_sampled_through_the_scales(tmp_path):
    base = tensors(0)
    plain = open_source(str(write_checkpoint(tmp_path / "plain", near(base, 1))))
    stranger = open_source(str(write_checkpoint(tmp_path / "stranger", tensors(9))))
    for block in (BLOCK, (128, 128)):
        fp8 = open_source(str(write_fp8(tmp_path / f"{block}", quantized(base, block), block)))
        exact = write_checkpoint(tmp_path / f"wide {block}", dequantized(quantized(base, block), block))
        assert compat.sampled_distance(fp8, plain) == compat.sampled_distance(open_source(str(exact)), plain) < 0.5
        assert compat.sampled_distance(plain, fp8) < 0.5
        assert compat.sampled_distance(fp8, stranger) > 1.3
        assert json.loads((fp8.path / "config.json").read_text())["quantization_config"]["fmt"] == "e4m3"
