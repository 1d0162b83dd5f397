"""mergekit's recipes: read, checked and told as weight points."""

from rvdist.core.recipe.recipe import Recipe, read_recipe
from rvdist.core.recipe.stack import Slice, Stack, read_stack

__all__ = ["Recipe", "Slice", "Stack", "read_recipe", "read_stack"]
