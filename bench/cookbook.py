"""Prints, for the models of docs/cookbook/, what can be computed without their weights: the layers that become
integers, sizes, operations, and the disk that a captured prompt takes.

python -m bench.cookbook            all models; takes a minute and half a GiB
python -m bench.cookbook flux wan   only models whose name begins so

The models are built on torch's device `meta`, with the configuration of the published models and without memory for
weights. Octavo's own plan says which layers become integers. One call of the model is traced there too, which counts
its floating-point operations.
"""

import argparse
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from octavo.calibrate.plan import Plan, make_plan
from octavo.pipelines import FAMILIES

HALF, INT8, SCALE = 2, 1, 4  # bytes of a bfloat16 number, of a code, of the scale of an output channel
RATE = 100e12  # operations a second for which the table has the time of a call; an assumption, not a measurement
SUMS = 8  # bytes of the two float32 sums that GPTQ needs for each pair of input channels of a layer


@dataclass(frozen=True)
class Model:
    """A published model: its `family` in Octavo, the class of its denoiser in diffusers with the `config`, and
    `inputs`: the shape of each tensor that one call of the denoiser gets. `constant` names inputs that are the same in
    all calls of a prompt. `calls` is the number of calls of a prompt, at the picture or video size `size`. `rows` is 2
    with classifier-free guidance, where two rows of a call, or two calls, have the same latents; otherwise 1. `parts`
    is the number of such denoisers in the pipeline.
    """

    name: str
    family: str
    kind: str
    config: dict[str, Any]
    inputs: dict[str, tuple[int, ...]]
    calls: int
    size: str
    constant: tuple[str, ...] = ("encoder_hidden_states",)
    rows: int = 1
    parts: int = 1
    other: dict[str, Any] = field(default_factory=dict)  # arguments that are no plain tensors


def _sd3(layers: int, **config: Any) -> dict[str, Any]:
    width = 64 * config["num_attention_heads"]
    return {
        "sample_size": 128, "num_layers": layers, "attention_head_dim": 64, "caption_projection_dim": width,
        "pooled_projection_dim": 2048, "joint_attention_dim": 4096, "in_channels": 16, "out_channels": 16, **config,
    }  # fmt: skip


_SD3_INPUTS = {
    "hidden_states": (2, 16, 128, 128), "encoder_hidden_states": (2, 333, 4096), "pooled_projections": (2, 2048),
    "timestep": (2,),
}  # fmt: skip
_FLUX_INPUTS = {
    "hidden_states": (1, 4096, 64), "encoder_hidden_states": (1, 512, 4096), "pooled_projections": (1, 768),
    "timestep": (1,), "img_ids": (4096, 3), "txt_ids": (512, 3), "guidance": (1,),
}  # fmt: skip
_WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_FIVE = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
_SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}  # fmt: skip


def _wan(latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"hidden_states": latents, "timestep": (1,), "encoder_hidden_states": (1, 512, 4096)}


