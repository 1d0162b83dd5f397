"""What the documentation tells people to type is run, or says why it is not; the keys it names exist, its links lead
somewhere.

A block to type is fenced with ```sh. The line before one that no test runs is `<!-- not run by a test: REASON -->`; in
such a block `…` and names in capitals stand for the reader's own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from omegaconf import DictConfig, OmegaConf

from rvdist.core.config import Config
from rvdist.evaluate.tasks import catalogue, perturb
from rvdist.launch import CONF, _quote
from rvdist.stages import multirun

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "yaml", "python", "text"}
MARKER = re.compile(r"<!-- not run by a test: (\S.*) -->")
TYPED = re.compile(
    r"    (\S+/)?(python\d?|rvdist|make|pip|pytest|git|ray|ruff|eval|export|cd|jq|sbatch|docker|hf|kill)\s"
)
PLACEHOLDER = re.compile(r"…|\b(?!(EOF|PATH|PWD)\b)[A-Z]{2,}\b")
KEY = re.compile(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`")
COMMANDS = {"rvdist", "rvdist.launch", "launch/slurm.sh"}  # what follows is rvdist.launch's
FILES = {"json", "jsonl", "md", "py", "sh", "yaml", "yml", "csv", "html", "png", "toml", "txt", "safetensors", "sqlite"}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line, from 1
    text: str
    reason: str | None  # why no test runs it

    @property
    def run(self) -> bool:
        return self.reason is None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read(page: Path) -> tuple[list[Block], list[tuple[int, str]]]:
    """The ```sh blocks of a page, and its lines outside of all fences with their numbers."""
    blocks, prose, language, begin = [], [], "", 0
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            if not language:
                prose.append((number, line))
        elif not language:
            language, begin = line[3:], number
            assert language in LANGUAGES, f"{page.name}:{number}: a fence of {LANGUAGES}, please"
        else:
            if language == "sh":
                marker = MARKER.fullmatch(lines[begin - 2]) if begin > 1 else None
                text = "\n".join(lines[begin : number - 1])
                blocks.append(Block(page, begin + 1, text, marker[1] if marker else None))
            language = ""
    assert not language, f"{page.name}:{begin}: this fence is not closed"
    return blocks, prose


BLOCKS = [block for page in PAGES for block in read(page)[0]]
by_place = pytest.mark.parametrize("block", [pytest.param(block, id=block.place) for block in BLOCKS])


def test_whatever_can_be_typed_is_in_a_block():
    assert len(BLOCKS) > 25
    loose = [f"{p.name}:{number}: {line}" for p in PAGES for number, line in read(p)[1] if TYPED.match(line)]
    assert not loose, "indented commands are not found by the tests; fence them with ```sh"


@by_place
def test_a_block_is_shell(block):
    checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert checked.returncode == 0, f"{block.place}: {checked.stderr}"
    assert not (block.run and PLACEHOLDER.search(re.sub(r"#.*", "", block.text))), (
        f"{block.place}: has a placeholder; say why no test runs it: <!-- not run by a test: REASON -->"
    )


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a script, as words; also of a script that is one of its words. No substitutions."""
    words: list[str] = []
    text = re.sub(r"<<'?EOF'?\n.*?\nEOF", "", text, flags=re.DOTALL)
    text = text.replace("\\\n", " ").replace("\n", "\n\n")  # a comment takes the end of its line along
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>\n")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;<>\n"):
            if words:
                yield words
            words = []
        else:
            if " -m rvdist." in word:
                yield from commands(word)
            words.append(word)


def launches(block: Block) -> Iterator[list[str]]:
    """The arguments of each rvdist.launch in a block, without what stands for the reader's own."""
    for words in commands(block.text):
        begin = next((k for k, word in enumerate(words) if word in COMMANDS), None)
        if begin is None or words[begin + 1 :] in (["up"], ["down"]):
            continue
        if words[:2] != ["docker", "build"] and "-sc" not in words:
            yield [word for word in words[begin + 1 :] if word != "…"]


@pytest.fixture(scope="module")
def composed():
    """What a command line composes to, by Hydra itself; of a sweep its first job."""
    ConfigStore.instance().store(name="schema", node=Config)
    multirun.register()

    def one(arguments: list[str]) -> DictConfig:
        own = [argument for argument in arguments if not (argument.endswith("=…") and (CONF / argument[:-2]).is_dir())]
        given = [_quote(argument.replace("…", "mine")) for argument in own if not argument.startswith("-")]
        overrides = []
        for override in OverridesParser.create().parse_overrides(given):
            if override.is_sweep_override():
                interval = isinstance(override.value(), IntervalSweep)
                first = override.value().start if interval else next(override.sweep_string_iterator())
                overrides.append(f"{override.get_key_element()}={first}")
            else:
                overrides.append(override.input_line)
        return compose("config", overrides)

    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield one


@by_place
def test_every_key_of_a_command_exists(block, composed):
    for arguments in launches(block):
        if "--config-dir" not in arguments:
            try:
                composed(arguments)
            except Exception as error:
                pytest.fail(f"{block.place}: {' '.join(arguments)}: {error}")


def test_a_command_with_a_wrong_key_is_found(composed):
    wrong = Block(
        ROOT / "README.md", 1, "cd x && python -m rvdist.launch … \\\n  -m alpha=1,2 sweep.alpha=[1] |\n cat", ""
    )
    (arguments,) = launches(wrong)
    assert arguments == ["-m", "alpha=1,2", "sweep.alpha=[1]"]
    with pytest.raises(Exception, match="sweep.alpha"):
        composed(arguments)
    nested = Block(wrong.page, 1, "ray exec a.yaml 'cd /shared && .venv/bin/python -m rvdist.launch alpha=2'", "")
    assert list(launches(nested)) == [["alpha=2"]]


