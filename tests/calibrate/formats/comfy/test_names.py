"""Native names: diffusers' own converters turn the tensors back into the same float model, bit for bit."""

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from torch import Tensor

from octavo.calibrate.formats.comfy.check import family_in
from octavo.calibrate.formats.comfy.families import FAMILIES
from octavo.calibrate.formats.comfy.family import Family
from octavo.calibrate.formats.comfy.names import family_of, native_names, refusal, together
from octavo.calibrate.formats.comfy.write import join

from ....helpers.refusals import refused
from ....zoo.comfy_models import MODELS, model, narrow
from ....zoo.toy import toy

CONVERTERS = {
    "LTXVideoTransformer3DModel": converters.convert_ltx_transformer_checkpoint_to_diffusers,
    "FluxTransformer2DModel": converters.convert_flux_transformer_checkpoint_to_diffusers,
    "SD3Transformer2DModel": converters.convert_sd3_transformer_checkpoint_to_diffusers,
    "WanTransformer3DModel": converters.convert_wan_transformer_to_diffusers,
    "WanVACETransformer3DModel": converters.convert_wan_transformer_to_diffusers,
    "ZImageTransformer2DModel": converters.convert_z_image_transformer_checkpoint_to_diffusers,
    "Flux2Transformer2DModel": converters.convert_flux2_transformer_checkpoint_to_diffusers,
    "ChromaTransformer2DModel": converters.convert_chroma_transformer_checkpoint_to_diffusers,
    "AuraFlowTransformer2DModel": converters.convert_auraflow_transformer_checkpoint_to_diffusers,
    "Krea2Transformer2DModel": converters.convert_krea2_transformer_checkpoint_to_diffusers,
    "QwenImage21Transformer2DModel": converters.convert_qwen_image21_transformer_checkpoint_to_diffusers,
    "QwenImageTransformer2DModel": lambda tensors: tensors,  # diffusers reads such files without a conversion
}
REAL = {
    "flux-dev": ("FluxTransformer2DModel", dict(guidance_embeds=True)),
    "flux-schnell": ("FluxTransformer2DModel", dict()),
    "sd35-medium": (
        "SD3Transformer2DModel",
        dict(num_layers=24, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)), pos_embed_max_size=384),
    ),
    "qwen-image": ("QwenImageTransformer2DModel", dict()),
    "ltx": ("LTXVideoTransformer3DModel", dict()),
    "wan-14b-i2v": (
        "WanTransformer3DModel",
        dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    ),
    "z-image": ("ZImageTransformer2DModel", dict()),
    "z-image-omni": ("ZImageTransformer2DModel", dict(n_layers=2, siglip_feat_dim=1152)),
    "flux2": ("Flux2Transformer2DModel", dict()),
    "chroma": ("ChromaTransformer2DModel", dict()),
    "auraflow": ("AuraFlowTransformer2DModel", dict()),
    "krea2": ("Krea2Transformer2DModel", dict()),
    "qwen-image-2.1": ("QwenImage21Transformer2DModel", dict()),
}  # fmt: skip


def native_tensors(tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Returns the float `tensors` of a model under their native names."""
    rows = native_names(tensors, family)
    return {native: join([tensors[name] for name in row.names], row) for native, row in rows.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Returns whether two dicts have the same names and tensors."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in {"flux", "chroma"}])
def test_diffusers_converts_the_native_tensors_back(name):
    module = model(name)
    native = native_tensors(module.state_dict(), family_of(module))
    assert same(CONVERTERS[type(module).__name__](dict(native)), module.state_dict())


@pytest.mark.parametrize("name", REAL)
def test_diffusers_converts_the_rows_of_real_models_back(name):
    kind, config = REAL[name]
    tensors = narrow(kind, **config)
    native = native_tensors(tensors, FAMILIES[kind])
    assert same(CONVERTERS[kind](dict(native)), tensors)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_one_native_name(name):
    names = list(model(name).state_dict())
    rows = native_names(names, family_of(model(name)))
    assert sorted(name for row in rows.values() for name in row.names) == sorted(names)
    assert family_of(model(name)).native in rows


@pytest.mark.parametrize("name", MODELS)
def test_names_tell_the_family_and_whether_they_are_native(name):
    tensors = model(name).state_dict()
    family = family_of(model(name))
    assert family_in(set(native_names(tensors, family))) == (family, True)
    assert family_in(set(tensors)) == (family, family.diffusers is None)


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_one_matrix_have_the_same_inputs(name):
    module = model(name)
    groups = together(module)
    assert bool(groups) == (name in {"flux", "flux2", "chroma", "sd3", "sd35", "z-image", "qwen-image-2.1"})
    for group in groups:
        assert len({module.get_submodule(layer).in_features for layer in group}) == 1
    if name == "flux":
        block = "single_transformer_blocks.0"
        assert [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"] in groups


def test_a_class_without_native_names_is_refused_in_one_line():
    assert all(refusal(kind, {}) is None for kind in FAMILIES)
    reason = refusal("SanaTransformer2DModel", {})
    assert reason is not None
    assert all(family.title in reason for family in FAMILIES.values())
    assert refusal("ZImageTransformer2DModel", {"all_patch_size": [2]}) is None
    assert "all_patch_size [2], not [2, 4]" in str(refusal("ZImageTransformer2DModel", {"all_patch_size": (2, 4)}))
    refused(lambda: family_of(toy()), 2, "Toy", "--format diffusers")
    assert together(toy()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda names: [*names, "extra.weight"], "no name for the tensor extra.weight"),
        (lambda names: [name for name in names if "to_k" not in name], "consists of 3 layers"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, words):
    module = model("sd3")
    refused(lambda: native_names(change(list(module.state_dict())), family_of(module)), 2, words)
