"""Where the seconds go: nothing is lost where several threads add."""

import time
from concurrent.futures import ThreadPoolExecutor

from rvdist.core.timing import Timing


class Slow(dict):
    """Between a look and what follows another thread has its turn."""

    def get(self, *args):
        value = super().get(*args)
        time.sleep(0.001)
        return value


def test_threads_lose_nothing_of_each_other():
    timing = Timing(phases=Slow(), fleet=Slow())
    with ThreadPoolExecutor(8) as threads:
        for _ in range(40):
            threads.submit(timing.add, "score", 1.0)
            threads.submit(timing.count, "slices", 1)
    assert timing.phases == {"score": 40.0} and timing.fleet == {"slices": 40}