@pytest.mark.parametrize("wanted", ["={gsm8k: flexible-extract}", ".gsm8k=flexible-extract"])
@pytest.mark.parametrize("key", ["benchmarks.primary", "engine.args", "prompts"])
def test_a_mapping_takes_any_name_with_no_plus_before_it(key, wanted, composed):
    config = composed([key + wanted])
    assert OmegaConf.select(config, key)["gsm8k"] == "flexible-extract"


def test_every_module_and_file_of_a_command_exists():
    for block in BLOCKS:
        for file in re.findall(r"\b(?:docs|tests)/[\w/.]*\w", block.reason or ""):
            assert (ROOT / file).exists(), f"{block.place}: {file}"
        for words in commands(block.text):
            if re.fullmatch(r"(\S*/)?python3?", words[0]) and len(words) > 2:
                if words[1] == "-m":
                    assert importlib.util.find_spec(words[2]), f"{block.place}: {words[2]}"
                elif words[1].endswith(".py"):
                    assert (ROOT / words[1]).is_file(), f"{block.place}: {words[1]}"


def test_every_key_in_the_text_exists(composed):
    known = composed([])
    for page in PAGES:
        for number, line in read(page)[1]:
            for key in KEY.findall(line):
                node, parts = known, key.split(".")
                if parts[0] not in known or parts[-1] in FILES or not isinstance(known[parts[0]], DictConfig):
                    continue
                for part in parts:
                    assert part in node, f"{page.name}:{number}: there is no key {key}"
                    node = node[part]


@pytest.mark.heavy
def test_every_setting_in_the_text_can_be_typed(composed):
    known, typed, refused = composed([]), set(), []
    for page in PAGES:
        for number, line in read(page)[1]:
            for setting in re.findall(r"`([a-z_.]+=[^`]+)`", line):
                if setting.partition("=")[0].partition(".")[0] not in known or re.search(r"…|=[A-Z]+$", setting):
                    continue
                if setting in typed:
                    continue
                typed.add(setting)
                try:
                    composed(re.split(r" (?=[a-z_.]+=)", setting))
                except Exception as error:
                    refused.append(f"{page.name}:{number}: {setting}: {str(error).splitlines()[0]}")
    assert not refused, "\n".join(refused)
    assert len(typed) > 40


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = [line.lstrip("#").strip() for _, line in read(page)[1] if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[int, Path, str]]:
    """Line, file and anchor of every link that does not leave the repository."""
    for number, line in read(page)[1]:
        for link in re.findall(r"\]\(([^)\s]+)\)", line):
            if not re.match(r"https?://", link):
                name, _, anchor = link.partition("#")
                yield number, (page.parent / name).resolve() if name else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for number, target, anchor in links(page):
        assert target.exists(), f"{page.name}:{number}: there is no {target}"
        assert not anchor or anchor in anchors(target), f"{page.name}:{number}: {target.name} has no #{anchor}"


def test_every_page_is_found_from_the_readme():
    found: set[Path] = set()
    ahead = [PAGES[0]]
    while ahead:
        page = ahead.pop()
        found.add(page)
        ahead += [target for _, target, _ in links(page) if target in PAGES and target not in found]
    assert found == set(PAGES)


def test_what_can_be_added_has_its_line_in_the_docs():
    clusters, benchmarks = (
        (ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("clusters", "benchmarks")
    )
    assert all(f"`cluster={option.stem}`" in clusters for option in (CONF / "cluster").glob("*.yaml"))
    assert all(f"| `{edit}` |" in benchmarks for edit in perturb.EDITS)
    tasks = [file.stem for file in catalogue.OURS.glob("*/*.yaml")]
    assert "humaneval_plus" in tasks and all(f"`{task}`" in benchmarks for task in tasks)


def execute(block: Block, place: Path) -> None:
    """Runs a block in a copy of the repository below `place`, as a shell does that stops at the first failure. Fails
    with the line of the page, as bash counts it: what stands before the block are empty lines."""
    tree, home, commands = (place / name for name in ("clone", "home", "bin"))
    if not tree.exists():
        for directory in (tree, home, commands):
            directory.mkdir()
        for part in ROOT.iterdir():
            if part.name not in ("outputs", "multirun", "out") and not part.name.startswith("."):
                (tree / part.name).symlink_to(part)
        (commands / "rvdist").write_text(f"#!{sys.executable}\nfrom rvdist.launch import main\nmain()\n")
        (commands / "rvdist").chmod(0o755)
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    name = block.page.relative_to(ROOT)
    trap = f"set -E; trap 'echo \"{name}:$LINENO: failed\" >&2' ERR"
    (place / "block.sh").write_text(trap + "\n" * (block.line - 1) + block.text + "\n", encoding="utf-8")
    command = ["bash", "-e", "-o", "pipefail", str(place / "block.sh")]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=1800)
    print(f"{block.place}\n{done.stdout}{done.stderr}")
    assert done.returncode == 0, f"{block.place}: {done.stderr[-3000:]}"


def test_a_block_that_fails_is_named_with_its_line(tmp_path):
    execute(Block(PAGES[0], 7, "python -c 'import rvdist'\ntest -d rvdist/pocket", None), tmp_path)
    with pytest.raises(AssertionError, match=r"README.md:8: failed"):
        execute(Block(PAGES[0], 7, "true\nfalse | cat\ntouch after", None), tmp_path)
    assert not (tmp_path / "clone/after").exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.run}), ids=lambda page: page.name)
def test_what_a_page_says_runs(page, tmp_path):
    for block in BLOCKS:
        if block.page == page and block.run:
            execute(block, tmp_path)
