"""The page of many records, in a browser without a screen: `python benchmarks/page.py [--records N] [--browser FILE]`
makes a report of N records (100,000) whose texts are all different and long, a third of them Chinese, opens it five
times, and prints the page's size and the seconds until it is loaded, the median and the worst.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from significance import write_experiment

ROUNDS = 5
PROMPT, ANSWER = 200, 120  # words
PATIENCE = 60.0
WORDS = ["the", "answer", "of", "apples", "pears", "in", "May", "for", "each", "box", *map(str, range(300))]


def words(random_of: random.Random, count: int) -> str:
    if random_of.random() < 1 / 3:
        return "".join(chr(random_of.randrange(0x4E00, 0x9FA5)) for _ in range(4 * count))
    return " ".join(random_of.choices(WORDS, k=count))


def make(place: Path, count: int) -> Path:
    """A report of so many records."""
    from rvdist.core.point import Arm, WeightPoint
    from rvdist.core.record import TaskInfo, read_records
    from rvdist.report.findings import Findings, Making
    from rvdist.report.report import write_report
    from rvdist.report.statistics.compare import summarise

    write_experiment(place, 20, count // 100)
    random_of = random.Random(0)
    prompts: dict[tuple[str, int], str] = {}
    with open(place / "records.jsonl") as old, open(place / "long.jsonl", "w") as new:
        for line in old:
            record = json.loads(line)
            key = record["task"], record["doc_id"]
            prompts[key] = record["prompt_text"] = prompts.get(key) or words(random_of, PROMPT)
            record["response"] = words(random_of, ANSWER)
            record["filtered"] = record["response"][-20:]
            new.write(json.dumps(record) + "\n")
    said = json.loads((place / "tasks.json").read_text())
    infos = [TaskInfo(name, "1", (("score", "none"),), ("score", "none"), {"score": True}) for name in said["tasks"]]
    arms = [Arm(name, WeightPoint(name), "plain", None) for name in said["arms"]]
    found = list(read_records(place / "long.jsonl"))
    rows = summarise(arms, found, infos, arms[0].name)
    write_report(place, Findings(arms, rows, found, infos), Making("", "", {arm.name: arm.name for arm in arms}))
    return place / "report.html"


@contextlib.contextmanager
def running(browser: str) -> Iterator[str]:
    """A browser of its own; yields where it listens."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
        ]
        process = subprocess.Popen([browser, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            told, deadline = Path(profile) / "DevToolsActivePort", time.monotonic() + PATIENCE
            while not told.exists() or len(told.read_text().split()) < 2:
                if time.monotonic() > deadline:
                    sys.exit(f"{browser} does not say where it listens")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{told.read_text().split()[0]}"
        finally:
            process.terminate()
            process.wait(PATIENCE)


async def seconds_to_load(at: str, page: Path) -> float:
    """Until everything is loaded, its scripts have run, and a frame was drawn after that, by the page's own clock."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        opened = await (await session.put(f"{at}/json/new?about:blank")).json()
        async with session.ws_connect(opened["webSocketDebuggerUrl"], max_msg_size=0) as line:
            ask = Asking(line)
            await ask("Page.enable")
            await ask("Page.navigate", url=page.absolute().as_uri())
            drawn = "new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))"
            loaded = (
                "document.readyState === 'complete' ? 0 : new Promise(done => addEventListener('load', () => done(0)))"
            )
            expression = f"(async () => {{ await ({loaded}); return [location.href, await {drawn}] }})()"
            while True:
                value = await ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
                where, milliseconds = value.get("result", {}).get("value") or ("", 0.0)
                if where.startswith("file:"):
                    return float(milliseconds) / 1000


class Asking:
    def __init__(self, line: Any) -> None:
        self._line, self._number = line, 0

    async def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._line.send_json({"id": self._number, "method": method, "params": parameters})
        while (answer := await self._line.receive_json(timeout=PATIENCE)).get("id") != self._number:
            pass
        return dict(answer.get("result", {}))


def measure(page: Path, browser: str) -> list[float]:
    """Seconds of each opening."""
    with running(browser) as at:
        return [asyncio.run(seconds_to_load(at, page)) for _ in range(ROUNDS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        page = make(Path(place), arguments.records)
        seconds = measure(page, arguments.browser)
        print(
            f"{arguments.records:,} records: {page.stat().st_size / 1e6:.1f} MB, loaded after "
            f"{statistics.median(seconds):.2f} s (at worst {max(seconds):.2f} s)"
        )


if __name__ == "__main__":
    main()
