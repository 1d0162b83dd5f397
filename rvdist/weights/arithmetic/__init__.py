"""Tensors in, tensors out. Knows nothing of files, Ray or vLLM."""
