"""Checks that pictures are prepared as the image processors of transformers prepare them."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from octavo.pipelines.classifier import load_classifier
from octavo.pipelines.images import preprocessing_of

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
def test_pictures_are_prepared_as_transformers_does(name, shape, tmp_path):
    kind, options = PROCESSORS[name]
    by_pillow = getattr(transformers, kind + "Pil", None)  # the class without Pil may resize with torchvision
    processor = (by_pillow or getattr(transformers, kind))(**options, **NORMAL)
    processor.save_pretrained(tmp_path)
    wanted = processor(picture(*shape), return_tensors="pt")["pixel_values"][0]
    pixels = preprocessing_of(tmp_path)(picture(*shape))
    assert torch.allclose(pixels, wanted, atol=1e-5)


def test_without_a_configuration_the_size_of_the_model_and_values_of_0_to_1(tmp_path):
    x = preprocessing_of(tmp_path, 1, 16)(picture(9, 9))
    assert x.shape == (1, 16, 16)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1


CLASSIFIERS = sorted(
    {
        names["pil"]
        for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        if "pil" in (names := IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or {})
    }
    # ImageGPT makes no pixels, TimmWrapper needs timm, and Donut makes 2560 x 1920 pixels, which takes long
    - {"ImageGPTImageProcessorPil", "TimmWrapperImageProcessor", "DonutImageProcessorPil"}
)
WITH_MORE = {"Gemma3ImageProcessorPil": "num_crops", "Siglip2ImageProcessorPil": "spatial_shapes"}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_processor_of_a_classifier_does_what_it_does_by_default(name, tmp_path):
    processor = getattr(transformers, name)()
    processor.save_pretrained(tmp_path)
    if name in WITH_MORE:
        refused(partial(preprocessing_of, tmp_path), 3, WITH_MORE[name])
        return
    prepare = preprocessing_of(tmp_path)
    sizes = set()
    for shape in ((60, 80), (90, 50)):
        wanted = processor(picture(*shape), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(prepare(picture(*shape)), wanted)
        sizes.add(wanted.shape)
    assert prepare.fixed == (len(sizes) == 1)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("EfficientNetImageProcessor", {"include_top": False, "size": {"height": 20, "width": 20}}),
        ("EfficientNetImageProcessor", {"rescale_offset": True, "size": {"height": 20, "width": 20}}),
        ("MobileViTImageProcessor", {"do_flip_channel_order": False, "size": 30, "crop_size": 24}),
        ("ConvNextImageProcessor", {"size": 24, "crop_pct": 0.7}),
        ("ViTFeatureExtractor", {"size": 24}),
        ("ViTImageProcessorFast", {"size": 24}),
        ("DeiTImageProcessor", {"size": 30, "crop_size": 24, "rescale_factor": 1 / 127.5}),
    ],
)
def test_keys_of_older_configurations_mean_what_they_mean_to_transformers(kind, words, tmp_path):
    key = "feature_extractor_type" if "Feature" in kind else "image_processor_type"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: kind, **words}))
    own = kind.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor") + "Pil"
    wanted = getattr(transformers, own)(**words)(picture(50, 40), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(preprocessing_of(tmp_path)(picture(50, 40)), wanted)


def test_a_configuration_without_a_class_is_that_of_the_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "levit"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 24}}))
    wanted = transformers.LevitImageProcessorPil(size={"shortest_edge": 24})(picture(50, 40), return_tensors="pt")
    assert torch.equal(preprocessing_of(tmp_path)(picture(50, 40)), wanted["pixel_values"][0])


def test_a_grey_model_is_given_grey_pictures(tmp_path):
    transformers.ViTImageProcessorPil(size=8, image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path)
    assert preprocessing_of(tmp_path, 1)(picture(20, 30)).shape == (1, 8, 8)
    transformers.ViTImageProcessorPil(size=8).save_pretrained(tmp_path)
    refused(partial(preprocessing_of, tmp_path, 1), 3, "preprocessor_config")


def test_invalid_configurations_are_refused(tmp_path):
    for words in ({"size": 0.5j}, {"image_mean": [1], "image_std": []}, {"size": {"height": 3}}, [1], {"resample": 99}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(words, default=str))
        refused(partial(preprocessing_of, tmp_path), 3, "preprocessor_config")


def test_a_model_of_timm_is_not_given_the_preprocessing_of_another(tmp_path):
    config = {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "crop_pct": 0.9}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(partial(load_classifier, tmp_path), 3, "a model of timm")
