"""A stranger's chat template makes the text that transformers makes of it, or one sentence, in time and in memory."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from checkpoints import POCKET
from transformers import AutoTokenizer

from rvdist.core.errors import BadInput
from rvdist.evaluate import templates
from rvdist.evaluate.suite import Suite
from rvdist.evaluate.templates import apply_template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}{{- system }}
{%- for m in messages %}
    {{- '<' + m['role'] + '>\n\n' + m['content'] | trim + eos_token }}
    {%- if loop.last and add_generation_prompt %}{{- '<assistant>' }}{%- endif %}
{%- endfor %}"""
ODD = """{%- macro one(m) -%}{{ m | tojson(indent=2) }}{%- endmacro -%}{%- set ns = namespace(n=0) -%}
{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{%- if ns.n > 9 -%}{%- break -%}{%- endif -%}
{{ one(m) }}{% generation %}{{ m.content }}{% endgeneration %}{%- endfor -%}
{{ tools is none }}{{ documents }}"""
TALKS = [
    [{"role": "user", "content": "2 + 2 = ?"}],
    [{"role": "system", "content": " be\u2028brief "}, {"role": "user", "content": "naïve 🙂 {{ 7 }} \0\x7f"}],
    [{"role": "user" if k % 2 == 0 else "assistant", "content": f"turn {k}\n"} for k in range(20)],
]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(POCKET / "target")


@pytest.mark.parametrize("template", [None, CHATML, LLAMA, ODD])
def test_the_text_is_what_transformers_makes(template, tokenizer):
    if template:
        tokenizer.chat_template = template
    for talk in TALKS:
        for last in (True, False):
            ours, theirs = [], []
            for found, render in (
                (ours, lambda t, g: apply_template(tokenizer, t, g)),
                (theirs, lambda t, g: tokenizer.apply_chat_template(
                    t, tokenize=False, add_generation_prompt=g, continue_final_message=not g)),
            ):  # fmt: skip
                try:
                    found.append(render(talk, last))
                except Exception as error:
                    found.append(f"! {error}"[:900])
            assert ours == theirs and (ours[0][:1] != "!" or not last)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
EVIL = {
    "endless": (ENDLESS, "takes more than 3 s of processor time"),
    "long": ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "characters"),
    "large": ("{{ ('x' * 99999999999)|length }}", "more than 512 MiB"),
    "doubling": (
        "{% set n = namespace(x='a') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "more than 512 MiB",
    ),
    "itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "nested": ("{% if 1 %}" * 2000 + "{% endif %}" * 2000, "nested|recursion|indentation"),
    "brackets": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "recursion|nested"),
    "expanded": ("{{ '%099999999d' % 7 }}", "."),
    "private": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "a surrogate": ("{{ '\\ud800' }}", "surrogates not allowed"),
}  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("kind", EVIL)
def test_an_evil_template_ends_in_one_sentence(kind, tokenizer):
    tokenizer.chat_template, said = EVIL[kind]
    apply = lambda: apply_template(tokenizer, TALKS[0], True)  # noqa: E731
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=said):
        apply()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    tokenizer.chat_template = CHATML
    assert apply().startswith("<|im_start|>user"), "the next one is rendered"


def test_what_is_endless_takes_no_longer_after_many_that_were_quick(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "_SECONDS", 0.3)
    monkeypatch.setattr(templates, "_renderer", templates._Renderer())
    for _ in range(60):
        apply_template(tokenizer, TALKS[0], True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    tokenizer.chat_template = ENDLESS
    with pytest.raises(ValueError, match=r"takes more than 0\.3 s of processor time"):
        apply_template(tokenizer, TALKS[0], True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2, "3.3 s were left for all"


def test_many_slow_ones_are_ended_together(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "_SECONDS", 1.0)
    monkeypatch.setattr(templates, "_renderer", templates._Renderer())
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(20) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="takes more than 1 s of processor time"):
        for _ in range(50):
            apply_template(tokenizer, TALKS[0], True)
    templates._renderer.end()


def test_a_suite_says_which_template(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "_SECONDS", 0.3)
    monkeypatch.setattr(templates, "_renderer", templates._Renderer())
    tokenizer.chat_template = ENDLESS
    with pytest.raises(BadInput, match="chat template of .*target refuses its prompts .rendering it takes more than"):
        Suite.load(["pocket_sums"], limit=1).requests(tokenizer)


def test_the_process_ends_with_ours():
    code = (
        "import os; from rvdist.evaluate import templates; templates.expect(); "
        "print(templates._renderer.begin().pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    until = time.monotonic() + 60
    while os.path.exists(f"/proc/{int(done.stdout)}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{int(done.stdout)}")
