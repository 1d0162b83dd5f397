"""What stays up between the jobs of one command: the connection to Ray, and one fleet."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING

from rvdist.core import cluster, private_ray
from rvdist.core.config import ClusterConfig
from rvdist.core.errors import BadInput, Failed
from rvdist.core.timing import Timing

if TYPE_CHECKING:
    from rvdist.evaluate.fleet.fleet import Fleet


class Warm:
    """Nothing is started before it is asked for; `close` ends what was. Where it is not `outlived`, the process ends
    after it, and is to leave a cluster that is not ours by itself.

    Ray takes seconds to start: `begin` lets it do so while the caller does something else. Its thread lives until
    `close`: the kernel ends Ray's processes with the thread that started them.
    """

    def __init__(self, outlived: bool = True) -> None:
        self._outlived = outlived
        self._settings: ClusterConfig | None = None
        self._resources: Future[cluster.Resources] = Future()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._key: Hashable = None
        self._fleet: Fleet | None = None
        self._lock = threading.RLock()  # of these two

    def begin(
        self, settings: ClusterConfig, timing: Timing, say: Callable[[str], None] = lambda sentence: None
    ) -> None:
        """Starts to connect; `say` is told what is to be known of it. Raises BadInput for another cluster than that of
        an earlier call."""
        if self._thread is None:
            self._settings = settings
            self._thread = threading.Thread(target=self._connect, args=(settings, timing, say), daemon=True)
            self._thread.start()
        elif settings != self._settings:
            raise BadInput("cluster.*: the jobs of one command share one cluster; set it alike for all of them")

    def resources(self) -> cluster.Resources:
        """Waits for Ray. Raises what connecting raised."""
        return self._resources.result()

    def fleet(self, key: Hashable, start: Callable[[], Fleet]) -> Fleet:
        """The fleet that is up, if it was started for the same `key`; or another in its place."""
        with self._lock:
            if self._fleet is None or key != self._key:
                self.cool()
                self._fleet, self._key = start(), key
            return self._fleet

    def expect(self, wanted: Callable[[], tuple[Hashable, Callable[[], Fleet]]]) -> None:
        """Starts a fleet, of which `wanted` says the key and how, as soon as there is Ray. What goes wrong is for
        whoever asks for the fleet to hear."""

        def begin(_: Future[cluster.Resources]) -> None:
            with suppress(Exception):
                self.fleet(*wanted())

        self._resources.add_done_callback(begin)

    def cool(self) -> None:
        """Ends the fleet, so that its cores and GPUs are free for something else."""
        with self._lock:
            if self._fleet is not None:
                self._fleet.stop()
                self._fleet = None

    def finish(self) -> None:
        """Begins to end what was started, which takes Ray a second; `close` waits for it."""
        if self._thread is not None:
            self.cool()
            self._over.set()

    def close(self) -> None:
        self.finish()
        if self._thread is not None:
            self._thread.join()

    def _connect(self, settings: ClusterConfig, timing: Timing, say: Callable[[str], None]) -> None:
        ours = False
        try:
            with timing.phase("ray_init"):
                ours = not cluster.is_connected()  # else by somebody who is to disconnect it
                resources = cluster.connect(
                    settings.address, settings.nodes or 1, settings.timeout, f"rvdist-{timing.run}", self._over, say
                )
        except ImportError as error:
            self._resources.set_exception(Failed(f"Ray cannot be imported ({error}); install rvdist again, with it"))
        except Exception as error:
            self._resources.set_exception(error)
        else:
            self._resources.set_result(resources)
            self._over.wait()
        if not ours or "ray" not in sys.modules:
            return
        if not self._outlived and private_ray.is_guest():
            private_ray.leave_last()
            return
        with timing.phase("ray_shutdown"):
            cluster.disconnect()
