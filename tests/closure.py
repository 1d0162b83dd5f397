"""python tests/closure.py: writes constraints.txt, all that `.[cpu,dev]` needs, as it is installed here.

Less what packages ask for and nothing here uses: `triton` (xgrammar asks for it) has kernels for GPUs, 1 GB of them;
torchvision, torchaudio and torchcodec (vLLM's CPU build asks for them) may come built for another torch, and then
break `import vllm`.
"""

from __future__ import annotations

import platform
import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
LEFT_OUT = {"triton", "torchvision", "torchaudio", "torchcodec"}

_HEAD = """\
# Written by `python tests/closure.py`: everything that the CPU environment of the demo and the tests needs, in the
# versions they were last run with (Python {python}, {machine}). `make` installs just this: docs/dependencies.md.
"""


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """The version of each distribution that is needed for `requirements`, by canonical name; less LEFT_OUT. Raises
    PackageNotFoundError for one that is not installed."""
    found: dict[str, str] = {}
    asked, seen = [(Requirement(text), "") for text in requirements], set()
    while asked:
        requirement, extra = asked.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        installed = distribution(name)
        found[name] = installed.version
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                asked += [(Requirement(text), wanted) for text in installed.requires or ()]
    return found


def needed() -> dict[str, str]:
    """What `.[cpu,dev]` of pyproject.toml needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return closure([*project["dependencies"], *extras["cpu"], *extras["dev"]])


def pins() -> dict[str, str]:
    """What constraints.txt says."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", FILE.read_text(), re.MULTILINE))


if __name__ == "__main__":
    head = _HEAD.format(python=platform.python_version(), machine=f"{platform.system()} {platform.machine()}")
    FILE.write_text(head + "".join(f"{name}=={version}\n" for name, version in sorted(needed().items())))
