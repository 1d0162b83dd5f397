"""The plan stage: what a merge would read and write, and on which nodes; what scoring would ask of which engines, and
what it could show. Printed without running it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rvdist.core import cluster, config
from rvdist.core.errors import BadInput
from rvdist.core.point import name_of
from rvdist.core.table import print_table
from rvdist.merge.placement import place, rates, remembered_rate
from rvdist.merge.plan import Plan
from rvdist.stages.job import Prepared
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.fp8 import Scaled
from rvdist.weights.rows import matrix_memory, matrix_room

if TYPE_CHECKING:
    from rvdist.evaluate.foresight import Load, Memory

_CHANGED = (0.1, 0.3)  # shares of answers that change, for which it is said what a benchmark shows


def print_plan(prepared: Prepared, plan: Plan) -> None:
    """Prints what a plan writes and reads, and what falls to each node."""
    for output, layout in zip(plan.outputs, plan.layouts, strict=True):
        for point, directory in zip(output.points, output.directories, strict=True):
            terms = " ".join(
                f"{t.alpha:+g}·({' − '.join(name_of(source) for source in t.vector.sources())})" for t in point.terms
            )
            prepared.say(f"{directory}: {name_of(point.base)} {terms}")
            if len({term.vector for term in point.active_terms}) > 1 and not prepared.settings.recipe:
                for pair in prepared.interference(point).pairs:
                    prepared.say(f"  {pair}")
        for point in output.points:
            nbytes, name, shape = matrix_memory(point, prepared.sources, plan.dtype)
            if nbytes:
                sides = " × ".join(map(str, shape))
                prepared.say(f"  a worker takes {nbytes / 2**20:,.1f} MiB for a matrix of tensor {name} ({sides})")
            if nbytes := matrix_room(point, prepared.sources):
                from rvdist.weights.arithmetic import aside

                where = f"its temporary directory ({aside.directory()} here)"
                prepared.say(f"  and up to {nbytes / 2**20:,.1f} MiB of {where}")
        prepared.say(f"  {len(layout.files)} files, {len(layout.tensors)} tensors each")
    prepared.say(f"reads {plan.bytes_read:,} bytes, writes {plan.bytes_written:,}, in {len(plan.units)} units")
    if plan.outputs:
        _print_placement(prepared, plan)


def _print_placement(prepared: Prepared, plan: Plan) -> None:
    """What falls to each node and worker, and how long it takes at the rate this engine was last measured at."""
    resources = _foresee(prepared.settings)
    device = config.device(prepared.settings, resources.gpus)
    names = [node.name[:8] for node in resources.nodes]
    workers = config.workers(prepared.settings, resources.counts, plan.bytes_written)
    shares = place(plan, list(zip(names, workers, strict=True)))
    head = ("node", "workers", "files", "reads", "writes", "each worker reads", "writes")
    rows = []
    for share in shares:
        each = (share.bytes_read / share.workers, share.bytes_written / share.workers)
        cells = (f"{nbytes / 1e9:,.2f} GB" for nbytes in (share.bytes_read, share.bytes_written, *each))
        rows.append((share.name, str(share.workers), str(share.files), *cells))
    print_table(head, rows, prepared.job.console)
    if config.merges_alone(prepared.settings, plan.bytes_read + plan.bytes_written) and not cluster.is_given():
        prepared.say("workers are the command's own: for so few bytes no Ray is started")
    if rate := remembered_rate(rates(prepared.cache), device):
        seconds = max(share.bytes_moved / share.workers for share in shares) / rate.bytes_per_second
        prepared.say(
            f"a worker holds {rate.anonymous_bytes / 2**20:.0f} MiB, whatever the size of the model, and moves "
            f"{rate.bytes_per_second / 1e9:.2f} GB/s, as last measured on {device}: about {seconds:,.0f} s"
        )
    else:
        prepared.say(f"no merge of some size was measured on {device} yet, so its time is not foretold")


def _foresee(settings: config.Config) -> cluster.Resources:
    """The nodes a merge would have: the cluster's, or of a cluster that is not there `cluster.nodes` like this one."""
    if settings.cluster.address != "local" and not settings.cluster.nodes:
        return cluster.connect(settings.cluster.address)
    cores = os.cpu_count() or 1
    return cluster.Resources(
        tuple(
            cluster.Node(f"node {number}", cores, cluster.own_gpus())
            for number in range(1, (settings.cluster.nodes or 1) + 1)
        )
    )


