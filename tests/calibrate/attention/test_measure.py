"""The error of each head is attributed to the module that calls attention, and a bound chooses the types."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.calibrate.attention.choice import attention_section, attention_types, chosen_rows
from octavo.calibrate.attention.inputs import Inputs
from octavo.calibrate.attention.kinds import KINDS, Facts
from octavo.calibrate.attention.measure import AttentionRow, attention_errors, quantized_attention
from octavo.calibrate.attention.names import ASCEND, ATTENTION_TYPES, COMFY_INT8, FP8, MXFP8
from octavo.calibrate.replay.sqnr import outputs
from octavo.capture.errors import MisfitError, NumbersError
from octavo.capture.ranks import Ranks

from ...zoo.pipelines import make
from ...zoo.toy import Call

HEADS, WIDTH = 3, 16


class Attention(nn.Module):
    """Attention of some tokens on others, with a linear for the query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)

    def forward(self, x: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            y.chunk(3, -1)[index].unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
            for index, y in enumerate((self.qkv(x), self.qkv(other), self.qkv(other)))
        )
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """A self-attention and a cross-attention, which raise an error on request."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None, fail: bool = False) -> Tensor:
        x = x + self.attn1(x, x, None)
        if fail:
            raise ValueError("no")
        return x + self.attn2(x, text, mask)


def model_and_calls(count: int = 2, batch: int = 1, **more: Any) -> tuple[nn.Module, list[Call]]:
    torch.manual_seed(0)
    model = Model().eval().requires_grad_(False)
    calls = [
        Call((), {"x": torch.randn(batch, 20, HEADS * WIDTH), "text": torch.randn(batch, 7, HEADS * WIDTH), **more})
        for _ in range(count)
    ]
    return model, calls


def test_each_module_has_a_row_for_each_type_and_rotation():
    model, calls = model_and_calls()
    rows = attention_errors(model, calls)
    assert [(row.module, row.type, row.rotation) for row in rows] == [
        (module, type, rotation)
        for module in ("attn1", "attn2")
        for type in ATTENTION_TYPES
        for rotation in ("none", "hadamard")
    ]
    for row in rows:
        assert (row.width, len(row.heads)) == (WIDTH, HEADS)
        assert row.worst == min(row.heads) == row.heads[row.worst_head]
        assert 20 < row.worst < 70
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_error_is_that_of_the_module_s_output_over_all_calls():
    model, calls = model_and_calls()
    row = next(row for row in attention_errors(model, calls) if row.type == MXFP8 and row.rotated)
    signal, noise = torch.zeros(HEADS, dtype=torch.float64), torch.zeros(HEADS, dtype=torch.float64)
    for call in calls:
        x = call.kwargs["x"]
        exact = model.attn1(x, x, None)
        with quantized_attention(model, [row]):
            # the module itself is called, so that its name is known, by a forward of the model that stops after it
            coded = {}
            handle = model.attn1.register_forward_hook(lambda *args, coded=coded: coded.update(y=args[-1]))
            model(**call.kwargs)
            handle.remove()
        difference = (coded["y"] - exact).double().unflatten(-1, (HEADS, WIDTH))
        signal += exact.double().unflatten(-1, (HEADS, WIDTH)).square().sum((0, 1, 3))
        noise += difference.square().sum((0, 1, 3))
    assert row.heads == pytest.approx((10 * torch.log10(signal / noise)).tolist(), abs=0.02)


def test_refusals_name_what_the_kernels_do_not_take():
    def refusals(**more: Any) -> dict[tuple[str, str], str | None]:
        model, calls = model_and_calls(**more)
        return {(row.module, row.type): row.refusal for row in attention_errors(model, calls) if row.rotated}

    plain = refusals()
    assert [key for key, refusal in plain.items() if refusal] == [("attn2", MXFP8)]
    assert "cross-attention" in str(plain["attn2", MXFP8])
    batch = refusals(batch=2)
    assert "batch of 2" in str(batch["attn1", FP8])
    assert batch["attn1", MXFP8] is None
    masked = refusals(mask=torch.arange(7)[None] < 5)
    assert "mask" in str(masked["attn2", FP8])
    assert masked["attn2", COMFY_INT8] is None
    assert masked["attn1", FP8] is None


def test_kernels_refuse_other_scales_shared_heads_and_wide_heads():
    query, few = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    wide = torch.randn(1, 1, 5, 300)
    for args, kwargs, words in (
        ((query, query, query), {"scale": 1.0}, {FP8: "scale", MXFP8: "scale", COMFY_INT8: None}),
        ((query, few, few), {"enable_gqa": True}, {FP8: "shares", MXFP8: "shares", COMFY_INT8: None}),
        ((query, query, query[..., :4]), {}, {FP8: "width", MXFP8: "width", COMFY_INT8: "width"}),
        ((wide, wide, wide), {}, {FP8: None, MXFP8: None, COMFY_INT8: "300"}),
    ):
        facts = Facts()
        facts.add(Inputs.of(*args, **kwargs))
        for name, word in words.items():
            refusal = KINDS[name].refusal(facts)
            assert refusal is None if word is None else word in str(refusal)


def test_fewer_rows_estimate_the_error_of_all():
    model, calls = model_and_calls(count=8)
    every, some = attention_errors(model, calls, [MXFP8]), attention_errors(model, calls, [MXFP8], most_rows=10)
    for one, other in zip(every, some, strict=True):
        assert other.heads == pytest.approx(one.heads, abs=1.5)
        assert one.heads != other.heads


def test_ranks_share_the_calls_and_get_the_rows_of_one_process():
    class Half(Ranks):
        """One of two processes, which runs after the other."""

        parts: list[Any] = []  # noqa: RUF012

        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank, self.world = rank, 2

        def gather(self, value: Any) -> list[Any]:
            self.parts.append(value)
            return self.parts

    model, calls = model_and_calls(count=3)
    first = attention_errors(model, calls, ranks=Half(0))
    both = attention_errors(model, calls, ranks=Half(1))
    assert both == attention_errors(model, calls) != first


def test_an_error_in_the_model_leaves_no_trace():
    model, calls = model_and_calls(fail=True)
    with pytest.raises(MisfitError, match="no"):
        attention_errors(model, calls)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    x = torch.full((1, 2, HEADS * WIDTH), torch.nan)
    with pytest.raises(NumbersError, match="attn1"):
        attention_errors(model, [Call((x, x), {})])


@pytest.mark.parametrize(("name", "modules"), [("sd3", 2), ("flux", 2), ("wan22", 4)])
def test_attention_modules_of_diffusers_are_found(name, modules):
    pipe, arguments = make(name)
    calls: list[Call] = []
    with pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True
    ):
        pipe(**arguments | {"output_type": "latent"})
    rows = attention_errors(pipe.transformer, calls[:1], [FP8])
    names = list(dict.fromkeys(row.module for row in rows))
    assert len(names) == modules
    assert all(name.rpartition(".")[2].startswith("attn") for name in names)
    exact = outputs(pipe.transformer, calls[:1])[0][0]
    with quantized_attention(pipe.transformer, [row for row in rows if row.rotated]):
        coded = outputs(pipe.transformer, calls[:1])[0][0]
    assert coded.shape == exact.shape
    assert not torch.equal(coded, exact)


def row(module: str, type: str, rotation: str, *heads: float | None, refusal: str | None = None) -> AttentionRow:
    return AttentionRow(module, type, rotation, 8, heads, refusal)


ROWS = [
    row("a", FP8, "none", 45.0, 41.0),
    row("a", FP8, "hadamard", 43.0, 42.0),
    row("a", MXFP8, "none", 60.0, 30.0),
    row("a", COMFY_INT8, "hadamard", 50.0, 50.0),
    row("b", FP8, "none", 44.0, 44.0, refusal="no"),
    row("b", MXFP8, "none", 43.0, 43.0),
    row("b", MXFP8, "hadamard", 43.0, 43.0),
    row("c", FP8, "none", None, None),
]


def test_the_type_with_the_best_worst_head_above_the_bound_is_chosen():
    chosen = chosen_rows(ROWS, 40.0, ASCEND)
    assert {module: (row.type, row.rotation) for module, row in chosen.items()} == {
        "a": (FP8, "hadamard"), "b": (MXFP8, "none"), "c": (FP8, "none"),
    }  # fmt: skip
    assert attention_types(ROWS, 42.5, ASCEND) == {"b": MXFP8, "c": FP8}
    assert attention_types(ROWS, 40.0) == {"a": COMFY_INT8, "b": MXFP8, "c": FP8}


def test_the_section_of_the_report_is_plain_json():
    section = attention_section(ROWS, 3, 42.0, ASCEND)
    assert json.loads(json.dumps(section, allow_nan=False)) == section
    assert section["types"] == {"a": FP8, "b": MXFP8, "c": FP8}
    assert section["rows"][2] == {
        "module": "a", "type": MXFP8, "rotation": "none", "width": 8, "heads": [60.0, 30.0], "worst": 30.0,
        "worst_head": 1, "refusal": None,
    }  # fmt: skip
    assert section["rows"][-1]["worst"] is None
