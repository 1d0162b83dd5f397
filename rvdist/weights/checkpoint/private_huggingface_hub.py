"""What we take from huggingface_hub beyond its public interface, in every process that talks to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, set_client_factory

from rvdist.core.private import Library

HUB = Library("huggingface_hub", "2.4.0")
NEEDED = (
    "huggingface_hub.utils._http:_GLOBAL_CLIENT_FACTORY",
    "huggingface_hub.file_download:repo_folder_name(repo_id)",
)


def wrap_transports(wrap: Callable[[Any], Any]) -> None:
    """A patch of the clients that this process makes from now on: each of a client's transports is what `wrap` makes of
    it. A factory is public, the transports of what it makes are not."""
    make: Callable[[], Any] = HUB.get(NEEDED[0])

    def wrapped() -> Any:
        client = make()
        try:
            client._transport = wrap(client._transport)
            client._mounts = {pattern: transport and wrap(transport) for pattern, transport in client._mounts.items()}
        except AttributeError as error:
            raise HUB.lacks(f"transport in its client ({error})") from None
        return client

    set_client_factory(wrapped)


def wrap_connections(transport: Any, wrap: Callable[[Any], Any]) -> None:
    """A patch of a transport that opens connections itself: what opens them is what `wrap` makes of it."""
    if hasattr(transport, "_pool"):
        transport._pool._network_backend = wrap(transport._pool._network_backend)


def cache_folder(repository: str) -> Path:
    """Where the cache has what it holds of a repository."""
    folder: str = HUB.get(NEEDED[1].partition("(")[0])(repo_id=repository, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder
