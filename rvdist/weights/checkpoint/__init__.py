"""Bytes: the safetensors format and the Hugging Face directory layout. Nothing of merging, Ray or vLLM."""
