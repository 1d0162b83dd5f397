"""Private interfaces of other libraries: they are there, and missed in one sentence where they are not."""

import sys
from importlib.metadata import version

import pytest

from rvdist.core import private_ray
from rvdist.core.errors import Failed
from rvdist.core.private import Library
from rvdist.evaluate.fleet import private_vllm
from rvdist.evaluate.tasks import private_lm_eval
from rvdist.stages import private_hydra
from rvdist.weights.checkpoint import private_huggingface_hub, private_transformers

NEEDED = [
    pytest.param(private_ray.RAY, private_ray.NEEDED, marks=pytest.mark.heavy),
    (private_hydra.HYDRA, private_hydra.NEEDED),
    (private_lm_eval.LM_EVAL, private_lm_eval.NEEDED),
    (private_transformers.TRANSFORMERS, private_transformers.NEEDED),
    (private_huggingface_hub.HUB, private_huggingface_hub.NEEDED),
]


@pytest.mark.parametrize(("library", "places"), NEEDED, ids=lambda part: getattr(part, "name", ""))
def test_what_is_needed_is_there_and_was_seen_on_what_is_installed(library, places):
    library.require(*places)
    assert library.version == version(library.name) == library.seen, "look again, and raise the version it was seen on"


@pytest.mark.parametrize(
    "place",
    ["json.no_such:loads", "json:no_such", "json:JSONDecoder.no_such", "json:loads(no_such)", "no_such_library:x"],
)
def test_what_is_gone_is_missed_in_one_sentence(place):
    library = Library("rich", "1.0")
    with pytest.raises(Failed, match=r"^rich [\d.]+: has no \S+ any more, which rvdist takes from rich 1.0; install "):
        library.require("json:loads(s)", "json:JSONDecoder.decode", place)


def test_a_command_ends_in_that_sentence(monkeypatch, capsys):
    from rvdist import launch

    monkeypatch.setattr(private_hydra, "NEEDED", ("hydra.core.plugins:Plugins", "hydra.core.plugins:Gone"))
    monkeypatch.setattr(sys, "argv", ["rvdist", "--help"])
    for what in ("begin", "end"):
        monkeypatch.setattr(launch.Watch, what, lambda self: None)
    with pytest.raises(SystemExit) as ended:
        launch.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("rvdist: hydra-core 1.3.8: has no hydra.core.plugins:Gone any more")


def test_lm_eval_is_patched_no_longer_than_it_is_used():
    from lm_eval.utils import env

    before = env.from_string
    with private_lm_eval.templates_compiled_once():
        assert env.from_string("{{x}}") is env.from_string("{{x}}")
        kept = env.from_string("{{x}}")
    assert env.from_string == before and env.from_string("{{x}}") is not kept
    with private_lm_eval.templates_compiled_once():
        assert env.from_string("{{x}}") is kept


def test_vllm_was_seen_on_what_is_installed():
    """Whether all is there, every engine asks when it starts."""
    assert private_vllm.VLLM.version == private_vllm.VLLM.seen


def test_nothing_for_cpus_alone_is_imported_elsewhere(monkeypatch):
    for place in private_vllm.ON_CPU:
        monkeypatch.setitem(sys.modules, place.partition(":")[0], None)
    monkeypatch.setattr(private_vllm, "is_on_cpu", lambda: False)
    private_vllm.repair_packed_copies(None)
    private_vllm.ask_for_amx()
