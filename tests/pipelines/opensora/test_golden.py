"""Checks the recorded outputs: the transformer within 5e-5 in fp32, the sampler within 1e-4 of its largest value."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from octavo.pipelines.opensora import Conditions, RFlowScheduler, STDiT3, sample

DATA = Path(__file__).parents[2] / "data" / "opensora12"


def cases(*folders: str) -> list[Any]:
    pairs = [(folder, case) for folder in folders for case in json.loads((DATA / folder / "cases.json").read_text())]
    return [pytest.param(folder, case, id=case.get("name") or case["case"]["name"]) for folder, case in pairs]


@pytest.mark.parametrize(("folder", "case"), cases("variant", "small_qk"))
def test_the_transformer_gives_the_recorded_velocity(folder: str, case: dict) -> None:
    model = STDiT3(**json.loads((DATA / folder / "config.json").read_text())).eval()
    model.load_state_dict(load_file(DATA / folder / "state.safetensors"), strict=True)
    tensors = load_file(DATA / folder / "cases.safetensors")
    inputs = {name: tensors[f"{case['name']}/in/{name}"] for name in case["inputs"]}
    with torch.no_grad():
        out = model(inputs.pop("x"), inputs.pop("timestep"), inputs.pop("y"), **inputs)
    assert out.dtype == torch.float32
    assert (out - tensors[f"{case['name']}/out"]).abs().max() <= 5e-5


class LinearVelocity:
    """Replaces the transformer by a function linear in latents, time and text. The second half of its channels is
    junk."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, z: torch.Tensor, t: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        self.calls.append({"z": z, "t": t.double(), **kwargs})
        y, mask = kwargs["y"], kwargs["mask"]
        keep = mask.repeat(z.shape[0] // mask.shape[0], 1).float()[:, None, :, None]
        text = (y.float() * keep).sum((1, 2, 3)) / keep.sum((1, 2, 3)) / y.shape[-1]
        frames = torch.linspace(-1, 1, z.shape[2])[None, None, :, None, None]
        time = (t.float() / 1000).view(-1, 1, 1, 1, 1)
        velocity = 0.4 * z.float() - 0.9 * time + text.view(-1, 1, 1, 1, 1) + 0.1 * frames
        if "x_mask" in kwargs:
            velocity = torch.where(kwargs["x_mask"][:, None, :, None, None], velocity, 0.25 * velocity)
        return torch.cat([velocity, 1e3 + z.float()], 1)


def sampler_inputs(case: dict, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
    """Draws latents, arguments and frame mask with the seeds of the recording."""
    rows, dtype = case["n"], torch.bfloat16 if case.get("bf16") else torch.float32
    latents = torch.randn(rows, 4, case["T"], 3, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    height, width = case["hw"]
    values = {"height": height, "width": width, "num_frames": case["nf"], "ar": height / width, "fps": case["fps"]}
    arguments = {name: torch.full((rows,), value, dtype=dtype) for name, value in values.items()}
    text = torch.Generator().manual_seed(seed + 1)
    prompts, null = torch.randn(rows, 1, 9, 6, generator=text), torch.randn(1, 9, 6, generator=text)
    arguments["y"] = torch.cat([prompts, null.repeat(rows, 1, 1)[:, None]])
    arguments["mask"] = (torch.arange(9) < torch.tensor([[4], [7], [9]][:rows])).long()
    mask = case.get("mask")
    frame_mask = None if mask is None else torch.ones(case["T"]) if mask == "ones" else torch.tensor(mask)
    return latents, arguments, None if frame_mask is None else frame_mask.repeat(rows, 1)


@pytest.mark.parametrize(("folder", "case"), cases("rflow"))
def test_the_sampler_walks_the_recorded_path(folder: str, case: dict) -> None:
    want = {
        name.split("/")[1]: tensor
        for name, tensor in load_file(DATA / folder / "cases.safetensors").items()
        if name.startswith(case["case"]["name"] + "/")
    }
    params = case["params"]
    latents, arguments, frame_mask = sampler_inputs(case["case"], case["seed"])
    model = LinearVelocity()
    scheduler = RFlowScheduler(
        params["num_timesteps"], params["use_discrete_timesteps"], params["use_timestep_transform"]
    )
    torch.manual_seed(1234)
    conditions = Conditions(arguments, params["cfg_scale"], frame_mask)
    final = sample(model, scheduler, latents, conditions, params["num_sampling_steps"])
    assert len(model.calls) == case["calls"]
    assert (torch.stack([call["t"] for call in model.calls]) - want["timesteps"]).abs().max() <= 1e-2
    assert [str(call["z"].dtype) for call in model.calls] == case["z_dtype"]
    if "x_mask" in want:
        assert torch.equal(torch.stack([call["x_mask"] for call in model.calls]), want["x_mask"])
    else:
        assert "x_mask" not in model.calls[0]
    tolerance = 1e-4 * max(1.0, float(want["final"].abs().max()))
    assert (final.double() - want["final"]).abs().max() <= tolerance
