"""Loads Open-Sora-Plan 1.2 (Lin et al., arXiv 2412.00131, 2024) with the classes that diffusers has for Allegro.

A checkpoint of its OpenSoraT2V has the tensors of AllegroTransformer3DModel, with the same names and shapes; only the
fields of config.json are named differently. AllegroPipeline runs it with the Euler ancestral scheduler. diffusers has
no CausalVAE, so the pipeline outputs latents. This code was tested with random weights, not with the published ones.
"""

from pathlib import Path
from typing import Any

from octavo.capture.errors import FileError, MisfitError

from .families import value_groups
from .family import Family
from .files import read_config, read_json

_SAME = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "dropout",
    "cross_attention_dim", "attention_bias", "patch_size", "patch_size_t", "activation_fn",
    "norm_elementwise_affine", "norm_eps", "caption_channels",
)  # fmt: skip
_NEEDED = (
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "caption_channels",
    "sample_size",
    "sample_size_t",
)
# fields of config.json whose values diffusers' transformer has built in; another value means another model
_FIXED = {
    "norm_type": "ada_norm_single", "patch_size_t": 1, "use_rope": True, "only_cross_attention": False,
    "double_self_attention": False, "downsampler": None, "sparse1d": False, "sparse2d": False,
}  # fmt: skip


def transformer_config(words: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the arguments of AllegroTransformer3DModel for `words`, the content of an OpenSoraT2V's config.json.

    Raises MisfitError, which names the file `path`, for a missing field and for a value that is not that of
    Open-Sora-Plan 1.2.
    """
    for name, value in _FIXED.items():
        if words.get(name, value) != value:
            raise MisfitError(
                f"{path}: {name} is {words[name]!r}, not {value!r}. Give the transformer of Open-Sora-Plan 1.2."
            )
    missing = [name for name in _NEEDED if words.get(name) is None]
    if missing:
        raise MisfitError(f"{path}: {missing[0]} is missing. Give the config.json of an OpenSoraT2V.")
    size, frames = words["sample_size"], words["sample_size_t"]
    height, width = size if isinstance(size, list) else (size, size)
    # scales that OpenSoraT2V assumes where the config has none: relative to 30 by 40 patches and 16 frames
    scales = {
        "interpolation_scale_h": height / 30, "interpolation_scale_w": width / 40,
        "interpolation_scale_t": (frames - 1) // 16 + 1 if frames % 2 else frames / 16,
    }  # fmt: skip
    return {
        **{name: words[name] for name in _SAME if words.get(name) is not None},
        "sample_height": height, "sample_width": width, "sample_frames": frames,
        **{name: scale if words.get(name) is None else words[name] for name, scale in scales.items()},
    }  # fmt: skip


def load_transformer(directory: str | Path, torch_dtype: Any = None) -> Any:
    """Loads the transformer in the folder `directory`, which holds config.json and safetensors files, in `torch_dtype`;
    None stands for the stored dtype.

    Raises FileError for a file that is missing or damaged, MisfitError for a file of another model.
    """
    import torch
    from diffusers import AllegroTransformer3DModel

    from .opensora.load import fill

    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise FileError(f"{path}: it does not exist. Give the folder that holds config.json.")
    config = transformer_config(read_config(directory), path)
    try:
        with torch.device("meta"):
            model = AllegroTransformer3DModel(**config)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise MisfitError(f"{path}: no model can be built ({reason}). Correct the file.") from None
    return fill(model, directory, torch_dtype)


def load_pipeline(directory: str | Path, *, torch_dtype: Any = None, text_encoder: str | Path | None = None) -> Any:
    """Makes an AllegroPipeline around the transformer in the folder `directory`, loaded in `torch_dtype`; None stands
    for the stored dtype.

    `text_encoder` is the folder of a T5 or mT5 encoder and its tokenizer (google/mt5-xxl). Without it the pipeline
    takes prompt_embeds. Nothing is downloaded.
    """
    from diffusers import AllegroPipeline, EulerAncestralDiscreteScheduler

    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    if text_encoder is not None:
        parts |= _text_parts(Path(text_encoder), torch_dtype)
    transformer = load_transformer(directory, torch_dtype)
    return AllegroPipeline(transformer=transformer, scheduler=EulerAncestralDiscreteScheduler(), **parts)


def _text_parts(folder: Path, dtype: Any) -> dict[str, Any]:
    from transformers import AutoTokenizer, MT5EncoderModel, T5EncoderModel

    try:
        words = read_json(folder / "config.json")["model_type"]
        kind = MT5EncoderModel if words == "mt5" else T5EncoderModel
        encoder = kind.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise FileError(f"{folder}: no text encoder ({reason}). Give the folder of google/mt5-xxl.") from error
    return {"tokenizer": tokenizer, "text_encoder": encoder.eval()}


def _load(directory: Path, dtype: Any, text_encoder: Path | None) -> Any:
    return load_pipeline(directory, torch_dtype=dtype, text_encoder=text_encoder)


OPENSORA_PLAN = Family(
    name="opensora-plan",
    models=("OpenSoraT2V",),
    defaults={"num_inference_steps": 100, "guidance_scale": 7.5, "max_sequence_length": 512, "output_type": "latent"},
    more_float={"*.ff.net.2": "second linear of a feed-forward: float in msModelSlim's W8A8"},
    load=_load,
    groups=lambda model: list(value_groups(model)),
)
