raise ImportError("`make test-fast` needs no vllm: import it in the test, and mark the test heavy")
