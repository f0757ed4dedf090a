"""Measures the error of each head of each attention module, in every type of quantized attention, while the float model
runs on a few calls."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from octavo.capture.errors import NumbersError
from octavo.capture.ranks import ALONE, Ranks

from ..replay.calls import Call, evaluating, run
from ..replay.sqnr import Power
from .calling import attention_passed_to
from .inputs import Inputs, attended
from .kinds import KINDS, Facts
from .names import ATTENTION_TYPES
from .rotations import NONE, kind_of

# query rows of a call that are measured: 32 rows of 8 calls give the SQNR of each head of the bundled pipeline within
# 1.2 dB (bench/attention_types.py), and the difference falls with the root of their number
_ROWS = 256
_NUMBERS = 1 << 24  # numbers of a tensor that are computed at once: 64 MiB in float32


@dataclass(frozen=True)
class AttentionRow:
    """The error of one attention module, with one type of attention.

    | field    | meaning                                                                                             |
    |----------|-----------------------------------------------------------------------------------------------------|
    | module   | name of the module that calls attention                                                             |
    | type     | name of the type, one of ATTENTION_TYPES                                                            |
    | rotation | kind of the rotation of query and key: "none", or "hadamard" or "orthogonal" (`rotations`)          |
    | width    | number of channels of a head of query and key                                                       |
    | heads    | SQNR in dB of the output of each head, over all measured calls; None where there is no error        |
    | refusal  | reason why the consumer would not compute this module so; None if it would                          |
    """

    module: str
    type: str
    rotation: str
    width: int
    heads: tuple[float | None, ...]
    refusal: str | None

    @property
    def worst_head(self) -> int | None:
        """The position of the head with the lowest SQNR; None if no head has an error."""
        known = [(sqnr, head) for head, sqnr in enumerate(self.heads) if sqnr is not None]
        return min(known)[1] if known else None

    @property
    def worst(self) -> float | None:
        """The lowest SQNR of a head, in dB; None if no head has an error."""
        return None if self.worst_head is None else self.heads[self.worst_head]

    @property
    def rotated(self) -> bool:
        """Whether query and key are rotated."""
        return self.rotation != NONE


@dataclass
class _Module:
    """The sums for one module: its facts, and for each type, with and without a rotation, the signal and noise of each
    head."""

    facts: Facts = field(default_factory=Facts)
    powers: dict[tuple[str, bool], list[Power]] = field(default_factory=dict)

    def join(self, other: "_Module") -> None:
        self.facts.join(other.facts)
        for key, powers in other.powers.items():
            mine = self.powers.setdefault(key, [])
            mine += [Power() for _ in powers[len(mine) :]]
            self.powers[key] = [a.plus(b) for a, b in zip(mine, [*powers, *(Power() for _ in mine)], strict=False)]


def attention_errors(
    model: nn.Module,
    calls: Iterable[Call],
    types: Sequence[str] = ATTENTION_TYPES,
    *,
    most_rows: int = _ROWS,
    ranks: Ranks = ALONE,
) -> list[AttentionRow]:
    """Runs the float `model` on `calls`, and returns the error of each attention module with each of `types`, first
    without and then with a rotation of query and key. The modules are in the order in which they first run.

    The signal is the output of attention in float32 from the query, key and value of the float model. The noise is the
    difference that their codes make, before the output is rounded to the dtype of the model. At most `most_rows` query
    rows of a call are measured, evenly spaced. Modules that compute attention in another way than by
    F.scaled_dot_product_attention are left out. Collective: every one of `ranks` calls this function.

    Raises NumbersError for a query, key or value that is not finite, MisfitError if the model fails on a call,
    DeviceError if memory runs out.
    """
    modules: dict[str, _Module] = {}

    def see(name: str, inputs: Inputs) -> None:
        for x in (inputs.query, inputs.key, inputs.value):
            if not x.isfinite().all():
                raise NumbersError(f"{name}: its attention has inputs that are not finite. Use --dtype float32.")
        _add(modules.setdefault(name, _Module()), inputs, types, most_rows)

    with evaluating(model), attention_passed_to(model, see):
        for position, call in enumerate(calls):
            if ranks.owns(position):
                run(model, call, position)
    joined: dict[str, _Module] = {}
    for part in ranks.gather(modules):
        for name, module in part.items():
            joined.setdefault(name, _Module()).join(module)
    return [row for name, module in joined.items() for row in _rows_of(name, module, types)]


def _rows_of(name: str, module: _Module, types: Sequence[str]) -> Iterable[AttentionRow]:
    for type in types:
        for rotated in (False, True):
            refusal = KINDS[type].refusal(module.facts)
            if KINDS[type].rotates and not rotated:
                refusal = refusal or f"{KINDS[type].consumer} always rotates query and key"
            rotation = kind_of(module.facts.width) if rotated else NONE
            heads = tuple(_decibels(power) for power in module.powers[type, rotated])
            yield AttentionRow(name, type, rotation, module.facts.width, heads, refusal)


def _decibels(power: Power) -> float | None:
    return None if power.sqnr is None else round(power.sqnr, 2)


def _add(module: _Module, inputs: Inputs, types: Sequence[str], most_rows: int) -> None:
    """Adds the errors of one call of attention to the sums of its module, some heads at a time."""
    module.facts.add(inputs)
    rows = evenly_spaced_rows(inputs, most_rows)
    batch, keys = inputs.key.shape[0], inputs.key.shape[-2]
    step = max(1, _NUMBERS // (batch * max(keys * len(rows), max(inputs.query.shape[-2], keys) * inputs.width)))
    for start in range(0, inputs.heads, step):
        part = inputs.of_heads(start, start + step)
        exact = attended(part.query[:, :, rows], part.key, part.value, part.bias_of(rows), part.scale)
        for type in types:
            for rotated in (False, True):
                powers = module.powers.setdefault((type, rotated), [])
                powers += [Power() for _ in range(start + exact.shape[1] - len(powers))]
                output = KINDS[type].run(part, rotated, rows)
                for head in range(exact.shape[1]):
                    powers[start + head].add(exact[:, head], output[:, head])


def evenly_spaced_rows(inputs: Inputs, most: int) -> Tensor:
    """Returns the positions of at most `most` evenly spaced query rows of `inputs`."""
    count = inputs.query.shape[-2]
    wanted = min(count, most)
    return (torch.arange(wanted, device=inputs.query.device) * 2 + 1) * count // (2 * wanted)


def quantized_attention(model: nn.Module, rows: Iterable[AttentionRow]) -> AbstractContextManager[None]:
    """Computes the attention of the modules of `rows` in the type and with the rotation of their row, inside the `with`
    statement, so that the error of the model's output can be measured."""
    chosen = {row.module: row for row in rows}

    def see(name: str, inputs: Inputs) -> Tensor | None:
        if name not in chosen:
            return None
        row = chosen[name]
        return KINDS[row.type].run(inputs, row.rotated, evenly_spaced_rows(inputs, inputs.query.shape[-2]))

    return attention_passed_to(model, see)
