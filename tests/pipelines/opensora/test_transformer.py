"""Checks STDiT3 against a slow implementation of its description, and the properties that the rest of Octavo needs."""

import inspect
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from torch import nn

from octavo.pipelines.opensora import KEEP_FLOAT, STDiT3

from ...helpers import opensora_oracle
from ...helpers.refusals import refused
from ...zoo.opensora import tiny_transformer

SIZES = {"fps": [24.0], "height": [240.0], "width": [426.0]}


def call(model: STDiT3, latents: tuple[int, int, int] = (3, 4, 6), rows: int = 2, **changes: Any) -> tuple[tuple, dict]:
    """Returns the arguments of one forward call. `changes` replace keyword arguments; None removes one."""
    generator = torch.Generator().manual_seed(7)
    config = model.config
    x = torch.randn(rows, config["in_channels"], *latents, generator=generator)
    y = torch.randn(rows, 1, config["model_max_length"], config["caption_channels"], generator=generator)
    kwargs = {name: torch.tensor(value) for name, value in SIZES.items()} | changes
    return (x, torch.tensor([873.71, 12.5, 400.0, 999.0][:rows]), y), {k: v for k, v in kwargs.items() if v is not None}


def both(model: STDiT3, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model(*args, **kwargs), opensora_oracle.forward(model.state_dict(), dict(model.config), *args, **kwargs)


def prefix(*lengths: int) -> torch.Tensor:
    return (torch.arange(20) < torch.tensor(lengths)[:, None]).long()


HOLES = torch.tensor([[1, 0, 1, 1] + [0] * 15 + [1], [0, 1, 0, 0] * 5])
FRAMES = torch.tensor([[True, False, True], [False, False, True]])

CASES: dict[str, tuple[dict, dict]] = {
    "no mask": ({}, {}),
    "one mask for both halves": ({}, {"mask": prefix(6)}),
    "captions of two lengths": ({}, {"mask": prefix(3, 17)}),
    "masks with holes": ({}, {"mask": HOLES}),
    "boolean mask of four axes": ({}, {"mask": HOLES.bool()[:, None, None]}),
    "two masks, four rows": ({}, {"mask": prefix(5, 9), "rows": 4, "fps": torch.tensor([8.0, 30.0])}),
    "clean frames": ({}, {"x_mask": FRAMES, "mask": prefix(4)}),
    "all frames active": ({}, {"x_mask": torch.ones(2, 3, dtype=torch.bool)}),
    "odd sizes": ({}, {"latents": (2, 5, 7)}),
    "an image": ({}, {"latents": (1, 6, 4), "fps": torch.tensor([120])}),
    "patches in time": ({"patch_size": (2, 2, 3)}, {"latents": (5, 5, 7), "x_mask": FRAMES}),
    "no qk norm": ({"qk_norm": False}, {"mask": prefix(2)}),
    "no sigma": ({"pred_sigma": False, "in_channels": 3}, {}),
    "narrow perceptron": ({"mlp_ratio": 1.3}, {}),
    "other base size": ({"input_sq_size": 256}, {"height": torch.tensor([480]), "width": torch.tensor([854, 20])}),
    "one wide head": ({"num_heads": 1}, {}),
}


@pytest.mark.parametrize(("config", "changes"), CASES.values(), ids=CASES.keys())
def test_forward_is_the_described_one(config: dict, changes: dict) -> None:
    model = tiny_transformer(**config)
    got, want = both(model, *call(model, **changes))
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 5e-5 * max(1.0, float(want.abs().max()))


def test_bf16_rounds_where_the_description_rounds() -> None:
    model = tiny_transformer().to(torch.bfloat16)
    args, kwargs = call(model, (12, 2, 2), mask=prefix(3, 17))
    got, want = both(model, args, kwargs)
    exact = opensora_oracle.forward(
        {name: tensor.float() for name, tensor in model.state_dict().items()}, dict(model.config), *args, **kwargs
    )
    assert got.dtype == torch.float32
    assert (got - want).abs().mean() < 0.5 * (exact - want).abs().mean()


def test_bf16_rounds_the_time_first() -> None:
    model = tiny_transformer().to(torch.bfloat16)
    (x, _, y), kwargs = call(model)
    with torch.no_grad():
        outputs = [model(x, torch.full((2,), time), y, **kwargs) for time in (873.71, 872.0, 860.0)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_fp32(dtype: torch.dtype) -> None:
    model = tiny_transformer()
    args, kwargs = call(model, x_mask=FRAMES, mask=HOLES)
    with torch.no_grad():
        want = model(*args, **kwargs)
        got = model.to(dtype)(*args, **kwargs)
    assert got.dtype == torch.float32
    assert (got - want).abs().mean() < 0.15 * want.abs().mean()


def test_integer_times_are_times() -> None:
    model = tiny_transformer()
    (x, _, y), kwargs = call(model)
    with torch.no_grad():
        assert torch.equal(
            model(x, torch.tensor([7, 900]), y, **kwargs), model(x, torch.tensor([7.0, 900.0]), y, **kwargs)
        )


def test_padding_of_other_samples_changes_nothing() -> None:
    model = tiny_transformer()
    (x, t, y), kwargs = call(model, mask=prefix(3, 17))
    with torch.no_grad():
        together = model(x, t, y, **kwargs)
        alone = model(x[:1], t[:1], y[:1], **{**kwargs, "mask": prefix(3)})
    assert (together[:1] - alone).abs().max() < 1e-5


def test_a_sample_without_caption_tokens_stays_finite() -> None:
    model = tiny_transformer()
    with torch.no_grad():
        for mask in (prefix(0, 5), prefix(0, 0)):
            args, kwargs = call(model, mask=mask)
            assert model(*args, **kwargs).isfinite().all()


def test_packed_captions_need_no_embedder() -> None:
    model = tiny_transformer()
    (x, t, y), kwargs = call(model, mask=HOLES)
    packing = tiny_transformer(skip_y_embedder=True)
    packing.load_state_dict(model.state_dict())
    with torch.no_grad():
        packed = model.y_embedder(y)[:, 0][HOLES != 0][None]
        want = model(x, t, y, **kwargs)
        for lengths in (HOLES.sum(1), HOLES.sum(1).tolist()):
            assert (packing(x, t, packed, **{**kwargs, "mask": lengths}) - want).abs().max() < 1e-5


def test_the_inputs_are_left_as_they_were() -> None:
    model = tiny_transformer()
    args, kwargs = call(model, (2, 5, 7), mask=HOLES, x_mask=FRAMES[:, :2])
    before = [t.clone() for t in (*args, *kwargs.values())]
    with torch.no_grad():
        model(*args, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(before, (*args, *kwargs.values()), strict=True))


def test_gradients_reach_every_parameter_of_the_blocks() -> None:
    model = tiny_transformer()
    args, kwargs = call(model, mask=prefix(3, 17), x_mask=FRAMES)
    model(*args, **kwargs).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n != "rope.freqs")
    assert not model.rope.freqs.requires_grad


def test_hooks_see_every_argument_and_bind_names_it() -> None:
    model = tiny_transformer()
    args, kwargs = call(model, mask=prefix(3), num_frames=torch.tensor([51.0]), ar=torch.tensor([0.56]))
    arguments: list[dict] = []

    def hook(module: nn.Module, a: tuple, k: dict) -> None:
        arguments.append(inspect.signature(module.forward).bind(*a, **k).arguments)

    with model.register_forward_pre_hook(hook, with_kwargs=True), torch.no_grad():
        model(*args, **kwargs)
    assert set(arguments[0]) == {"x", "timestep", "y", "mask", "fps", "height", "width", "ignored"}
    assert set(arguments[0]["ignored"]) == {"num_frames", "ar"}


def test_sizes_left_out_are_named() -> None:
    model = tiny_transformer()
    args, kwargs = call(model, fps=None)
    refused(lambda: model(*args, **kwargs), 2, "fps")


def test_heads_that_do_not_divide_are_refused() -> None:
    refused(lambda: STDiT3(hidden_size=36, num_heads=4, depth=1), 4, "hidden_size: 36")


def xl() -> STDiT3:
    with torch.device("meta"):
        return STDiT3()


def test_the_official_model_has_its_973_tensors() -> None:
    model = xl()
    state = model.state_dict()
    assert len(state) == 973
    assert sum(tensor.numel() for tensor in state.values()) == 1_208_872_772
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["rope.freqs"] == (36,)
    assert shapes["x_embedder.proj.weight"] == (1152, 4, 1, 2, 2)
    assert shapes["y_embedder.y_embedding"] == (300, 4096)
    assert shapes["temporal_blocks.27.attn.q_norm.weight"] == (72,)
    assert shapes["spatial_blocks.0.cross_attn.kv_linear.weight"] == (2304, 1152)
    assert shapes["final_layer.linear.weight"] == (32, 1152)


def test_what_stays_float_leaves_the_392_linears_of_the_blocks() -> None:
    linears = {name: m for name, m in xl().named_modules() if isinstance(m, nn.Linear)}
    chosen = {n: m for n, m in linears.items() if not any(fnmatch(n, pattern) for pattern in KEEP_FLOAT)}
    assert len(linears) == 400
    assert len(chosen) == 392
    assert all("_blocks." in name for name in chosen)
    assert sum(m.weight.numel() for m in chosen.values()) == 1_189_085_184
    assert all(m.bias is not None for m in linears.values())
