"""What vLLM chose where cached answers were made."""

import pytest

from rvdist.evaluate.resolved import name_of, recall, remember

CHOSEN = {"max_num_seqs": "256", "attention_backend": "FLASH_ATTN"}


def test_what_was_chosen_first_is_kept(tmp_path):
    one, other = name_of({"device": "H100"}, "[]"), name_of({"device": "A100"}, "[]")
    assert one != other and recall(tmp_path, one) == {}
    remember(tmp_path, one, CHOSEN)
    remember(tmp_path, one, {"max_num_seqs": "1024"})
    remember(tmp_path, other, {"max_num_seqs": "1024"})
    assert recall(tmp_path, one) == CHOSEN and recall(tmp_path, other) == {"max_num_seqs": "1024"}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": []}', "[" * 100_000])
def test_a_damaged_file_says_nothing_and_is_replaced(tmp_path, content):
    (tmp_path / "engines.json").write_text(content)
    assert recall(tmp_path, "x") == {}
    remember(tmp_path, "y", CHOSEN)
    assert recall(tmp_path, "y") == CHOSEN
