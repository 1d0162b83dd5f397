"""On what kind of device the engines of a cluster compute."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from rvdist.core.errors import BadInput


def device_kind(on_gpus: bool, accelerator_type: str | None = None) -> str:
    """On what the engines of the connected cluster compute; text may differ between kinds. Of CPUs, it is this
    machine's that is named. Raises BadInput for GPUs of several kinds of which none was chosen, or another one was."""
    if on_gpus:
        import ray

        names = [name.partition(":")[2] for name in ray.cluster_resources() if name.startswith("accelerator_type:")]
        kinds = sorted(name for name in names if not name.startswith("TPU"))
        if accelerator_type and kinds and accelerator_type not in kinds:
            raise BadInput(f"engine.accelerator_type={accelerator_type}: the cluster has {', '.join(kinds)}; name one")
        if len(kinds) > 1 and not accelerator_type:
            raise BadInput(
                f"the cluster has GPUs of several kinds ({', '.join(kinds)}), on which text may differ; name one with "
                f"engine.accelerator_type={kinds[0]}"
            )
        return accelerator_type or "".join(kinds) or "GPU"
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()
