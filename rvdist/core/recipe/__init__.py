"""mergekit's recipes: read, checked and told as weight points."""

from rvdist.core.recipe.recipe import Recipe, read_recipe

__all__ = ["Recipe", "read_recipe"]
