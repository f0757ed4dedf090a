"""The survey: what is held out, what is kept, and which layers are given the same input."""

import pytest
import torch
from torch import nn

from octavo.calibrate.observers.row_sample import Sample
from octavo.calibrate.observers.survey import Survey, survey_of
from octavo.calibrate.replay.current_call import CurrentCall
from octavo.calibrate.replay.hooks import observe

from ...zoo.hard_sd3 import hard, prompts
from ...zoo.toy import Call, calls, toy


def survey_inputs(model: nn.Module, samples: list) -> tuple[dict[str, Survey], CurrentCall]:
    """The surveys of all linears of a model."""
    current = CurrentCall(model)
    surveys = {name: Survey(current, name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    observe(model, surveys, current.tracked(samples))
    return surveys, current


def test_every_fourth_prompt_is_held_out_whole():
    samples = prompts(units=9, steps=3)
    model = hard(outliers=0)
    current = CurrentCall(model)
    held = {(call.unit, current.held_out) for call in current.tracked(samples)}
    assert held == {(unit, unit in (3, 7)) for unit in range(9)}
    assert current.training == [at for at, call in enumerate(samples) if call.unit not in (3, 7)]
    assert current.levels == {at: float(call.kwargs["timestep"][0]) for at, call in enumerate(samples)}
    assert current.units == [call.unit for call in samples]
    assert current.samples == 2 * current.count == 2 * len(samples)


def test_calls_of_no_prompt_are_held_out_by_their_place_and_few_calls_not_at_all():
    model = toy()
    current = CurrentCall(model)
    assert [current.held_out for _ in current.tracked(calls(9))] == [at % 4 == 3 for at in range(9)]
    survey = survey_inputs(model, calls(3))[0]["blocks.0.up"]
    assert not survey.has_held_out
    assert torch.equal(survey.fit_channels.high, survey.all.high)
    assert len(survey.judge_sample.rows) > 0  # there is nothing else to judge by


def test_what_is_judged_on_was_not_fitted():
    ordinary, held = torch.rand(6, 4, 8), torch.rand(2, 4, 8) + 10
    model = nn.Sequential(nn.Linear(8, 2))
    order = [*ordinary[:3], held[0], *ordinary[3:], held[1]]
    survey = survey_inputs(model, [Call((x,), {}) for x in order])[0]["0"]
    assert survey.has_held_out
    assert float(survey.fit_channels.high.max()) < 1 < 10 < float(survey.judge_sample.rows.min())
    assert float(survey.all.high.max()) > 10


def test_layers_that_are_given_one_tensor_have_one_leader():
    surveys, _ = survey_inputs(hard(outliers=0), prompts(4, 1))
    block = "transformer_blocks.0."
    query, key, value = (surveys[f"{block}attn.{leaf}"] for leaf in ("to_q", "to_k", "to_v"))
    assert query.leader == key.leader == value.leader
    context = surveys[f"{block}attn.add_q_proj"]
    assert query.leader != context.leader == context.name
    assert surveys[f"{block}attn.to_out.0"].leader != query.leader


def test_a_layer_that_once_heard_something_of_its_own_leads_itself():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, apart: bool) -> torch.Tensor:
            return self.one(x) + self.other(x + 1 if apart else x)

    together = [Call((torch.randn(9, 4), False), {}) for _ in range(3)]
    surveys, _ = survey_inputs(Two(), together)
    assert surveys["other"].leader == "one"
    surveys, _ = survey_inputs(Two(), [*together, Call((torch.randn(9, 4), True), {})])
    assert surveys["other"].leader == "other"


def test_tokens_and_rows_of_a_modulation_are_told_apart():
    surveys, _ = survey_inputs(hard(outliers=0), prompts(4, 1))
    rows = {name for name, survey in surveys.items() if survey.has_input and not survey.has_tokens}
    assert {name for name in surveys if name.endswith(".linear")} <= rows
    assert not [name for name in rows if ".attn." in name or ".ff" in name]


@pytest.mark.parametrize("tensors", [1, 63, 64, 65, 1000])
def test_a_sample_is_bounded_and_spread_over_all_it_was_given(tensors):
    sample = Sample()
    for at in range(tensors):
        sample.add(torch.full((8, 3), float(at)), float(at), (at, 0))
    assert min(tensors * 8, 256) <= len(sample.rows) <= 512
    assert torch.equal(sample.levels, sample.rows[:, 0])
    kept = sample.rows[:, 0].unique()
    assert kept[0] == 0
    assert kept[-1] >= 0.95 * (tensors - 1)
    assert float(kept.diff().max() if len(kept) > 1 else 0) <= tensors / 16 + 1


def test_noise_levels_of_a_sample_are_known_where_all_calls_have_one():
    sample = Sample()
    assert not sample
    sample.add(torch.ones(2, 3), 5.0, (0, 0))
    assert torch.equal(sample.levels, torch.full((2,), 5.0))
    sample.add(torch.ones(1, 3), None, (1, 0))
    assert sample.levels is None


def test_what_is_not_finite_is_refused_and_an_empty_survey_says_so():
    for x in (torch.zeros(0, 3), torch.tensor([[float("nan"), 1.0]])):
        with pytest.raises(ValueError):
            survey_of(x)
    survey = Survey(CurrentCall(toy()), "x")
    assert not survey.has_input
    with pytest.raises(ValueError, match="no input was observed"):
        survey.judge_sample  # noqa: B018


def test_a_large_input_gives_few_rows_from_all_of_it():
    x = torch.arange(1000.0).view(1, 1000, 1).expand(2, -1, 3)
    reading = survey_of(x)
    assert len(reading.rows) == 8
    assert torch.equal(reading.channels.high, torch.full((3,), 999.0))
    assert float(reading.rows.min()) == 0
    assert float(reading.rows.max()) > 700
