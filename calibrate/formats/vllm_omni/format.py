"""Defines the `Format` object of the format `vllm-omni`. Importing this module needs no torch."""

from pathlib import Path

from ...layers.schemes import DYNAMIC, MXFP8
from ..diffusers.directory import MODEL_FILES, Model, find_intact
from ..record import Description, Format, model_writer
from .check import CONSUMER, ON_ASCEND, check, layers_of
from .rules import METHODS, kept_float, refusal


def find(directory: Path) -> Path | None:
    """Returns the path of a model for vLLM-Omni: `directory` or its subfolder "vllm-omni", whichever has a quant_method
    that vLLM-Omni and this format know; None if neither has."""
    paths = (find_intact(directory, method, "vllm-omni") for method in METHODS)
    return next((path for path in paths if path is not None), None)


def describe(path: Path) -> Description:
    """Describes the model in format `vllm-omni` at `path`: its class, and the number of its 8-bit layers.

    Raises FileError for files that are missing or damaged.
    """
    model = Model.open(path)
    method = METHODS[str(model.quantization.get("quant_method"))]
    count = len(layers_of(model, method))
    title = f"a {model.config.get('_class_name')} for vLLM-Omni"
    return Description(title, (("layers", f"{count} {method.scheme}"),), {method.scheme: count})


FORMATS = (
    Format(
        name="vllm-omni",
        files=MODEL_FILES,
        writer=model_writer("octavo.calibrate.formats.vllm_omni.write:write_vllm_omni"),
        schemes=(DYNAMIC, MXFP8),
        mixed=False,
        clamping=True,
        consumer=CONSUMER,
        find=find,
        check=check,
        optional=frozenset({ON_ASCEND}),
        describe=describe,
        folds=True,
        alone=True,
        made_biases=False,
        refusal=refusal,
        kept_float=kept_float,
    ),
)
