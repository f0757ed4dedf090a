"""Attention of each type in float64, one number after another, as its kernel is described: a slow reference."""

import math

import torch
from torch import Tensor

from octavo.calibrate.attention.rotations import rotation_of, walsh


def e4m3(values: list[float]) -> list[float]:
    """Rounds to the nearest numbers of e4m3 with torch's cast, after clamping."""
    clamped = torch.tensor([min(max(value, -448.0), 448.0) for value in values], dtype=torch.float64)
    return clamped.to(torch.float8_e4m3fn).tolist()


def fp8(x: Tensor, rows: int) -> Tensor:
    """Codes one head (tokens, channels) in blocks of `rows` tokens and 128 channels."""
    y = x.clone()
    for start in range(0, len(x), rows):
        for left in range(0, x.shape[1], 128):
            block = x[start : start + rows, left : left + 128]
            scale = block.abs().max().item() / 448
            coded = e4m3([value / scale if scale else 0.0 for value in block.flatten().tolist()])
            y[start : start + rows, left : left + 128] = scale * torch.tensor(coded).double().view(block.shape)
    return y


def mx_vector(values: list[float]) -> list[float]:
    """Codes numbers in blocks of 32 that share a power of two."""
    coded = []
    for start in range(0, len(values), 32):
        block = values[start : start + 32]
        most = max(map(abs, block))
        scale = 2.0 ** (math.floor(math.log2(most)) - 8) if most else 1.0
        coded += [scale * code for code in e4m3([value / scale for value in block])]
    return coded


def mx(x: Tensor) -> Tensor:
    """Codes the rows of a matrix in blocks of 32 columns."""
    return torch.tensor([mx_vector(row) for row in x.tolist()], dtype=torch.float64)


def int8(x: Tensor, owner: list[int]) -> Tensor:
    """Codes the rows of a matrix; rows with the same number in `owner` share a scale."""
    y = x.clone()
    for group in set(owner):
        members = [row for row, number in enumerate(owner) if number == group]
        scale = x[members].abs().max().item() / 127 + 1e-7
        y[members] = torch.round(x[members] / scale) * scale
    return y


def softmax(scores: list[float]) -> list[float]:
    """The weights of one row; zeros if all keys are masked."""
    most = max(scores)
    if most == -math.inf:
        return [0.0] * len(scores)
    weights = [math.exp(score - most) for score in scores]
    return [weight / math.fsum(weights) for weight in weights]


def tiled_weights(scores: list[float], tile: int) -> list[float]:
    """The weights of one row, in levels of 1 / 255 of the largest of their tile."""
    most, levels = max(scores), []
    if most == -math.inf:
        return [0.0] * len(scores)
    for start in range(0, len(scores), tile):
        part = scores[start : start + tile]
        top = max(part)
        for score in part:
            level = 0.0 if score == -math.inf else round(255 * math.exp(score - top)) * math.exp(top - most)
            levels.append(level)
    return [level / math.fsum(levels) for level in levels]


def centred(key: Tensor) -> Tensor:
    """Takes one of nine sampled keys off all keys if this makes the samples smaller."""
    samples = key[[index * (len(key) - 1) // 8 for index in range(9)]]
    energies = [((samples - anchor) ** 2).sum().item() for anchor in samples]
    distances = [((anchor - samples.mean(0)) ** 2).sum().item() for anchor in samples]
    best = distances.index(min(distances))
    narrow = (samples - samples[best]).abs().max() <= 1.125 * samples.abs().max()
    return key - samples[best] if energies[best] < (samples**2).sum() and narrow else key


def head_output(
    type: str | None, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rotated: bool, values: Tensor
) -> Tensor:
    """Returns the output (rows, width) of one head in float64. `values` are the coded values of a type whose blocks
    hold tokens of several batch items; `type` None is float attention."""
    width, keys, scale = query.shape[1], len(key), query.shape[1] ** -0.5
    if rotated and type != "comfy_kitchen_int8":
        query, key = query @ rotation_of(width), key @ rotation_of(width)
    if type == "FP8_DYNAMIC":
        query, key, value = fp8(query, 128), fp8(key, 256), fp8(value, 256)
    elif type == "MXFP8_DYNAMIC":
        query, key, value = mx(query), mx(key), values
    elif type is not None:
        full = 64 if width <= 64 else 128
        query, key = (torch.nn.functional.pad(x, (0, full - width)) for x in (query, centred(key)))
        if rotated:
            matrix = walsh(full, 4) if keys <= 256 else walsh(full, full, signed=full == 128)
            query, key = query @ matrix, key @ matrix
        query = int8(query, [row // 32 * 8 + row % 8 for row in range(len(query))])
        key = int8(key, [row // 64 * 4 + row % 8 // 2 for row in range(keys)])
        value = int8(value.t(), list(range(value.shape[1]))).t()
    scores = query @ key.t() * scale + (0.0 if bias is None else bias)
    weigh = softmax if type != "comfy_kitchen_int8" else lambda row: tiled_weights(row, 64)
    return torch.tensor([weigh(row) for row in scores.tolist()], dtype=torch.float64) @ value


def outputs(type: str | None, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, rotated: bool) -> Tensor:
    """Returns the output (batch, heads, rows, width) of attention in float64."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads = query.shape[:2]
    flat = [mx(torch.cat(list(value[:, head])).t()).t().chunk(batch) for head in range(heads)]
    return torch.stack([
        torch.stack([
            head_output(
                type, query[item, head], key[item, head], value[item, head],
                None if bias is None else bias[item, head], rotated, flat[head][item],
            )
            for head in range(heads)
        ])
        for item in range(batch)
    ])  # fmt: skip
