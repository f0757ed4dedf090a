"""Shows that ComfyUI's own code loads and computes files in format `comfy`. For FP8 and MXFP8 see consumer_comfy_fp8.

    python -m bench.consumers comfy --comfyui DIR

DIR is a directory with the sources of ComfyUI, which is not part of this project. For a tiny model of each family, with
random weights and some layers rotated, the program writes the int8 file and lets ComfyUI load it on the CPU
(`bench.comfy_child`). It checks that no tensor is missing or left over; that the integers, scales and rotations are
those that were written; that each layer computes, in float32 and bfloat16, bit for bit what Octavo's description of the
runtime's arithmetic says (`tests.zoo.comfy_models.eager`); and that the output of the model is that of Octavo's model
in diffusers. It also compares the native names of real models with the maps of names in ComfyUI, and computes damaged
files that ComfyUI accepts.
"""

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers as d
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo.calibrate.formats.comfy.check import COMFYUI, check
from octavo.calibrate.formats.comfy.names import family_of
from octavo.calibrate.formats.comfy.structure import ATTENTION, FILE, INT8, MARKER, METADATA, Content, rotation_of
from octavo.calibrate.formats.comfy.write import write_comfy
from octavo.calibrate.layers.install import quantized
from octavo.capture.files import Modes
from tests.zoo.comfy_models import eager, integers, randomized

from .comfy_child import DTYPES, input_for
from .comfy_maps import child
from .consumer_jobs import Row, decibels

LEAST = 30.0  # dB; the two implementations of a model differ by float32 rounding, which sometimes flips a code


class Case(NamedTuple):
    """A tiny model of one family and its call: `theirs` are the arguments of ComfyUI's model, `ours` those of the model
    in diffusers; `restored` turns the output of the latter into that of the former. Without arguments only the layers
    are computed. `overrides` are sizes that ComfyUI does not find in a file."""

    model: nn.Module
    theirs: Mapping[str, Tensor] = {}
    ours: Mapping[str, Any] = {}
    restored: Callable[[Tensor], Tensor] = lambda y: y
    overrides: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}


def _image(channels: int = 16, size: int = 8) -> Tensor:
    return torch.randn(1, channels, size, size)


