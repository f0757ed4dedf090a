"""Converts the names of a model's tensors in diffusers to the native names that ComfyUI reads, and finds the layers
that are concatenated into one matrix under a native name.

Importing this module needs no torch.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from octavo.capture.errors import UsageError

from ..native import not_linear
from .families import FAMILIES
from .family import Family

if TYPE_CHECKING:
    from torch import nn

INSTEAD = "Use --format diffusers."


class Rows(NamedTuple):
    """Says how a tensor with a native name is made of tensors in diffusers. The tensors called `names` in diffusers are
    concatenated along the rows, in this order. If `swapped` is True, the first and the second half of the rows are then
    exchanged. If `flat` is True, the result is then flattened to one axis."""

    names: tuple[str, ...]
    swapped: bool = False
    flat: bool = False


class _Rule(NamedTuple):
    """A rule that renames tensors. `pattern` matches names in diffusers, and captures the number of the block, if there
    is one, and the rest of the name. `native` is the native name, with {} for the number of the block. A native tensor
    is the concatenation of `parts` tensors in diffusers; a tensor that this rule renames has the position `part` among
    them, counted from 0."""

    pattern: re.Pattern[str]
    native: str
    part: int
    parts: int

    @classmethod
    def of(cls, name: str, native: str, part: int = 0, parts: int = 1) -> "_Rule":
        """Makes the rule that renames `name`, a name in diffusers, to `native`; in both, {} stands for the number of
        the block. The native tensor is the concatenation of `parts` tensors in diffusers, among which a tensor called
        `name` has the position `part`, counted from 0."""
        pattern = re.escape(name).replace(re.escape("{}"), r"(\d+)")
        return cls(re.compile(pattern + r"((?:\..*)?)"), native, part, parts)


def refusal(kind: str, config: Mapping[str, Any]) -> str | None:
    """Returns the reason why the format `comfy` cannot hold a denoiser of the class `kind` with the configuration
    `config`, and what the user can do; None if it can."""
    if kind not in FAMILIES:
        known = ", ".join(dict.fromkeys(family.title for family in FAMILIES.values()))
        return f"has no table of ComfyUI's names for {kind}; it has one for {known}. {INSTEAD}"
    for key, value in FAMILIES[kind].only.items():
        if tuple(config.get(key, value)) != value:
            return f"has ComfyUI's names for {kind} with {key} {list(value)}, not {list(config[key])}. {INSTEAD}"
    return None


def family_of(model: "nn.Module") -> Family:
    """Returns the `Family` of a model, a table of the native names of its tensors. Raises UsageError for a model whose
    native names are not known."""
    config = getattr(model, "config", None)
    if reason := refusal(type(model).__name__, config if isinstance(config, Mapping) else {}):
        raise UsageError(f"format comfy: {reason}")
    return FAMILIES[type(model).__name__]


def native_names(names: Iterable[str], family: Family) -> dict[str, Rows]:
    """Returns a dict from native name to `Rows`, which names the tensors in diffusers that the native tensor is made
    of. `names` are diffusers' names of all tensors of a model, and `family` is the table of its native names.

    Raises UsageError for a tensor that has no native name. Also raises it if a native tensor is made of several
    tensors, and the model has only some of them.
    """
    found: dict[str, dict[int, str]] = {}
    rules: dict[str, tuple[_Rule, str]] = {}
    for name in names:
        rule, (*block, rest) = _rule_for(name, family)
        native = rule.native.format(*block) + rest
        found.setdefault(native, {})[rule.part] = name
        rules[native] = rule, "".join(block)
    last = max((block for _, block in rules.values()), key=lambda block: int(block or 0), default="")
    result = {}
    for native, parts in found.items():
        rule, number = rules[native]
        if len(parts) != rule.parts:
            fact = f"ComfyUI's {native} consists of {rule.parts} layers, but the model only has"
            fact = f"{fact} {', '.join(parts.values())}"
            raise UsageError(f"format comfy: {fact}. {INSTEAD}")
        swapped = rule.native in family.swapped or (rule.native in family.swapped_last and number == last)
        result[native] = Rows(tuple(parts[part] for part in sorted(parts)), swapped, rule.native in family.flat)
    return result


def _rule_for(name: str, family: Family) -> tuple[_Rule, tuple[str, ...]]:
    """Returns the rule of `family`, a model's table of native names, that renames the tensor `name`. Also returns the
    groups that the rule's pattern captures: the number of the block, if there is one, and the rest of the name. Raises
    UsageError if there is no such rule."""
    for rule in _rules(family.title):
        if match := rule.pattern.fullmatch(name):
            return rule, match.groups()
    raise UsageError(f"format comfy: ComfyUI has no name for the tensor {name} of {family.title}. {INSTEAD}")


@cache
def _rules(title: str) -> tuple[_Rule, ...]:
    """Returns the renaming rules of the `Family` (table of native names) with this `title`, sorted from the longest
    name in diffusers to the shortest, so that the first rule that fits a tensor is the right one."""
    family = next(family for family in FAMILIES.values() if family.title == title)
    rules: list[tuple[int, _Rule]] = []
    for native, sources in family.rules.items():
        names = (sources,) if isinstance(sources, str) else sources
        rules += [(len(name), _Rule.of(name, native, part, len(names))) for part, name in enumerate(names)]
    return tuple(rule for _, rule in sorted(rules, key=lambda item: -item[0]))


def together(model: "nn.Module") -> list[list[str]]:
    """Returns groups of layer names: the layers in a group, such as query, key and value, are concatenated into one
    matrix under a native name. Returns [] for a `model` of a class whose native names are not known."""
    family = FAMILIES.get(type(model).__name__)
    if family is None:
        return []
    rows = native_names(model.state_dict(), family).values()
    names = [[name.removesuffix(".weight") for name in row.names] for row in rows if row.names[0].endswith(".weight")]
    return [group for group in names if len(group) > 1]


def joined(model: "nn.Module", names: Collection[str]) -> list[tuple[str, ...]]:
    """Returns the groups of layers of `model` that ComfyUI's model has as one matrix, such as query, key and value.
    Only groups are returned whose layers are all among `names`, the layers that become 8-bit layers."""
    return [tuple(group) for group in together(model) if set(names).issuperset(group)]


def kept_float(model: "nn.Module", names: Collection[str], scheme: str) -> set[str]:
    """Returns the names of the layers that this format can hold only as float. `names` are the layers of `model` that
    would otherwise become 8-bit layers; their `scheme` makes no difference. The result contains the convolutions among
    `names`, and the linear layers that are concatenated into one matrix with a layer that stays float."""
    convolutions = not_linear(model, names)
    integers = set(names) - convolutions
    parted = [group for group in together(model) if not integers.issuperset(group)]
    return convolutions | {name for group in parted for name in group if name in integers}
