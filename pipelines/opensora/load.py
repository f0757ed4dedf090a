"""Loads models from disk: a downloaded hpcai-tech/OpenSora-STDiT-v3 folder, and directories that diffusers wrote."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from octavo.capture.errors import FileError, MisfitError

from ..files import read_config, read_json
from .pipeline import OpenSoraPipeline
from .scheduler import RFlowScheduler
from .transformer import STDiT3

_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def transformer_config(directory: Path) -> dict[str, Any]:
    """Returns the fields of config.json in `directory` that STDiT3 takes, without those that other libraries added.

    Raises FileError for a missing or damaged file.
    """
    path = directory / "config.json"
    if not path.exists():
        raise FileError(f"{path}: it does not exist. Give the folder that holds config.json.")
    values = read_config(directory)
    known = inspect.signature(STDiT3.__init__).parameters.keys() - {"self"}
    return {name: value for name, value in values.items() if name in known}


def load_transformer(directory: str | Path, torch_dtype: torch.dtype | None = None) -> STDiT3:
    """Loads the transformer in the folder `directory`, which holds config.json and safetensors files, in `torch_dtype`;
    None stands for the stored dtype.

    A quantized transformer is loaded by its quantizer, which has to be registered with diffusers. Raises FileError for
    a file that is missing or damaged. Raises MisfitError, which names the tensor, for a tensor that is missing, surplus
    or misshapen.
    """
    directory = Path(directory)
    config = transformer_config(directory)
    if "quantization_config" in read_json(directory / "config.json"):
        return STDiT3.from_pretrained(directory, torch_dtype=torch_dtype, local_files_only=True).eval()
    try:
        with torch.device("meta"):
            model = STDiT3(**config)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise MisfitError(f"{directory / 'config.json'}: no model can be built ({reason}). Correct the file.") from None
    filled: STDiT3 = fill(model, directory, torch_dtype)
    return filled


def fill(model: Any, directory: Path, torch_dtype: torch.dtype | None) -> Any:
    """Fills `model`, on the meta device, with the weights in the folder `directory`, in `torch_dtype`; None stands for
    the stored dtype. Returns the model in eval mode.

    Raises FileError for a file that is missing or damaged, MisfitError for a tensor that is missing, surplus or
    misshapen.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = {}
    for path in _weight_files(directory):
        for name, tensor in _tensors(path, expected):
            state[name] = tensor if torch_dtype is None else tensor.to(torch_dtype)
    missing = [name for name in expected if name not in state]
    if missing:
        raise MisfitError(
            f"{directory}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are). "
            "Give a whole checkpoint of the model that config.json describes.",
        )
    model.load_state_dict(state, assign=True)
    return model.eval()


def _weight_files(directory: Path) -> list[Path]:
    for name in _WEIGHTS:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return [directory / name]
        if index.is_file():
            try:
                shards = sorted(set(read_json(index)["weight_map"].values()))
            except (KeyError, TypeError, AttributeError):
                raise FileError(f"{index}: it does not list weight files. Download it again.") from None
            return [directory / Path(str(shard)).name for shard in shards]
    raise FileError(f"{directory}: there is neither {' nor '.join(_WEIGHTS)}. Download the weights.")


def _tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle does not iterate
                shape = tuple(file.get_slice(name).get_shape())
                if name not in expected:
                    raise MisfitError(f"{path}: tensor {name} has no place in the model. Check config.json.")
                if shape != expected[name]:
                    fact = f"tensor {name} has shape {shape}, but the model needs {expected[name]}"
                    raise MisfitError(f"{path}: {fact}. Check config.json.")
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path}: it cannot be read ({error}). Download it again.") from None


def load_pipeline(
    directory: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    text_encoder: str | Path | None = None,
    text_encoder_dtype: torch.dtype = torch.float32,
    vae: str | Path | None = None,
) -> OpenSoraPipeline:
    """Loads a pipeline that OpenSoraPipeline.save_pretrained wrote, or makes one from a folder of only the transformer.
    `torch_dtype` is the dtype of the transformer and the VAE.

    `text_encoder` is the folder of a T5 encoder and its tokenizer (DeepFloyd/t5-v1_1-xxl), `vae` the folder of a 2-D
    AutoencoderKL. Both replace what the directory holds, if anything. A pipeline without a text encoder takes
    prompt_embeds, one without a VAE returns latents. The text encoder is loaded in `text_encoder_dtype` (Open-Sora
    itself runs it in float32). Nothing is downloaded.
    """
    directory = Path(directory)
    parts: dict[str, Any] = {}
    if text_encoder is not None:
        parts["tokenizer"] = AutoTokenizer.from_pretrained(text_encoder, local_files_only=True)
        encoder = T5EncoderModel.from_pretrained(text_encoder, dtype=text_encoder_dtype, local_files_only=True)
        parts["text_encoder"] = encoder.eval()
    if vae is not None:
        from diffusers import AutoencoderKL

        parts["vae"] = AutoencoderKL.from_pretrained(vae, torch_dtype=torch_dtype, local_files_only=True).eval()
    if not (directory / "model_index.json").is_file():
        return OpenSoraPipeline(load_transformer(directory, torch_dtype), RFlowScheduler(), **parts)
    parts["transformer"] = load_transformer(directory / "transformer", torch_dtype)
    dtypes = {"text_encoder": text_encoder_dtype, "default": torch_dtype or torch.float32}
    return OpenSoraPipeline.from_pretrained(directory, torch_dtype=dtypes, local_files_only=True, **parts)
