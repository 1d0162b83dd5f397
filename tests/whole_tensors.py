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


def breadcrumbs(base, vectors, weights, density, gamma):
    """A sort; magnitudes that are equal do not come up."""
    total = base.clone()
    for weight, vector in zip(weights, vectors, strict=True):
        n, order = vector.numel(), vector.abs().argsort(descending=True)
        kept = int(density * n)
        begin = min(int(gamma * n), n - kept)
        stays = torch.zeros(n, dtype=torch.bool)
        stays[order[begin : begin + kept]] = True
        total += weight * torch.where(stays | (density >= 1), vector, 0.0)
    return total


def della(base, vectors, weights, density, epsilon, seed, width, tensor="w"):
    """Row by row, element by element; magnitudes that are equal do not come up."""
    total = base.clone()
    for number, (weight, vector) in enumerate(zip(weights, vectors, strict=True)):
        kept, drawn = torch.zeros_like(vector), draws(seed, number, tensor, vector.numel())
        for row in range(0, vector.numel(), width):
            smallest_first = vector[row : row + width].abs().argsort().tolist()
            for rank, place in enumerate(smallest_first):
                probability = density - epsilon + 2 * epsilon * rank / (width - 1)
                kept[row + place] = drawn[row + place] < probability * 2**32
        total += weight * vector.abs().sum() / (kept * vector).abs().sum() * kept * vector
    return total


def arcee_fusion(base, vector, width):
    """A sort for the quartiles."""
    p, q = ((t.view(-1, width).softmax(1) + 1e-8) for t in (base + vector, base))
    importance = (vector.view(-1, width).abs() * (p * (p / q).log()).sum(1, keepdim=True)).flatten()
    ordered, n = importance.sort().values, vector.numel()
    first, median, third = (ordered[int(share * (n - 1))] for share in (0.25, 0.5, 0.75))
    return base + torch.where(importance >= median + 1.5 * (third - first), vector, 0.0)


def ram(base, vectors, epsilon, r=0.0, alpha=0.0):
    """Loops over vectors; with `r` and `alpha` it is RAM+."""
    changed = torch.stack([vector.abs() > epsilon for vector in vectors])
    count, total = changed.sum(0), base.clone()
    for vector, own in zip(vectors, changed, strict=True):
        shared, alone = int((own & (count > 1)).sum()), int((own & (count == 1)).sum())
        factor = 1 + r * min(shared / max(alone, epsilon), alpha)
        total += torch.where(own & (count == 1), factor * vector, 0.0)
        total += torch.where(own & (count > 1), vector / count.clamp(min=1), 0.0)
    return total


def sce(base, vectors, density):
    """torch's variance, and a sort."""
    stacked = torch.stack(vectors)
    if density < 1:
        variance = stacked.var(0, unbiased=False)
        selected = variance.argsort(descending=True)[: int(density * variance.count_nonzero())]
        mask = torch.zeros(len(base), dtype=torch.bool)
        mask[selected] = True
        stacked = stacked * mask
    sizes = stacked.square().mean(1)
    shares = sizes / sizes.sum() if sizes.sum() >= 1e-6 else torch.full_like(sizes, 1 / len(vectors))
    agrees = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    weights = shares[:, None] * agrees
    return base + (weights * stacked).sum(0) / weights.sum(0).clamp(min=1e-6)


def model_stock(base, vectors):
    count = len(vectors)
    cosine = torch.stack([torch.cosine_similarity(vectors[i], vectors[j], 0) for i in range(count) for j in range(i)])
    ratio = count * cosine.mean() / (1 + (count - 1) * cosine.mean())
    return ratio * (base + sum(vectors) / count) + (1 - ratio) * base


def slerp(one, other, share):
    angle = torch.acos(torch.cosine_similarity(one, other, 0))
    return (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other) / torch.sin(angle)


def mean_direction(vectors, weights):
    norms = [vector.norm() for vector in vectors]
    mean = sum(w * vector / norm for w, vector, norm in zip(weights, vectors, norms, strict=True))
    return mean / mean.norm() * sum(w * norm for w, norm in zip(weights, norms, strict=True))


def karcher(models):
    """Many small steps along the gradient: no more than the definition."""
    units = [model / model.norm() for model in models]
    mean = sum(units) / sum(units).norm()
    for _ in range(200):
        gradient = torch.zeros_like(mean)
        for unit in units:
            along = unit - unit.dot(mean) * mean
            gradient += torch.acos(unit.dot(mean).clamp(-1, 1)) * along / along.norm().clamp(min=1e-30)
        mean = mean + 0.5 * gradient / len(units)
        mean = mean / mean.norm()
    return mean * sum(model.norm() for model in models) / len(models)


def nearswap(base, other, t):
    near = (other - base).abs() <= t
    return torch.where(near, other, base + t * (other - base).sign())
