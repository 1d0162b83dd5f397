raise ImportError("`make test-fast` needs no ray: import it in the test, and mark the test heavy")
