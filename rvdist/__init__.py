"""rvdist: move a skill between large models by weight arithmetic, and know whether it worked.

From Python: `rvdist.api`.
"""

__version__ = "0.1.0"
