"""The model card of an output, and its metadata."""
