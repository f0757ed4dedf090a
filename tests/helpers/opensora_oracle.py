"""A second STDiT3, to test the first: slow, in plain formulas, one frame and one sample at a time.

The code follows the description step by step from a state dict, and shares no code with the package. Its attention is
correct only in fp32 and fp64; in bf16 it rounds where the description says.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    hidden = linear(state, f"{name}.fc1", x)
    inner = math.sqrt(2 / math.pi) * (hidden.float() + 0.044715 * hidden.float() ** 3)
    return linear(state, f"{name}.fc2", (0.5 * hidden.float() * (1 + torch.tanh(inner))).to(x.dtype))


def norm(x: Tensor) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes the attention of one head in one sample, with tensors of shape (tokens, d)."""
    logits = (q * q.shape[-1] ** -0.5) @ k.T
    return logits.float().softmax(-1).to(q.dtype) @ v


def heads_of(x: Tensor, heads: int) -> list[Tensor]:
    return list(x.chunk(heads, dim=-1))


def rotated(x: Tensor, freqs: Tensor) -> Tensor:
    """Applies the rotary embedding to (frames, d), pair by pair."""
    out = x.clone()
    for frame in range(x.shape[0]):
        for j in range(x.shape[1] // 2):
            angle = torch.tensor(frame, dtype=freqs.dtype) * freqs[j]
            a, b = x[frame, 2 * j], x[frame, 2 * j + 1]
            out[frame, 2 * j] = a * angle.cos() - b * angle.sin()
            out[frame, 2 * j + 1] = b * angle.cos() + a * angle.sin()
    return out


def self_attention(state: State, name: str, x: Tensor, config: dict[str, Any], temporal: bool) -> Tensor:
    """Computes the self-attention of one sequence (tokens, C)."""
    heads = config["num_heads"]
    q, k, v = linear(state, f"{name}.qkv", x).chunk(3, dim=-1)
    outs = []
    for qh, kh, vh in zip(heads_of(q, heads), heads_of(k, heads), heads_of(v, heads), strict=True):
        if config["qk_norm"]:
            qh, kh = (
                (t.float() / (t.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()).to(t.dtype)
                * state[f"{name}.{which}_norm.weight"]
                for t, which in ((qh, "q"), (kh, "k"))
            )
        if temporal:
            qh, kh = rotated(qh, state["rope.freqs"]), rotated(kh, state["rope.freqs"])
        outs.append(attend(qh, kh, vh))
    return linear(state, f"{name}.proj", torch.cat(outs, -1))


def cross_attention(state: State, name: str, x: Tensor, caption: Tensor, heads: int) -> Tensor:
    """Computes the attention from one sample's tokens (tokens, C) to its own caption tokens (length, C)."""
    q = linear(state, f"{name}.q_linear", x)
    k, v = linear(state, f"{name}.kv_linear", caption).chunk(2, dim=-1)
    triples = zip(heads_of(q, heads), heads_of(k, heads), heads_of(v, heads), strict=True)
    return linear(state, f"{name}.proj", torch.cat([attend(*triple) for triple in triples], -1))


def block(
    state: State, name: str, x: Tensor, caption: Tensor, times: list[Tensor], config: dict, temporal: bool
) -> Tensor:
    """Computes one block on one sample (T, S, C). times[frame] (6C) is the modulation of that frame."""
    table = state[f"{name}.scale_shift_table"]
    sets = [table + t.view(6, -1) for t in times]
    shift1, scale1, gate1, shift2, scale2, gate2 = (torch.stack([s[i] for s in sets])[:, None] for i in range(6))
    a = norm(x) * (1 + scale1) + shift1
    if temporal:
        rows = [self_attention(state, f"{name}.attn", a[:, s], config, True) for s in range(x.shape[1])]
        a = torch.stack(rows, dim=1)
    else:
        a = torch.stack([self_attention(state, f"{name}.attn", frame, config, False) for frame in a])
    x = x + gate1 * a
    flat = x.reshape(-1, x.shape[-1])
    x = x + cross_attention(state, f"{name}.cross_attn", flat, caption, config["num_heads"]).view(x.shape)
    return x + gate2 * mlp(state, f"{name}.mlp", norm(x) * (1 + scale2) + shift2)


def embed(state: State, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    k = torch.arange(128, dtype=torch.float32)
    angles = value.float() * torch.exp(-math.log(10000.0) * k / 128)
    wave = torch.cat([angles.cos(), angles.sin()]).to(dtype)
    return linear(state, f"{name}.mlp.2", F.silu(linear(state, f"{name}.mlp.0", wave)))


def positions(height: int, width: int, channels: int, scale: float, dtype: torch.dtype) -> Tensor:
    base = round((height * width) ** 0.5)
    w = torch.tensor([10000 ** (-2 * j / (channels / 2)) for j in range(channels // 4)]).to(dtype).float()
    rows = []
    for r in range(height):
        for c in range(width):
            column, row = c / scale * (base / width) * w, r / scale * (base / height) * w
            rows.append(torch.cat([column.sin(), column.cos(), row.sin(), row.cos()]))
    return torch.stack(rows).to(dtype)


def forward(state: State, config: dict[str, Any], x: Tensor, timestep: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
    """Computes the whole model with the keywords mask, x_mask, fps, height, width. Returns (B, out, Tx, Hx, Wx) in
    fp32."""
    dtype = state["x_embedder.proj.weight"].dtype
    x, timestep, y = x.to(dtype), timestep.to(dtype), y.to(dtype)
    mask, x_mask, fps = kwargs.get("mask"), kwargs.get("x_mask"), kwargs["fps"]
    outputs = []
    for b in range(x.shape[0]):
        rate = embed(state, "fps_embedder", fps[b % len(fps)], dtype)
        t = embed(state, "t_embedder", timestep[b], dtype) + rate
        t0 = embed(state, "t_embedder", torch.zeros(()), dtype) + rate
        chosen = torch.ones(y.shape[2], dtype=torch.bool) if mask is None else mask[b % len(mask)].flatten() != 0
        caption = mlp(state, "y_embedder.y_proj", y[b, 0])[chosen]
        active = None if x_mask is None else x_mask[b].tolist()
        area = float(kwargs["height"][0]) * float(kwargs["width"][0])
        outputs.append(_sample(state, config, x[b], (t, t0), caption, active, math.sqrt(area)))
    return torch.stack(outputs).float()


def _sample(
    state: State,
    config: dict[str, Any],
    x: Tensor,
    times: tuple[Tensor, Tensor],
    caption: Tensor,
    active: list[bool] | None,
    pixels: float,
) -> Tensor:
    (pt, ph, pw), (_, tx, hx, wx) = config["patch_size"], x.shape
    frames, height, width = -(-tx // pt), -(-hx // ph), -(-wx // pw)
    padded = torch.zeros(x.shape[0], frames * pt, height * ph, width * pw, dtype=x.dtype)
    padded[:, :tx, :hx, :wx] = x
    weight, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    table = positions(height, width, weight.shape[0], pixels / config["input_sq_size"], x.dtype)
    places = [(f, r, c) for f in range(frames) for r in range(height) for c in range(width)]
    patches = [
        padded[:, f * pt : (f + 1) * pt, r * ph : (r + 1) * ph, c * pw : (c + 1) * pw].reshape(-1) for f, r, c in places
    ]
    tokens = torch.stack(patches) @ weight.flatten(1).T + bias
    z = tokens.view(frames, height * width, -1) + table
    active = active or [True] * frames
    steps = [linear(state, "t_block.1", F.silu(times[0 if on else 1])) for on in active]
    for i in range(config["depth"]):
        z = block(state, f"spatial_blocks.{i}", z, caption, steps, config, False)
        z = block(state, f"temporal_blocks.{i}", z, caption, steps, config, True)
    shift, scale = state["final_layer.scale_shift_table"] + times[0]
    shift0, scale0 = state["final_layer.scale_shift_table"] + times[1]
    z = norm(z) * (1 + scale) + shift
    z = torch.stack([f if on else norm(f) * (1 + scale0) + shift0 for f, on in zip(z, active, strict=True)])
    values = linear(state, "final_layer.linear", z).view(frames, height, width, pt, ph, pw, -1)
    out = torch.zeros(values.shape[-1], frames * pt, height * ph, width * pw, dtype=x.dtype)
    for f, r, c in places:
        patch = values[f, r, c].permute(3, 0, 1, 2)
        out[:, f * pt : (f + 1) * pt, r * ph : (r + 1) * ph, c * pw : (c + 1) * pw] = patch
    return out[:, :tx, :hx, :wx]
