"""The plan stage: what a merge would read and write, and on which nodes, printed without running it."""

from __future__ import annotations

import os

from rvdist.core import cluster, config
from rvdist.core.point import name_of
from rvdist.core.table import print_table
from rvdist.merge.placement import place, rates, remembered_rate
from rvdist.merge.plan import Plan
from rvdist.stages.job import Prepared


def print_plan(prepared: Prepared, plan: Plan) -> None:
    """Prints what a plan writes and reads, and what falls to each node."""
    for output, layout in zip(plan.outputs, plan.layouts, strict=True):
        for point, directory in zip(output.points, output.directories, strict=True):
            terms = " ".join(
                f"{t.alpha:+g}·({' − '.join(name_of(source) for source in t.vector.sources())})" for t in point.terms
            )
            prepared.say(f"{directory}: {name_of(point.base)} {terms}")
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
        tuple(cluster.Node(f"node {number}", cores, 0) for number in range(1, (settings.cluster.nodes or 1) + 1))
    )
