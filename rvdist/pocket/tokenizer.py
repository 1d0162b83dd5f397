"""The pocket family's tokenizer: one token a byte, two special ones, a chat template.

Owns the vocabulary (token id = byte value) and the templates. It is Qwen2's tokenizer with no merges, so that
AutoTokenizer loads it without remote code; like every Qwen2 tokenizer it normalises text to NFC.
"""

from __future__ import annotations

from typing import Any

from rvdist.pocket.text import CHAT, DONOR, Format

PAD, EOS = 256, 257
PAD_TOKEN, EOS_TOKEN = "<|endoftext|>", "<|im_end|>"
VOCABULARY = 258


def chat_template(form: Format) -> str:
    """Jinja: a question in the turns of `form`, answers closed by eos, a system message as a line before."""
    user, assistant = form.prompt.split("{}\n")
    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}" + f"{{{{ '{user}' + message['content'] + '\\n' }}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        + f"{{{{ '{assistant}' + message['content'] + eos_token + '\\n' }}}}"
        "{%- else -%}"
        "{{ message['content'] + '\\n' }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}" + f"{{{{ '{assistant}' }}}}"
        "{%- endif -%}"
    )


CHAT_TEMPLATE = chat_template(CHAT)
DONOR_TEMPLATE = chat_template(DONOR)


def build(template: str, context: int) -> Any:
    """A tokenizer that renders messages by `template`; `context` is what the model can read."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary | {PAD_TOKEN: PAD, EOS_TOKEN: EOS},
        merges=[],
        unk_token=None,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )
    tokenizer.chat_template = template
    return tokenizer
