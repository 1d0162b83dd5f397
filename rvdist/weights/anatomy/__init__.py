"""What a vector looks like: its size beside θ, by layer and module, its sparsity, its spectra, its likeness to others.

Reads sources as a merge does and holds no whole tensor. Knows nothing of Ray, vLLM, tasks or reports; `findings` and
`kind` are cheap to import, `analyze` brings torch and SciPy.
"""
