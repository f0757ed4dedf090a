"""Checks that a prompt is a text, a class, a row of embeddings or only a seed, depending on the pipeline."""

import json
from pathlib import Path

import diffusers as d
import pytest
import torch

from octavo.capture.store.reader import Capture
from octavo.pipelines.family import Family
from octavo.pipelines.prompted import class_label, note_on_prompts, prompt_arguments
from octavo.pipelines.run import RunSettings, call_arguments

from ..helpers.commands import errors, octavo
from ..helpers.refusals import refused
from ..zoo.parts import autoencoder

NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "crane", 207: "golden retriever"}


def dit(names: dict[int, str] | None = NAMES, classes: int = 1000) -> d.DiTPipeline:
    sizes = {"sample_size": 8, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    transformer = d.DiTTransformer2DModel(**sizes, out_channels=8, in_channels=4, num_embeds_ada_norm=classes)
    return d.DiTPipeline(transformer, autoencoder(4), d.DDIMScheduler(), id2label=names)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Writes a DiT as it is published, with the names of its classes in model_index.json."""
    folder = tmp_path_factory.mktemp("dit")
    dit().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": NAMES}))
    return folder


def test_classes_are_numbers_or_names():
    pipe = dit()
    for text, label in (("207", 207), ("Goldfish", 1), ("Tinca tinca", 0), ("tench, tinca tinca", 0), (" 5 ", 5)):
        assert class_label(pipe, text) == label
    refused(lambda: class_label(pipe, "goldfisch"), 2, "'goldfisch' is not one of them. Did you mean 'goldfish'?")
    refused(lambda: class_label(pipe, "1000"), 2, "no class 1000. Choose one of 0 to 999")


def test_a_model_of_1000_classes_without_names_has_those_of_imagenet():
    pipe = dit(None)
    for text, label in (("tench", 0), ("Golden Retriever", 207), ("toilet tissue", 999), ("drake", 97), ("12", 12)):
        assert class_label(pipe, text) == label
    refused(lambda: class_label(pipe, "crane"), 2, "'crane' is the name of the classes 134 and 517. Write the number.")
    assert "names are read as those of ImageNet" in str(note_on_prompts(pipe, {}))
    assert note_on_prompts(dit(), {}) is None
    few = dit(None, 10)
    refused(lambda: class_label(few, "tench"), 2, "'tench' is not one of them. Give a number in each line.")
    assert note_on_prompts(few, {}) is None


def test_the_lines_of_the_prompts_are_the_classes(stored, tmp_path):
    prompts = tmp_path / "classes.txt"
    prompts.write_text("tench\n1\nGolden retriever\n")
    command = ("capture", stored, tmp_path / "a", "--prompts", prompts, "--steps", 1, "--device", "cpu")
    output = octavo(*command, "--arg", "class_labels=[207]", code=2)
    assert "takes its classes from the prompts, one in each line" in errors(output)[0]
    octavo(*command)
    assert [int(call.kwargs["class_labels"][0]) for call in Capture.open(tmp_path / "a").calls()] == [0, 1, 207]


def test_a_line_that_is_no_class_is_refused_before_anything_is_drawn(stored, tmp_path):
    prompts = tmp_path / "classes.txt"
    for text, words in (("a photo of a fox", "is not one of them"), ("crane", "is the name of the classes 2 and 3")):
        prompts.write_text(f"tench\n{text}\n")
        output = octavo("capture", stored, tmp_path / "a", "--prompts", prompts, "--device", "cpu", code=2)
        assert words in errors(output)[0]
        assert not (tmp_path / "a" / "units").exists()


class Texts(d.DiffusionPipeline):
    """A pipeline without a denoiser that takes prompts or embeddings."""

    def __init__(self, vae: d.AutoencoderKL) -> None:
        super().__init__()
        self.register_modules(vae=vae)

    def __call__(self, prompt, prompt_embeds=None, negative_prompt_embeds=None, generator=None):  # type: ignore[no-untyped-def]
        return prompt


def test_embeddings_stand_for_the_prompt_and_their_rows_for_prompts():
    pipe, prompts = Texts(autoencoder(4)), ["a", "b"]

    def arguments(rows: int, names: tuple[str, ...] = ("prompt_embeds",)) -> dict[str, object]:
        values = {name: torch.arange(rows * 6.0).view(rows, 3, 2) for name in names}
        return call_arguments(pipe, Family("x"), RunSettings(arguments=values), prompts)

    for rows, first in ((1, 0.0), (2, 6.0)):
        kwargs = prompt_arguments(pipe, "b", arguments(rows, ("prompt_embeds", "negative_prompt_embeds")))
        assert kwargs["prompt"] is None
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            assert (kwargs[name].shape, float(kwargs[name].flatten()[0])) == ((1, 3, 2), first)
    refused(lambda: arguments(3), 2, "prompt_embeds: has 3 rows for 2 prompts. Give one row, or one for each")
    assert prompt_arguments(pipe, "b", arguments(1, ("negative_prompt_embeds",)))["prompt"] == "b"
    assert "gets the same embeddings for all prompts" in str(note_on_prompts(pipe, arguments(1)))
    assert note_on_prompts(pipe, arguments(2)) is None


def test_a_pipeline_without_prompts_says_what_a_line_is_to_it(tmp_path):
    unet = d.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    d.DDPMPipeline(unet, d.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    output = octavo(
        "capture", tmp_path / "ddpm", tmp_path / "a", "--prompts", tmp_path / "p.txt", "--steps", 1, "--device", "cpu"
    )
    assert "DDPMPipeline takes no prompt: each prompt only sets the seed of the noise" in output
    first, second = (call.kwargs or call.args for call in Capture.open(tmp_path / "a").calls())
    assert str(first) != str(second)