MODELS = (
    Model(
        "sd3-medium", "sd3", "SD3Transformer2DModel", _sd3(24, num_attention_heads=24, pos_embed_max_size=192),
        _SD3_INPUTS, 28, "1024 x 1024", rows=2,
    ),
    Model(
        "sd3.5-medium", "sd3", "SD3Transformer2DModel",
        _sd3(24, num_attention_heads=24, pos_embed_max_size=384, qk_norm="rms_norm",
             dual_attention_layers=tuple(range(13))),
        _SD3_INPUTS, 28, "1024 x 1024", rows=2,
    ),
    Model(
        "sd3.5-large", "sd3", "SD3Transformer2DModel",
        _sd3(38, num_attention_heads=38, pos_embed_max_size=192, qk_norm="rms_norm"),
        _SD3_INPUTS, 28, "1024 x 1024", rows=2,
    ),
    Model(
        "flux.1-dev", "flux", "FluxTransformer2DModel", {"guidance_embeds": True}, _FLUX_INPUTS, 28, "1024 x 1024",
        ("encoder_hidden_states", "img_ids", "txt_ids"),
    ),
    Model(
        "wan2.1-1.3b", "wan", "WanTransformer3DModel", _WAN_SMALL, _wan((1, 16, 21, 60, 104)), 100,
        "480 x 832, 81 frames", rows=2,
    ),
    Model(
        "wan2.1-14b", "wan", "WanTransformer3DModel", {}, _wan((1, 16, 21, 90, 160)), 100, "720 x 1280, 81 frames",
        rows=2,
    ),
    Model(
        "wan2.2-5b", "wan", "WanTransformer3DModel", _WAN_FIVE, _wan((1, 48, 31, 44, 80)), 100,
        "704 x 1280, 121 frames", rows=2,
    ),
    Model(
        "wan2.2-a14b", "wan", "WanTransformer3DModel", {}, _wan((1, 16, 21, 90, 160)), 80, "720 x 1280, 81 frames",
        rows=2, parts=2,
    ),
    Model(
        "qwen-image", "qwenimage", "QwenImageTransformer2DModel", {},
        {"hidden_states": (1, 6889, 64), "encoder_hidden_states": (1, 128, 3584), "timestep": (1,)}, 100, "1328 x 1328",
        rows=2, other={"img_shapes": [[(1, 83, 83)]]},
    ),
    Model(
        "hunyuanvideo", "hunyuanvideo", "HunyuanVideoTransformer3DModel", {},
        {
            "hidden_states": (1, 16, 33, 90, 160), "timestep": (1,), "encoder_hidden_states": (1, 256, 4096),
            "encoder_attention_mask": (1, 256), "pooled_projections": (1, 768), "guidance": (1,),
        },
        50, "720 x 1280, 129 frames",
    ),
    Model(
        "sana-1.6b", "sana", "SanaTransformer2DModel", {},
        {"hidden_states": (2, 32, 32, 32), "encoder_hidden_states": (2, 300, 2304), "timestep": (2,)}, 20,
        "1024 x 1024", rows=2,
    ),
    Model(
        "pixart-sigma", "pixart", "PixArtTransformer2DModel",
        {"sample_size": 128, "use_additional_conditions": False, "caption_channels": 4096},
        {"hidden_states": (2, 4, 128, 128), "encoder_hidden_states": (2, 300, 4096), "timestep": (2,)}, 20,
        "1024 x 1024", rows=2,
        other={"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    Model(
        "sdxl", "sdxl", "UNet2DConditionModel", _SDXL,
        {"sample": (2, 4, 128, 128), "timestep": (), "encoder_hidden_states": (2, 77, 2048)}, 50, "1024 x 1024",
        rows=2, other={"added_cond_kwargs": {"text_embeds": (2, 1280), "time_ids": (2, 6)}},
    ),
)  # fmt: skip


def built(model: Model) -> nn.Module:
    """Returns the denoiser of `model` on the device `meta`, in bfloat16."""
    with torch.device("meta"):
        module: nn.Module = getattr(diffusers, model.kind)(**model.config)
    return module.to(torch.bfloat16).eval()


def operations(model: Model, module: nn.Module) -> float:
    """Returns the floating-point operations of one call of `module`, two for each multiplication with an addition."""

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return torch.ones(shape, dtype=torch.bfloat16, device="meta")

    inputs: dict[str, Any] = {name: tensor(shape) for name, shape in model.inputs.items()}
    for name, value in model.other.items():
        inputs[name] = value
        if isinstance(value, dict):
            inputs[name] = {key: item if item is None else tensor(item) for key, item in value.items()}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"), counter:
        module(**inputs, return_dict=False)
    return float(counter.get_total_flops())


def row(model: Model) -> tuple[list[str], Counter[str]]:
    """Returns the cells of the table for `model`, and its reasons for layers that stay float, with their counts."""
    module, family = built(model), FAMILIES[model.family]
    plan = make_plan(module, defaults=family.keep_float, more=family.more_float)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    chosen = [entry for entry in plan.entries if entry.scheme]
    weights = sum(math.prod(entry.shape) for entry in chosen)
    channels = sum(entry.shape[0] for entry in chosen)
    before = HALF * parameters
    after = before - (HALF - INT8) * weights + SCALE * channels
    count = operations(model, module)
    cells = [
        model.name, f"{parameters / 1e9:.2f}", f"{len(chosen)} / {len(plan.entries) - len(chosen)}",
        f"{before / 2**30:.1f}", f"{after / 2**30:.1f}", f"{count / 1e12:.1f}", f"{count / RATE:.2f}",
        str(model.calls), f"{disk(model) / 2**20:.0f}", f"{sums(plan) / 2**30:.0f}",
    ]  # fmt: skip
    return cells, Counter(entry.reason for entry in plan.entries if not entry.scheme)


def disk(model: Model) -> float:
    """Returns the bytes of a captured prompt on disk: the inputs that change from call to call once for each step, all
    others once. Where `model.rows` is 2, both rows of a step, or both calls, have the same latents."""
    steps = model.calls / (model.rows if model.inputs[next(iter(model.inputs))][0] == 1 else 1)
    total = 0.0
    for name, shape in model.inputs.items():
        if name in model.constant:
            total += HALF * math.prod(shape) * (model.rows if shape[0] == 1 and model.rows == 2 else 1)
        elif len(shape) > 2:
            total += HALF * math.prod(shape[1:]) * steps
    return total


def sums(plan: Plan) -> float:
    """Returns the bytes of the sums that GPTQ needs for all layers of `plan` together, at most: without the layers that
    share an input, these are fewer."""
    return float(sum(SUMS * math.prod(entry.shape[1:]) ** 2 for entry in plan.entries if entry.scheme))


def main() -> None:
    """Prints the table of the models, then the reasons for layers that stay float."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names of models; all if none is given")
    names = tuple(parser.parse_args().names) or ("",)
    logging.disable(logging.WARNING)
    print(
        "| model | parameters, 1e9 | layers in integers / float | bfloat16, GiB | int8, GiB | TFLOP a call "
        "| seconds a call at 100 TFLOPS | calls a prompt | MiB a prompt on disk | sums for GPTQ, GiB, at most |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    reasons = {}
    for model in MODELS:
        if model.name.startswith(names):
            cells, reasons[model.name] = row(model)
            print(f"| {' | '.join(cells)} |", flush=True)
    for name, counts in reasons.items():
        print(f"\n{name}:")
        for reason, count in counts.most_common():
            print(f"  {count:4} {reason}")


if __name__ == "__main__":
    main()
