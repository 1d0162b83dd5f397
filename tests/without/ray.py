raise ImportError("a test of `make test-fast` imports ray: mark it heavy")
