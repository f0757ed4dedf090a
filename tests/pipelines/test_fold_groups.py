"""Checks that folding factors into a model keeps its output, its operations and its parameters."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.pipelines.family import Fold, Group
from octavo.pipelines.opensora.family import groups as stdit3_groups
from octavo.pipelines.sd3 import groups as sd3_groups

from ..zoo.folding import fold
from ..zoo.opensora import tiny_transformer
from .opensora.test_transformer import FRAMES, call, prefix

SIZES = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}  # fmt: skip
# Error relative to the largest output. Folding rounds each weight and each input once more, by at most the last bit.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
Case = tuple[nn.Module, Callable[[Any], list[Group]], tuple[Any, ...], dict[str, Any]]


def sd3(**config: Any) -> Case:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**SIZES, **config).eval()
    arguments = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([700.0, 20.0]),
        "return_dict": False,
    }
    return model, sd3_groups, (), arguments


def stdit3(**config: Any) -> Case:
    model = tiny_transformer(**config)
    more = {"x_mask": FRAMES} | ({} if config.get("skip_y_embedder") else {"mask": prefix(3, 17)})
    args, arguments = call(model, **more)
    if config.get("skip_y_embedder"):
        args = (*args[:2], torch.randn(1, 20, 32))
        arguments["mask"] = torch.tensor([3, 17])
    return model, stdit3_groups, args, arguments


CASES: dict[str, Callable[[], Case]] = {
    "sd3": sd3,
    "sd3.5, dual attention": lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "stdit3": stdit3,
    "stdit3, packed captions, no qk norm": lambda: stdit3(skip_y_embedder=True, qk_norm=False),
}
every = pytest.mark.parametrize("case", CASES)


class Operations(TorchDispatchMode):
    """Counts the torch operations that run inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def factors(model: nn.Module, groups: list[Group], seed: int = 0) -> list[tuple[Group, Tensor]]:
    """Returns the groups with random factors from 1/8 to 8."""
    generator = torch.Generator().manual_seed(seed)
    widths = [model.get_submodule(group.layers[0]).in_features for group in groups]
    return [
        (group, torch.exp2(6 * torch.rand(width, generator=generator) - 3))
        for group, width in zip(groups, widths, strict=True)
    ]


def output(model: nn.Module, args: Any, arguments: dict[str, Any]) -> Tensor:
    dtype = next(model.parameters()).dtype
    cast = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in (*args, *arguments.values())]
    named = dict(zip(arguments, cast[len(args) :], strict=True))
    with torch.no_grad():
        result = model(*cast[: len(args)], **named)
    return (result if isinstance(result, Tensor) else result[0]).double()


def moved(one: Tensor, other: Tensor) -> float:
    """Returns the largest difference divided by the largest value of `other`."""
    return float((one - other).abs().max() / other.abs().max())


@every
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_folding_keeps_the_output(case, dtype):
    model, groups, args, arguments = CASES[case]()
    model = model.to(dtype)
    before = output(model, args, arguments)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fold(model, factors(model, groups(model)))
    assert moved(output(model, args, arguments), before) < TOLERANCES[dtype]
    assert any(not torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@every
def test_no_operation_and_no_parameter_is_added(case):
    model, groups, args, arguments = CASES[case]()
    shapes = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    with Operations() as before:
        output(model, args, arguments)
    fold(model, factors(model, groups(model)))
    with Operations() as after:
        output(model, args, arguments)
    assert after.counts == before.counts
    assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == shapes


@every
def test_every_reachable_layer_of_the_blocks_is_divided_once(case):
    model, groups, _, _ = CASES[case]()
    fold_groups = groups(model)
    layers = [name for group in fold_groups for name in group.layers]
    assert len(set(layers)) == len(layers)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks." in name}
    # layers behind an activation function or the residual stream, and modulations
    behind = (".net.2", ".fc2", ".q_linear", ".linear")
    if model.config.get("skip_y_embedder"):
        behind = (*behind, ".kv_linear")
    assert {name for name in linears if not name.endswith(behind)} == set(layers)


@every
@pytest.mark.parametrize("index", range(4))
def test_each_layer_s_input_is_divided_by_the_factors(case, index):
    model, groups, args, arguments = CASES[case]()
    other = copy.deepcopy(model)
    group, by = factors(model, groups(model))[-index - 1]
    fold(other, [(group, by)])
    with inputs(model, group.layers) as before, inputs(other, group.layers) as after:
        output(model, args, arguments)
        output(other, args, arguments)
    for name in group.layers:
        torch.testing.assert_close(after[name] * by, before[name], rtol=1e-4, atol=1e-4)


@contextmanager
def inputs(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: tensors.update({name: args[0]}))
        for name in names
    ]
    yield tensors
    for hook in hooks:
        hook.remove()


def exchanged(group: Group) -> Group:
    """Returns the group with the positions of shift and scale exchanged."""
    starts = [target.start for target in group.folds]
    return group._replace(
        folds=tuple(target._replace(start=start) for target, start in zip(group.folds, starts[::-1], strict=True))
    )


def without_one(group: Group) -> Group:
    return group._replace(folds=tuple(target._replace(plus_one=False) for target in group.folds))


def but_the_last(group: Group) -> Group:
    return group._replace(folds=group.folds[:-1])


@every
@pytest.mark.parametrize("wrong", [exchanged, without_one, but_the_last])
def test_a_wrong_group_changes_the_output(case, wrong):
    model, groups, args, arguments = CASES[case]()
    candidates = [group for group in groups(model) if any(target.plus_one for target in group.folds)]
    before = output(model, args, arguments)
    fold(model, factors(model, [wrong(group) for group in candidates]))
    assert moved(output(model, args, arguments), before) > 1e-3


def test_the_last_block_of_sd3_makes_scale_before_shift():
    model, groups, _, _ = sd3()
    first, last = (
        next(group for group in groups(model) if f"transformer_blocks.{index}.attn.add_k_proj" in group.layers)
        for index in (0, 1)
    )
    assert [(target.start, target.plus_one) for target in first.folds] == [(0, False), (32, True)]
    assert [(target.start, target.plus_one) for target in last.folds] == [(32, False), (0, True)]


def test_a_norm_is_divided_whole():
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "next": nn.Linear(4, 3)})
    x, group = torch.randn(5, 4), Group(("next",), (Fold("norm"),))
    before = model["next"](model["norm"](x))
    fold(model, [(group, torch.tensor([0.25, 1.0, 3.0, 8.0]))])
    torch.testing.assert_close(model["next"](model["norm"](x)), before)