def packed(x: Tensor) -> Tensor:
    """Returns the picture `x` (1, channels, height, width) as tokens of 2 x 2 pixels."""
    return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(y: Tensor) -> Tensor:
    """Returns tokens of 2 x 2 pixels as the square picture that they were made from."""
    side = int(y.shape[1] ** 0.5)
    return y.unflatten(1, (side, side)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def sd3() -> Case:
    """Returns a Stable Diffusion 3.5 of two blocks, the first with two attentions."""
    model = d.SD3Transformer2DModel(
        sample_size=8, in_channels=16, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=32, out_channels=16,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    x, text, pooled, t = _image(), torch.randn(1, 6, 64), torch.randn(1, 32), torch.tensor([600.0])
    ours = dict(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t)
    return Case(model, dict(x=x, timesteps=t, context=text, y=pooled), ours)


def flux() -> Case:
    """Returns a Flux.1-dev of one block of each kind."""
    model = d.FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True,
    )  # fmt: skip
    x, text, pooled = _image(), torch.randn(1, 6, 64), torch.randn(1, 32)
    t, guidance = torch.tensor([0.6]), torch.tensor([3.5])
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    ids = torch.stack([torch.zeros(4, 4), rows, columns], -1).view(16, 3)
    ours = dict(
        hidden_states=packed(x), encoder_hidden_states=text, pooled_projections=pooled, timestep=t, guidance=guidance,
        img_ids=ids, txt_ids=torch.zeros(6, 3),
    )  # fmt: skip
    theirs = dict(x=x, timestep=t, context=text, y=pooled, guidance=guidance)
    return Case(model, theirs, ours, unpacked)


def qwen_image() -> Case:
    """Returns a Qwen-Image of two blocks."""
    sizes = dict(attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=(8, 12, 12))
    model = d.QwenImageTransformer2DModel(num_layers=2, in_channels=64, out_channels=16, **sizes)
    x, text, t = _image(), torch.randn(1, 6, 64), torch.tensor([0.6])
    ours = dict(
        hidden_states=packed(x), encoder_hidden_states=text, timestep=t, img_shapes=[[(1, 4, 4)]],
        encoder_hidden_states_mask=torch.ones(1, 6, dtype=torch.long),
    )  # fmt: skip
    theirs = dict(x=x[:, :, None], timestep=t, context=text)
    return Case(model, theirs, ours, lambda y: unpacked(y)[:, :, None], sizes)


def ltx() -> Case:
    """Returns an LTX-Video of two blocks."""
    sizes = dict(attention_head_dim=32, num_attention_heads=2, cross_attention_dim=64, in_channels=32)
    model = d.LTXVideoTransformer3DModel(num_layers=2, out_channels=32, caption_channels=64, **sizes)
    x, text, t = torch.randn(1, 32, 2, 4, 4), torch.randn(1, 6, 64), torch.tensor([0.6])
    ours = dict(
        hidden_states=x.flatten(2).transpose(1, 2), encoder_hidden_states=text, timestep=t * 1000,
        encoder_attention_mask=torch.ones(1, 6), num_frames=2, height=4, width=4,
        rope_interpolation_scale=(8 / 25, 32, 32),
    )  # fmt: skip
    theirs = dict(x=x, timestep=t, context=text, attention_mask=torch.ones(1, 6))
    overrides = sizes | {"caption_channels": 64}
    return Case(model, theirs, ours, lambda y: y.transpose(1, 2).unflatten(2, (2, 4, 4)), overrides)


def wan() -> Case:
    """Returns a Wan 2.1 text-to-video of two blocks."""
    model = d.WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=64, freq_dim=256,
        ffn_dim=256, num_layers=2,
    )  # fmt: skip
    x, text, t = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 6, 64), torch.tensor([600.0])
    ours = dict(hidden_states=x, encoder_hidden_states=text, timestep=t)
    return Case(model, dict(x=x, timestep=t, context=text), ours, overrides={"text_dim": 64})


def z_image() -> Case:
    """Returns a Z-Image of one block of each kind; ComfyUI computes the embedding of the time with 1024 channels."""
    model = d.ZImageTransformer2DModel(
        dim=1536, n_layers=1, n_refiner_layers=1, n_heads=32, n_kv_heads=32, cap_feat_dim=64, axes_dims=[16, 16, 16],
        axes_lens=[256, 64, 64],
    )  # fmt: skip
    x, text, t = _image(), torch.randn(1, 32, 64), torch.tensor([0.6])
    ours = dict(x=[x[0][:, None]], t=1 - t, cap_feats=[text[0]])
    overrides = dict(
        n_heads=32, n_kv_heads=32, axes_dims=[16, 16, 16], axes_lens=[256, 64, 64], rope_theta=256.0,
        n_refiner_layers=1, ffn_dim_multiplier=8 / 3, z_image_modulation=True, time_scale=1000.0,
        pad_tokens_multiple=32, multiple_of=1,
    )  # fmt: skip
    theirs = dict(x=x, timesteps=t, context=text)
    return Case(model, theirs, ours, lambda y: -y[:, :, 0], overrides, {"num_tokens": 32})


def flux2() -> Case:
    """Returns a Flux.2 of one block of each kind."""
    return Case(
        d.Flux2Transformer2DModel(
            in_channels=128, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=2,
            joint_attention_dim=64,
        )
    )  # fmt: skip


def krea2() -> Case:
    """Returns a Krea 2 of one block."""
    model = d.Krea2Transformer2DModel(
        in_channels=64, num_layers=1, attention_head_dim=128, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=768, text_hidden_dim=256, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=768,
    )  # fmt: skip
    return Case(model, overrides={"txtheads": 2, "txtkvheads": 2})


def chroma() -> Case:
    """Returns a Chroma of one block of each kind."""
    model = d.ChromaTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, joint_attention_dim=64, approximator_hidden_dim=128,
        approximator_layers=2,
    )  # fmt: skip
    return Case(model, overrides={"out_dim": 256, "hidden_dim": 128, "n_layers": 2})


