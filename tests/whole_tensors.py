"""The methods once more, straightforwardly: on whole tensors, as the docstrings of rvdist/weights/arithmetic say them.

`terms` are (α, plus, minus), of which those that change the tensor; all tensors have one dtype.
"""

import hashlib

import numpy as np
import torch


def ties(base, terms, density):
    """A sort, and loops over vectors."""
    work = torch.float64 if base.dtype.itemsize > 2 else torch.float32
    kept = max(1, round(density * base.numel()))
    scaled = []
    for alpha, plus, minus in terms:
        difference = plus.to(work) - minus.to(work)
        least = difference.abs().sort(descending=True).values[kept - 1]
        scaled.append(alpha * torch.where(difference.abs() >= least, difference, 0.0))
    elected = sum(scaled).sign()
    change, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for one in scaled:
        change += torch.where((one.sign() == elected) & (elected != 0), one, 0.0)
        agreeing += one.sign() == elected
    return (base.to(work) + change / agreeing.clamp(min=1)).to(base.dtype)


def draws(seed, vector, tensor, n):
    """The first n draws of 32 bits of the stream that these three name: low half first of each 64-bit output."""
    key = int.from_bytes(hashlib.blake2b(f"{seed} {vector} {tensor}".encode(), digest_size=16).digest(), "little")
    outputs = np.random.Philox(key=key).random_raw((n + 1) // 2).tolist()
    return [half for output in outputs for half in (output & 0xFFFFFFFF, output >> 32)][:n]


def dare(base, terms, density, seed, tensor="w"):
    """One draw after the other, from the first."""
    work = torch.float64 if base.dtype.itemsize > 2 else torch.float32
    total = base.to(work)
    for vector, (alpha, plus, minus) in enumerate(terms):
        kept = torch.tensor([draw < density * 2**32 for draw in draws(seed, vector, tensor, base.numel())])
        total = total + torch.where(kept, (alpha / density) * (plus.to(work) - minus.to(work)), 0.0)
    return total.to(base.dtype)
