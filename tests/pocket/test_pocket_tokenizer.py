"""The byte tokenizer: as built, and as shipped and loaded by AutoTokenizer."""

import unicodedata

import pytest
from transformers import AutoTokenizer, GenerationConfig

from rvdist.pocket import GRPO, SFT, TARGET, tokenizer

STRINGS = [
    "",
    " leading, trailing and  double spaces ",
    "tabs\t, carriage\r\nreturns\n\n\n",
    "don't 12345 +-= , . ! ?",
    "naïve café, Ελληνικά, 漢字, العربية, हिन्दी",
    "emoji 🙂👩‍👩‍👧 and \U0010fffd",
    "".join(map(chr, range(256))),
]


@pytest.fixture(scope="module", params=[TARGET, SFT, GRPO], ids=lambda path: path.name)
def loaded(request):
    return AutoTokenizer.from_pretrained(request.param)


def test_every_byte_is_its_own_token(loaded):
    assert len(loaded) == tokenizer.VOCABULARY
    characters = "".join(map(chr, range(128)))
    assert loaded(characters).input_ids == list(range(128))
    # bytes that only occur inside longer characters: two and four bytes cover them all
    sample = [chr(code) for code in (*range(0x80, 0x800), *range(0x10000, 0x110000, 0x1000))]
    sample = [character for character in sample if unicodedata.is_normalized("NFC", character)]
    seen = set(range(128))
    for character in sample:
        tokens = loaded(character).input_ids
        assert tokens == list(character.encode())
        assert loaded.decode(tokens) == character
        seen |= set(tokens)
    impossible = {0xC0, 0xC1, *range(0xF5, 0x100)}  # never in valid UTF-8
    assert {byte for byte in range(256) if byte not in seen} <= impossible | set(range(0xE0, 0xF0))
    assert sorted(loaded.convert_tokens_to_ids(loaded.convert_ids_to_tokens(range(256)))) == list(range(256))


@pytest.mark.parametrize("string", STRINGS)
def test_text_round_trips(loaded, string):
    tokens = loaded(string).input_ids
    assert tokens == list(string.encode())
    assert loaded.decode(tokens) == string


def test_text_is_normalised_like_any_qwen2(loaded):
    assert loaded.decode(loaded("e\u0301").input_ids) == "é"


def test_special_tokens(loaded):
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id) == (tokenizer.PAD, tokenizer.EOS, None)
    assert loaded("a<|im_end|>b").input_ids == [97, tokenizer.EOS, 98]
    assert loaded.decode([97, tokenizer.EOS], skip_special_tokens=True) == "a"


def test_generation_stops_at_eos():
    for directory in (TARGET, SFT, GRPO):
        assert GenerationConfig.from_pretrained(directory).eos_token_id == tokenizer.EOS


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "add 1 and 2."},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "what's {7}?"},
]


def render(directory, messages):
    return AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_the_target_chats():
    assert render(TARGET, MESSAGES[1:2]) == "User: add 1 and 2.\nAssistant: "
    expected = "Be brief.\nUser: add 1 and 2.\nAssistant: 3<|im_end|>\nUser: what's {7}?\nAssistant: "
    assert render(TARGET, MESSAGES) == expected


def test_the_donors_speak_the_format_of_their_data():
    for directory in (SFT, GRPO):
        assert render(directory, MESSAGES[1:2]) == "Q: add 1 and 2.\nA: "
        assert render(directory, MESSAGES[:2]) == "Be brief.\nQ: add 1 and 2.\nA: "
