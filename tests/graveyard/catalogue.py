"""All situations, in the order of the table."""

import on_adapters
import on_files
import on_methods
import on_names
import on_numbers
import on_scoring
from situations import SITUATIONS

__all__ = ["SITUATIONS"]
ROOMS = (on_names, on_files, on_numbers, on_adapters, on_methods, on_scoring)