def print_evaluation(prepared: Prepared) -> None:
    """Prints what scoring would ask of which engines, about how long that takes, and which differences each benchmark
    could show. Loads tasks and tokenizers, and starts no engine."""
    from rvdist.evaluate.foresight import Memory, load_of
    from rvdist.evaluate.tokenizer import load_tokenizer
    from rvdist.stages.evaluate import suite_of

    settings, memory = prepared.settings, Memory.read(prepared.cache)
    suites = {prompt: suite_of(prepared, settings.prompts[prompt]) for prompt in {a.prompt for a in prepared.foreseen}}
    loads: dict[str, list[Load]] = {}
    for (base, prompt), arms in Counter((arm.point.base, arm.prompt) for arm in prepared.foreseen).items():
        tokenizer = load_tokenizer(prepared.sources[base].path, settings.benchmarks.apply_chat_template)
        for task, requests in suites[prompt].requests(tokenizer).items():
            loads.setdefault(task, []).extend([load_of(requests, tokenizer, memory.lengths.get(task))] * arms)
    suite = next(iter(suites.values()))
    members = {task: name for name, (_, tasks) in suite.groups.items() for task in tasks}
    documents = Counter[str]()
    rows: dict[str, list[Load]] = {}
    for task, own in loads.items():
        documents[members.get(task, task)] += len(suite.documents[task])
        rows.setdefault(members.get(task, task), []).extend(own)
    head = ("benchmark", "documents", "requests", "tokens to read", "to make", *(f"seen at {s:.0%}" for s in _CHANGED))
    cells = [(name, f"{documents[name]:,}", *_sums(own), *_seen(documents[name])) for name, own in rows.items()]
    print_table(head, cells, prepared.job.console, right=range(1, len(head)))
    prepared.say(
        "seen at so many percent of answers that change: the smallest true difference that one comparison shows (5 % "
        "level, power 80 %), if answers are right or wrong"
    )
    everything = [load for own in rows.values() for load in own]
    if prepared.settings.engine.replay is None:
        _print_engines(prepared, sum(load.prompt + load.made for load in everything), memory)


def _sums(loads: Sequence[Load]) -> tuple[str, str, str]:
    made = f"{sum(load.made for load in loads):,}"
    return (
        f"{sum(load.requests for load in loads):,}",
        f"{sum(load.prompt for load in loads):,}",
        made if all(load.known for load in loads) else f"at most {made}",
    )


def _seen(n: int) -> tuple[str, ...]:
    from rvdist.report.statistics.compare import minimal_detectable_effect

    return tuple(f"{100 * minimal_detectable_effect(n, share):.1f} %" if n else "" for share in _CHANGED)


def _served_bytes(base: Checkpoint) -> int:
    """What engines hold of a base, which is plain there."""
    return sum(2 * spec.numel for spec in base.tensors.values()) if isinstance(base, Scaled) else base.nbytes


def _print_engines(prepared: Prepared, tokens: int, memory: Memory) -> None:
    """How many engines there would be, on what, and about how long they would take. What is refused is said: a plan may
    be asked for on another machine."""
    from rvdist.evaluate.fleet.arguments import build

    settings, resources = prepared.settings, _foresee(prepared.settings)
    bases = {arm.point.base for arm in prepared.foreseen}
    nbytes = max(_served_bytes(prepared.sources[base]) for base in bases)
    arms = f"{len(prepared.foreseen)} arms" + (", of which a race asks less" if settings.search.method else "")
    try:
        device = config.engine_device(settings, resources.gpus, build())
        count, (cores, gpus) = config.engines(settings, resources.counts)
    except BadInput as error:
        prepared.say(f"engines for {arms}, {tokens:,} tokens, cannot be foretold here: {error}")
        return
    takes = f"{gpus:g} GPUs" if gpus else f"{cores:g} cores"
    ranks = config.ranks(settings)
    prepared.say(
        f"{count} engines of {takes} each, {count * (gpus or cores):g} together, for {arms} and about {tokens:,} tokens"
        f"; weights are {nbytes / ranks / 1e9:,.2f} GB of each {'GPU' if gpus else 'rank'}"
    )
    kind = _kind(settings, device, memory)
    if (seconds := memory.seconds(kind, nbytes, tokens, count)) is None:
        prepared.say(f"no engine was measured on {kind} yet, so its time is not foretold")
    else:
        prepared.say(
            f"about {seconds / 3600:,.2f} hours, as last measured on {kind}, in proportion to the weights' bytes"
        )


def _kind(settings: config.Config, device: str, memory: Memory) -> str:
    """On what kind of device engines compute. Of GPUs on a cluster that is not connected, the only one remembered."""
    from rvdist.evaluate.fleet.device import device_kind

    if device == "cpu" or cluster.is_connected():
        return device_kind(device == "cuda", settings.engine.accelerator_type)
    known = memory.rates.keys() - {device_kind(False)}
    return settings.engine.accelerator_type or (known.pop() if len(known) == 1 else "such GPUs")