def auraflow() -> Case:
    """Returns an AuraFlow of one block of each kind."""
    model = d.AuraFlowTransformer2DModel(
        num_mmdit_layers=1, num_single_dit_layers=1, num_attention_heads=1, joint_attention_dim=2048,
        caption_projection_dim=256, pos_embed_max_size=64,
    )  # fmt: skip
    return Case(model, overrides={"dim": 256, "n_heads": 1, "global_conddim": 256})


CASES: dict[str, Callable[[], Case]] = {
    "Qwen-Image": qwen_image, "LTX-Video": ltx, "Flux.1": flux, "Stable Diffusion 3.5": sd3, "Wan 2.1": wan,
    "Z-Image": z_image, "Flux.2": flux2, "Krea 2": krea2, "Chroma": chroma, "AuraFlow": auraflow,
}  # fmt: skip


def prove(folder: Path, comfyui: Path) -> Iterator[Row]:
    """Writes a file for each of CASES into `folder` and lets the ComfyUI in the directory `comfyui` load and compute
    it. Yields a row for each."""
    for name, make in CASES.items():
        try:
            torch.manual_seed(0)
            case = make()
            ok, fact = _proven(name, case, folder, comfyui)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            ok, fact = False, str(error).strip().splitlines()[-1]
        yield Row(name, "computed", ok, fact)


def attention(folder: Path, comfyui: Path) -> Iterator[Row]:
    """Writes the file of a Flux.1 with a config of int8 attention in every attention module, and lets ComfyUI load and
    compute it on the CPU, where attention stays float. Yields a row, which holds if the output is that of the file
    without the configs, and if at most the configs are left over, as before ComfyUI 0.38."""
    torch.manual_seed(0)
    case = flux()
    model = randomized(case.model)
    names = [name for name, _ in model.named_modules() if name.endswith("attn")]
    results = []
    for word, modules in (("plain", []), ("attention", names)):
        place = folder / word
        place.mkdir(parents=True, exist_ok=True)
        (place / FILE).unlink(missing_ok=True)
        write_comfy(integers(model, 64), model, place, Modes(), attention=modules)
        results.append(computed(case, place / FILE, place, comfyui))
    (plain, notes), (outputs, more) = results
    configs = sorted(name for name in load_file(folder / "attention" / FILE) if name.endswith(ATTENTION))
    left = [note for note in more if note not in notes and not all(name in note for name in configs)]
    same = torch.equal(plain["output"], outputs["output"])
    fact = f"{len(configs)} configs, {'left over' if len(more) > len(notes) else 'read'}; output "
    yield Row("Flux.1, attention", "computed", same and not left, fact + ("unchanged" if same else "changed"))


def silent(folder: Path, comfyui: Path) -> Iterator[Row]:
    """Damages the file of a Stable Diffusion 3.5 in ways that ComfyUI passes over, and lets it compute each; yields
    rows like `prove`. A row holds if `octavo inspect` has a negative verdict on the damaged file."""
    torch.manual_seed(0)
    case, place = sd3(), folder / "silent"
    place.mkdir(parents=True, exist_ok=True)
    model = randomized(case.model)
    (place / FILE).unlink(missing_ok=True)
    write_comfy(integers(model, 64, keep=("embed", "proj_out", "norm_out")), model, place, Modes())
    with torch.no_grad():
        exact = case.restored(output(model(**case.ours)))
    content = Content.read(place / FILE)
    tensors = load_file(place / FILE)
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(f".{MARKER}")}
    unrotated = {name: {"format": INT8} for name in content.int8}
    halves = {f"{name}.weight_scale": tensors[f"{name}.weight_scale"] / 2 for name in content.int8}
    doubles = {f"{name}.pre_quant_scale": torch.full(tensors[f"{name}.weight"].shape[1:], 2.0) for name in content.int8}
    damages = {
        "as written": (tensors, content.int8), "no markers": (plain, None),
        "rotation lost": (tensors, unrotated), "pre_quant_scale": (tensors | halves | doubles, content.int8),
    }  # fmt: skip
    for word, (changed, layers) in damages.items():
        file = place / f"{word.replace(' ', '-')}.safetensors"
        metadata = None if layers is None else {METADATA: json.dumps({"format_version": "1.0", "layers": layers})}
        save_file(changed, file, metadata)
        results, _ = computed(case, file, place, comfyui)
        bad = [verdict for verdict in check(file) if verdict.consumer == COMFYUI and not verdict.ok]
        verdict = bad[0].fact.split(" (and ")[0] if bad else "sound"
        fact = f"output {decibels(exact, results['output']):.1f} dB from the float model's; {verdict}"
        yield Row(f"Stable Diffusion 3.5, {word}", "computed", bool(bad) == (word != "as written"), fact)


