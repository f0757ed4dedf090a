"""Checks that networks beside the denoiser can be quantized: a ControlNet, an image encoder, a prior, both stages of a
cascade."""

import pytest
from PIL import Image

from octavo.calibrate.report_file import read_report

from ..helpers.commands import octavo
from ..zoo.combined_pipelines import cascade_combined, kandinsky_combined, whole_controlnet
from ..zoo.pipelines import run
from ..zoo.walk import walk

SMALL = ("--height", 32, "--width", 32, "--steps", 2)
CASES = {
    "controlnet": (whole_controlnet, ("controlnet",)),
    "prior, image encoder and unet": (kandinsky_combined, ("prior_prior", "prior_image_encoder", "unet")),
}


@pytest.mark.parametrize("name", CASES)
def test_networks_beside_the_denoiser_go_the_whole_way(name, tmp_path):
    make, names = CASES[name]
    make().save_pretrained(tmp_path / "model")
    Image.new("RGB", (32, 32), (200, 40, 40)).save(tmp_path / "edges.png")
    (tmp_path / "prompts.txt").write_text("a cat")
    more = f"image={tmp_path / 'edges.png'}" if make is whole_controlnet else "prior_num_inference_steps=2"
    components = [word for component in names for word in ("--component", component)]
    prompts = ("--prompts", tmp_path / "prompts.txt")
    octavo("capture", tmp_path / "model", tmp_path / "c", *prompts, *SMALL, "--arg", more, *components)
    octavo("calibrate", tmp_path / "c", tmp_path / "o", "--accuracy", "plain")
    for component in names:
        place = tmp_path / "o" if len(names) == 1 else tmp_path / "o" / component
        report = read_report(place)
        assert report["component"] == component
        assert report["totals"]["quantized"] >= 6
        assert report["totals"]["output_sqnr"] > 25
    output = octavo("generate", tmp_path / "o", "a cat", *SMALL, "--arg", more, "-o", tmp_path / "cat.png")
    assert "32 x 32, 2 steps" in output


def test_both_stages_of_a_combined_cascade_run_in_integers(tmp_path):
    rows = walk(*cascade_combined(), run, tmp_path)
    assert {row.component for row in rows} == {"prior_prior", "decoder"}
    assert all(row.same and row.exact and row.quantized and row.sqnr > 25 for row in rows), rows
