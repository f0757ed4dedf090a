"""Pictures become what the image processors of transformers make of them."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from octavo.pipelines.images import Preprocessing, preprocessing_of

from ..helpers.refusals import refused

NORMAL = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
PROCESSORS = {
    "ResNet, cropped": ("ConvNextImageProcessor", {"size": {"shortest_edge": 24}, "crop_pct": 0.875, "resample": 3}),
    "ConvNext, large": ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "resample": 3}),
    "ViT": ("ViTImageProcessor", {"size": {"height": 20, "width": 26}, "resample": 2}),
    "not scaled": ("ViTImageProcessor", {"size": {"height": 9, "width": 9}, "do_rescale": False}),
    "not normalised": ("ViTImageProcessor", {"size": {"height": 9, "width": 9}, "do_normalize": False}),
    "CLIP": ("CLIPImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}}),
    "CLIP, padded": ("CLIPImageProcessor", {"do_resize": False, "crop_size": {"height": 25, "width": 23}}),
}  # fmt: skip


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(30, 40), (41, 27), (15, 15)])
def test_as_transformers_does(name, shape, tmp_path):
    kind, options = PROCESSORS[name]
    by_pillow = getattr(transformers, kind + "Pil", None)  # the other one resizes with torchvision, where that is
    made = (by_pillow or getattr(transformers, kind))(**options, **NORMAL)
    made.save_pretrained(tmp_path)
    wanted = made(picture(*shape), return_tensors="pt")["pixel_values"][0]
    found = preprocessing_of(tmp_path)(picture(*shape))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_without_a_configuration_the_size_of_the_model_and_values_of_0_to_1(tmp_path):
    x = preprocessing_of(tmp_path, 1, 16)(picture(9, 9))
    assert x.shape == (1, 16, 16)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(1, 30))
def test_a_crop_has_its_size_whatever_the_picture(height, width, rows, columns):
    assert Preprocessing(crop=(rows, columns))(picture(height, width)).shape == (3, rows, columns)


def test_what_is_no_configuration(tmp_path):
    for words in ({"size": 0.5j}, {"image_mean": [1], "image_std": []}, {"size": {"height": 3}}, [1], {"resample": 99}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(words, default=str))
        refused(partial(preprocessing_of, tmp_path), 3, "preprocessor_config")
