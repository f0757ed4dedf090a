"""The UNet of guided-diffusion, with the names of its tensors (Dhariwal and Nichol, Diffusion models beat GANs on image
synthesis, 2021), built from the tensors alone, and the denoiser of a consistency model around it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention

GROUPS = 32  # groups of channels of each norm
HEAD = 32  # channels of an attention head
SIGMA_DATA, SIGMA_MIN = 0.5, 0.002  # standard deviation of the data, and noise level at which nothing is denoised


class ResBlock(nn.Module):
    """Two norms and convolutions, added to the input. The embedding (batch, channels) scales and shifts the second
    norm. `resize` is "down" or "up" for half or twice the size, otherwise ""."""

    def __init__(self, inputs: int, outputs: int, embedding: int, resize: str = "") -> None:
        super().__init__()
        self.resize = resize
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, outputs), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def resized(self, x: Tensor) -> Tensor:
        if self.resize == "down":
            return avg_pool2d(x, 2)
        return interpolate(x, scale_factor=2.0) if self.resize == "up" else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        hidden = conv(self.resized(act(norm(x))))
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, 1)
        norm, *rest = self.out_layers
        hidden = norm(hidden) * (1 + scale) + shift
        for module in rest:
            hidden = module(hidden)
        return self.skip_connection(self.resized(x)) + hidden


class Attention(nn.Module):
    """Self-attention over the places of a picture (batch, channels, height, width), added to the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        heads = [part.unflatten(1, (-1, HEAD)).flatten(3).mT for part in self.qkv(self.norm(x)).chunk(3, 1)]
        return x + self.proj_out(scaled_dot_product_attention(*heads).mT.reshape(x.shape))


class Stage(nn.Sequential):
    """Modules in a row, of which those with an embedding get it."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        for module in self:
            x = module(x, embedding) if isinstance(module, (ResBlock, Attention)) else module(x)
        return x


def _part(tensors: Mapping[str, Tensor], prefix: str, resize: str) -> nn.Module:
    """Makes the module whose tensors begin with `prefix`."""
    if f"{prefix}.qkv.weight" in tensors:
        return Attention(tensors[f"{prefix}.qkv.weight"].shape[1])
    if (first := tensors.get(f"{prefix}.weight")) is not None:
        return nn.Conv2d(first.shape[1], first.shape[0], 3, padding=1)
    outputs, inputs = tensors[f"{prefix}.in_layers.2.weight"].shape[:2]
    return ResBlock(inputs, outputs, tensors[f"{prefix}.emb_layers.1.weight"].shape[1], resize)


def _keys(tensors: Mapping[str, Tensor], prefix: str) -> list[int]:
    return sorted({int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix)})


def _stages(tensors: Mapping[str, Tensor], name: str) -> list[list[str]]:
    """Returns the prefixes of the parts of each stage of the list `name`."""
    return [
        [f"{name}.{stage}.{part}" for part in _keys(tensors, f"{name}.{stage}.")]
        for stage in _keys(tensors, f"{name}.")
    ]


class GuidedUNet(nn.Module):
    """A UNet with the sizes of the `tensors`, a dict with the names of its parameters. Parameters of norms may be
    missing, as in a graph that holds them under other names; all parameters keep their initial values.

    The last part of an output stage that has a residual block before it doubles the size, if it is a residual block.
    There are as many stages that halve the size, at even distances.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        width, embedding = tensors["time_embed.0.weight"].shape[1], tensors["time_embed.2.weight"].shape[0]
        self.width = width
        self.time_embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label_emb = nn.Sequential(nn.Linear(1, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        inputs, outputs = _stages(tensors, "input_blocks"), _stages(tensors, "output_blocks")
        ups = {parts[-1] for parts in outputs if len(parts) > 1 and f"{parts[-1]}.qkv.weight" not in tensors}
        distance = len(inputs) // (len(ups) + 1)
        downs = {inputs[level * distance][0] for level in range(1, len(ups) + 1)}
        resize = dict.fromkeys(ups, "up") | dict.fromkeys(downs, "down")

        def stage(parts: list[str]) -> Stage:
            return Stage(*(_part(tensors, part, resize.get(part, "")) for part in parts))

        self.input_blocks = nn.ModuleList(map(stage, inputs))
        self.middle_block = stage([f"middle_block.{part}" for part in _keys(tensors, "middle_block.")])
        self.output_blocks = nn.ModuleList(map(stage, outputs))
        channels, last = tensors["out.2.weight"].shape[:2]
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, last), nn.SiLU(), nn.Conv2d(last, channels, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Takes pictures (batch, channels, height, width), times (batch,) and labels (batch,)."""
        half = self.width // 2
        angles = time[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / half)).to(x)
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1)) + self.label_emb(label[:, None])
        kept = []
        for stage in self.input_blocks:
            x = stage(x, embedding)
            kept.append(x)
        x = self.middle_block(x, embedding)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, kept.pop()], 1), embedding)
        return self.out(x)


class Consistency(nn.Module):
    """The denoiser of a consistency model (Song et al., Consistency models, 2023): estimates pictures from pictures
    with Gaussian noise of standard deviation `sigma`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, noisy: Tensor, sigma: Tensor, difficulty: Tensor) -> Tensor:
        """Takes pictures (batch, channels, height, width), noise levels (batch,) and labels (batch,) from 0 to 1;
        returns pictures with values from -1 to 1."""
        level, data = sigma[:, None, None, None], SIGMA_DATA**2
        root = (level**2 + data).sqrt()
        keep = data / ((level - SIGMA_MIN) ** 2 + data)
        output = self.network(noisy / root, 250 * sigma.log(), difficulty)
        return (SIGMA_DATA * (level - SIGMA_MIN) / root * output + keep * noisy).clamp(-1, 1)


def _block(name: str, inputs: int, outputs: int, embedding: int = 128) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.in_layers.2": (outputs, inputs, 3, 3),
        f"{name}.emb_layers.1": (2 * outputs, embedding),
        f"{name}.out_layers.3": (outputs, outputs, 3, 3),
    }
    return shapes if inputs == outputs else shapes | {f"{name}.skip_connection": (outputs, inputs, 1, 1)}


def _attention(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.qkv": (3 * width, width, 1, 1), f"{name}.proj_out": (width, width, 1, 1)}


def random_tensors(seed: int) -> dict[str, Tensor]:
    """Returns random tensors of a small UNet: a level of 32 channels, and one of 64 channels with attention."""
    shapes: dict[str, tuple[int, ...]] = {
        "time_embed.0": (128, 32), "time_embed.2": (128, 128), "label_emb.0": (128, 1), "label_emb.2": (128, 128),
        "input_blocks.0.0": (32, 1, 3, 3), "out.2": (1, 32, 3, 3),
        **_block("input_blocks.1.0", 32, 32),
        **_block("input_blocks.2.0", 32, 32),  # halves the size
        **_block("input_blocks.3.0", 32, 64), **_attention("input_blocks.3.1", 64),
        **_block("middle_block.0", 64, 64), **_attention("middle_block.1", 64), **_block("middle_block.2", 64, 64),
        **_block("output_blocks.0.0", 128, 64), **_attention("output_blocks.0.1", 64),
        **_block("output_blocks.1.0", 96, 64), **_attention("output_blocks.1.1", 64),
        **_block("output_blocks.1.2", 64, 64),  # doubles the size
        **_block("output_blocks.2.0", 96, 32),
        **_block("output_blocks.3.0", 64, 32),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    return tensors