def computed(
    case: Case, file: Path, place: Path, comfyui: Path, **more: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Lets ComfyUI load and compute `file`; returns the results of `bench.comfy_child` and ComfyUI's messages. `place`
    is a folder for the job, `more` are more entries of the job."""
    save_file({key: value.contiguous() for key, value in case.theirs.items()}, place / "inputs.safetensors")
    job = dict(file=str(file), overrides=case.overrides, options=case.options, **more)
    job |= {"inputs": str(place / "inputs.safetensors"), "out": str(place / "out.safetensors")}
    (place / "job.json").write_text(json.dumps(job))
    child(comfyui, place / "job.json")
    with safe_open(place / "out.safetensors", "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, json.loads(opened.metadata()["notes"])  # noqa: SIM118


def _proven(name: str, case: Case, folder: Path, comfyui: Path) -> tuple[bool, str]:
    """Writes the file of a case, runs ComfyUI on it, and returns whether all holds, and the facts."""
    place = folder / name.replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    (place / FILE).unlink(missing_ok=True)
    model = randomized(case.model)
    layers = integers(model, 64, keep=("embed", "proj_out", "norm_out", "_in", "final_layer"))
    write_comfy(layers, model, place, Modes())
    results, notes = computed(case, place / FILE, place, comfyui)
    count, faults = _compared(place / FILE, results)
    facts = [f"{count} int8 layers of {family_of(model).title} equal in float32 and bfloat16"]
    facts = faults[:1] or facts
    if not case.theirs:
        return not faults and not notes, "; ".join([*facts, *notes])
    with torch.no_grad():
        exact = case.restored(output(model(**case.ours)))
        with quantized(model, layers):
            ours = case.restored(output(model(**case.ours)))
    apart, loss = (decibels(reference, results["output"]) for reference in (ours, exact))
    facts += [f"output {apart:.1f} dB from Octavo's, {loss:.1f} dB from the float model's", *notes]
    return not faults and not notes and apart > LEAST, "; ".join(facts)


def _compared(file: Path, results: dict[str, Tensor]) -> tuple[int, list[str]]:
    """Compares the int8 layers that ComfyUI loaded and computed with the `file`; returns their number and the
    differences."""
    markers, faults = Content.read(file).int8, []
    loaded = {key.removesuffix("|weight") for key in results if key.endswith("|weight")}
    if loaded != set(markers):
        faults.append(f"ComfyUI loaded {len(loaded)} of {len(markers)} int8 layers")
    with safe_open(file, "pt") as tensors:
        names = set(tensors.keys())
        for name in sorted(loaded & set(markers)):
            weight, scale = tensors.get_tensor(f"{name}.weight"), tensors.get_tensor(f"{name}.weight_scale")
            bias = tensors.get_tensor(f"{name}.bias") if f"{name}.bias" in names else None
            group = rotation_of(markers[name])
            same = torch.equal(results[f"{name}|weight"], weight) and torch.equal(
                results[f"{name}|weight_scale"], scale
            )
            if not same or int(results[f"{name}|group"]) != (group or 0):
                faults.append(f"{name} has other numbers in ComfyUI")
            for word, dtype in DTYPES.items():
                x = input_for(name, weight.shape[1], dtype)
                if not torch.equal(results[f"{name}|{word}"], eager(x, weight, scale, bias, group)):
                    faults.append(f"{name} computes something else in {word}")
    return len(loaded), faults


def output(result: Any) -> Tensor:
    """Returns the tensor that a model in diffusers returned."""
    sample = result.sample if hasattr(result, "sample") else result[0]
    return torch.stack(list(sample)) if isinstance(sample, list | tuple) else sample
