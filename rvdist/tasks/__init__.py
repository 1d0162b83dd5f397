"""Tasks that need more than lm-eval's YAML: code that a model wrote, and the sandbox it runs in."""
