"""Bytes and numbers on one machine: checkpoints, and the arithmetic on them. Knows neither Ray nor vLLM."""
