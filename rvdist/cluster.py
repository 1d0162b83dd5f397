"""Connects to Ray or starts it, and says what resources there are. Knows nothing of what runs on it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from rvdist.errors import BadInput


@dataclass(frozen=True)
class Resources:
    """CPU cores and GPUs of the whole cluster."""

    cpus: int
    gpus: int


def connect(address: str = "local") -> Resources:
    """Joins the cluster at `address` ("auto" for the one this machine belongs to), or with "local" starts
    one that ends with this process. Raises BadInput where it cannot be reached."""
    import ray

    if not ray.is_initialized():
        _require_listener(address)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray.init(
                address=address,
                logging_level="ERROR",
                log_to_driver=False,
                **({"include_dashboard": False} if address == "local" else {}),
            )
        except (ConnectionError, ValueError) as error:
            raise BadInput(f"cluster.address={address}: no Ray cluster can be reached there ({error})") from None
    total = ray.cluster_resources()
    return Resources(cpus=int(total.get("CPU", 0)), gpus=int(total.get("GPU", 0)))


def _require_listener(address: str) -> None:
    """Ray waits for minutes where nobody answers: ask first."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise BadInput(f"cluster.address={address}: no Ray cluster can be reached there ({error})") from None


def disconnect() -> None:
    """Leaves the cluster, and ends it where `connect` started it."""
    import ray

    ray.shutdown()
