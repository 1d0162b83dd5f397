"""A stranger's tokenizer is used as it is, or ends in one sentence, in time and in memory."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from checkpoints import POCKET
from hostile import refused

from rvdist.evaluate import tokenizer as module
from rvdist.evaluate.fleet import prompts
from rvdist.evaluate.fleet.prompts import Prompts
from rvdist.evaluate.tokenizer import load_tokenizer, require_usable

CHECK = "rvdist.evaluate.tokenizer.require_usable"
OWN = json.loads((POCKET / "target/tokenizer.json").read_text())
SLOW = "(?:aa|a)" * 17 + "[bc]"  # the limit of the `tokenizers` library holds for each place of a text alone
ODD = r"[^\s]+|\s+"


def with_pattern(path: Path, pattern: str, where: str = "pre_tokenizer") -> Path:
    shutil.copytree(POCKET / "target", path)
    changed = json.loads(json.dumps(OWN))
    if where == "pre_tokenizer":
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        changed[where] = {"type": "Sequence", "pretokenizers": [split, OWN[where]]}
    else:
        changed[where] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}
    (path / "tokenizer.json").write_text(json.dumps(changed))
    return path


@pytest.mark.parametrize("where", ["pre_tokenizer", "normalizer"])
@pytest.mark.parametrize("pattern", [SLOW, "(a+)+$", "((((a{1000}){1000}){1000}){1000}){1000}", "(" * 50_000, "[z-a]"])
def test_a_pattern_that_does_not_end_is_refused(pattern, where, tmp_path):
    said = refused(CHECK, with_pattern(tmp_path / "model", pattern, where))
    assert said.startswith(f"{tmp_path}/model/tokenizer.json: has a tokenizer that cannot be used (")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(Q+)+Z",
        "[^\\s]+$",
        "a*b",
        "a?b",
        "a|b",
        "a{1,3}+",
        "a{9999}",
        "(a)",
        r"a\1",
        "a" * 1000,
        "[[a]&&[b]]",
    ],
)
def test_a_decoder_s_pattern_that_is_not_plain_is_refused(pattern, tmp_path):
    """An engine decodes what the model writes, which no text that is tried foretells."""
    path = with_pattern(tmp_path / "model", pattern, "decoder")
    assert "its decoder has a regular expression that may take for ever" in refused(CHECK, path)
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace('"Regex"', '"\\u0052egex"'))
    assert "its decoder has a regular expression that may take for ever" in refused(CHECK, path)


@pytest.mark.parametrize("pattern", ["▁", "Ġ+", r"\s{2,}", "[ \\t]+", "^ ", r" \.", "x$", r"<0x[0-9A-F]{2}", "."])
def test_a_decoder_s_plain_pattern_is_used_and_takes_no_time(pattern, tmp_path):
    path = with_pattern(tmp_path / "model", pattern, "decoder")
    require_usable(path)
    decoder = load_tokenizer(path, chat=False).backend_tokenizer.decoder
    began = time.process_time()
    for text in ("a", " ", "x", "<0x", " .", "▁", "Ġ", "\t "):
        decoder.decode([text * (200_000 // len(text)) + "!"])
    assert time.process_time() - began < 5


def test_it_is_not_hidden_by_its_spelling(tmp_path):
    file = with_pattern(tmp_path / "model", "(a+)+$") / "tokenizer.json"
    file.write_text(file.read_text().replace('"Regex"', '"\\u0052egex"'))
    assert "cannot be used" in refused(CHECK, file.parent)


def test_what_is_known_to_end_is_not_tried(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(module, "_try", lambda file, nbytes: tried.append(file))
    require_usable(POCKET / "target")
    assert not tried
    require_usable(with_pattern(tmp_path / "model", ODD))
    assert len(tried) == 1


def test_an_odd_one_that_ends_is_used(tmp_path):
    tokenizer = load_tokenizer(with_pattern(tmp_path / "model", ODD), chat=False)
    text = "naïve 1 + 1 = 2\n"
    cut = Prompts(tokenizer, 100, False).encode(text)
    assert cut == tokenizer(text).input_ids and tokenizer.decode(cut) == text


@pytest.mark.parametrize(
    "make",
    [
        lambda path: os.mkfifo(path / "added_tokens.json"),
        lambda path: os.mkfifo(path / "vocab.txt"),
        lambda path: (path / "special_tokens_map.json").symlink_to("/dev/zero"),
        lambda path: os.truncate(path / "tokenizer.json", 1 << 40),
        lambda path: os.truncate(path / "tokenizer_config.json", 5 << 20),
        lambda path: (path / "tokenizer.json").write_text("[" + "[]," * (20 << 20) + "[]]"),
        lambda path: (path / "chat_template.jinja").unlink() or os.mkfifo(path / "chat_template.jinja"),
    ],
)
def test_what_is_no_file_of_a_tokenizer_is_refused(make, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(POCKET / "target", path)
    make(path)
    assert "copy the tokenizer again" in refused(CHECK, path)


def test_a_prompt_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(prompts, "_PATIENCE", 60.0)  # what ends by itself does so late on a busy machine
    file = with_pattern(tmp_path / "model", SLOW) / "tokenizer.json"
    slow = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|im_end|>")
    cutter = Prompts(slow, 100, False)
    short = cutter.encode("aab")
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "_PATIENCE", 1.0)
        with pytest.raises(ValueError, match="more than 1 s for a prompt of 5,000 characters: .*do not end"):
            cutter.encode("a" * 5000)
    assert cutter.encode("aab") == short
    panics = with_pattern(tmp_path / "panics", "(a+)+$") / "tokenizer.json"
    cutter = Prompts(PreTrainedTokenizerFast(tokenizer_file=str(panics), eos_token="<|im_end|>"), 100, False)
    with pytest.raises(ValueError, match="fails at a prompt of 31 characters .*retry-limit"):
        cutter.encode("a" * 30 + "!")
