"""The pocket family: three tiny checkpoints with a real reasoning vector between them, and tasks that show it.

Owns the shipped weights, data and tasks, and the paths to them. Knows nothing of merging, Ray or vLLM:
to the rest of rvdist this is one more family of checkpoints. Importing it loads no library.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE / "target"
SFT = HERE / "sft"
GRPO = HERE / "grpo"
DATA = HERE / "data"
TASKS = HERE / "tasks"
