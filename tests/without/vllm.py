raise ImportError("a test of `make test-fast` imports vllm: mark it heavy")
