"""The plan: what becomes of every nn.Linear and nn.Conv2d of a model, and why.

Nothing is left out of it: a layer that stays float says for which reason, and so do the kinds of layers that have no
integer form here.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import NamedTuple

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from octavo.capture.errors import FileError, UsageError

from .given_model import check_model
from .layers.changes import change_of
from .layers.scheme import STORABLE

KINDS: dict[type[nn.Module], str] = {nn.Linear: "Linear", nn.Conv2d: "Conv2d"}
_COMPUTING = {
    nn.Linear: ("__call__", "forward"),
    nn.Conv2d: ("__call__", "forward", "_conv_forward"),
}  # the methods that say what a kind does
FloatLayer = nn.Linear | nn.Conv2d
_UNSUPPORTED = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d, nn.Embedding, nn.MultiheadAttention, nn.Bilinear)
# what diffusers keeps out of 8-bit storage in classes that list nothing themselves
_SKIPPED = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
# Parts of names. modelopt's and deepcompressor's filters keep these float in diffusers' UNets; those that make the
# modulation of norms run on one row for each sample.
_SENSITIVE = {
    r"(^|\.)(conv_shortcut|shortcut_projection|downsamplers|upsamplers)(\.|$)": "is given the residual stream itself",
    r"(^|\.)(time_emb_proj|\w*_mod|\w*modulation\w*|(?i:adaln)\w*)(\.|$)": "modulation: one row per sample",
}
_KEPT_BY_USER = "asked for"  # the reason of a layer that the user keeps float
_SAFE_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")


@dataclass(frozen=True)
class Entry:
    """One layer: its scheme ("W8A8", "W8A16"), or None and the reason why it stays float.

    `bytes` are those of its parameters. `unsupported`: its kind has no integer form. `forced`: it was to be quantized,
    and its data or its weights do not let it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    scheme: str | None
    reason: str = ""
    unsupported: bool = False
    forced: bool = False


@dataclass(frozen=True)
class Plan:
    """The entries in the order of the model's modules."""

    entries: tuple[Entry, ...]

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the layers that become integers."""
        return tuple(entry.name for entry in self.entries if entry.scheme)

    def forced_float(self, reasons: Mapping[str, str]) -> "Plan":
        """The plan in which the layers of `reasons` stay float too, though nobody asked for it."""
        return self._without(reasons, forced=True)

    def kept_float(self, reasons: Mapping[str, str]) -> "Plan":
        """The plan in which the layers of `reasons` stay float too, as was asked for."""
        return self._without(reasons, forced=False)

    def replaced(self, part: "Plan") -> "Plan":
        """The plan with the entries of `part` in the places of those of the same names."""
        new_entries = {entry.name: entry for entry in part.entries}
        return Plan(tuple(new_entries.get(entry.name, entry) for entry in self.entries))

    def _without(self, reasons: Mapping[str, str], forced: bool) -> "Plan":
        return Plan(
            tuple(
                replace(entry, scheme=None, reason=reasons[entry.name], forced=forced)
                if entry.name in reasons
                else entry
                for entry in self.entries
            )
        )


def make_plan(
    model: nn.Module,
    *,
    scheme: str = "W8A8",
    keep_float: Sequence[str] = (),
    defaults: Mapping[str, str] | None = None,
    more: Mapping[str, str] = MappingProxyType({}),
    quantize: Sequence[str] = (),
    option: str = "keep_float",
) -> Plan:
    """The plan for `model`.

    `keep_float` are patterns of layer names that the user wants float, `quantize` those of layers that no default keeps
    float; each has to match. `defaults` maps patterns to reasons, and need not match; None means the general rule
    (`general_reason`), and `more` beside it. A pattern is a name, a name with * and ?, or what stands above layers:
    `transformer_blocks.0` is all of that block.

    Raises UsageError for a pattern without a match or when nothing is left to quantize, and for a model whose layers
    are not plain float layers (`check_model`) or that is a layer itself; FileError for a name that no file should hold.
    """
    if (alone := kind_of(model)) is not None:
        raise UsageError(f"model: is a single {KINDS[alone]} layer. Give torch.nn.Sequential(layer).")
    check_model(model)
    for name in model.state_dict():
        if not _SAFE_NAME.fullmatch(name):
            raise FileError(f"{name!r}: not a name that a checkpoint can hold. Rename the module.")
    candidates = [_entry(name, module, scheme) for name, module in model.named_modules() if _listed(module)]
    names = [entry.name for entry in candidates if entry.scheme]
    _check_patterns(keep_float, [entry.name for entry in candidates], option)
    _check_patterns(quantize, names, "quantize")
    rules, blocks = Rules(keep_float, quantize, defaults, more), block_names(model)
    plan = Plan(tuple(_ruled(model, entry, rules, blocks) for entry in candidates))
    if not plan.quantized:
        raise UsageError(_nothing_left(type(model).__name__, plan, option))
    return plan


def reasons_of(entries: Iterable[Entry]) -> str:
    """The reasons why layers stay float, the most frequent first, with their numbers of layers."""
    counts = Counter(entry.reason for entry in entries)
    return "; ".join(f"{count} layer{'s' * (count > 1)}: {reason}" for reason, count in counts.most_common())


def _nothing_left(kind: str, plan: Plan, option: str) -> str:
    """The message for a plan without a layer to quantize."""
    supported = [entry for entry in plan.entries if not entry.unsupported]
    if not plan.entries:
        return f"{kind}: no nn.Linear or nn.Conv2d to quantize. Choose another model."
    reasons = reasons_of(supported or plan.entries)
    if any(entry.reason == _KEPT_BY_USER for entry in supported):
        return f"{option}: no layer is left to quantize ({reasons}). Keep fewer layers float."
    if supported:
        remedies = {"disable_names": "List in disable_names what has to stay float: all else becomes integers"}
        remedy = remedies.get(option, "Choose some with --quantize of octavo calibrate")
        return f"{kind}: no layer is left to quantize ({reasons}). {remedy}."
    dtypes = any(entry.kind in KINDS.values() for entry in plan.entries)
    remedy = "Give it in float32, float16 or bfloat16" if dtypes else "Choose another model"
    return f"{kind}: no layer can become integers ({reasons}). {remedy}."


def _ruled(model: nn.Module, entry: Entry, rules: "Rules", blocks: Sequence[str]) -> Entry:
    """The entry as the rules leave it: float with a reason, or as it was."""
    reason = _reason(model, entry, rules, blocks) if entry.scheme else None
    return replace(entry, scheme=None, reason=reason) if reason else entry


def _listed(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d, *_UNSUPPORTED))


def _entry(name: str, module: nn.Module, scheme: str) -> Entry:
    """The entry before any wish: with a scheme where there is an integer form."""
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if weight is not None else ()
    size = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    reason, supported_kind = "", kind_of(module)
    kind = type(module).__name__ if supported_kind is None else KINDS[supported_kind]
    if supported_kind is None:
        package = f"{type(module).__module__}." if kind in KINDS.values() else ""
        reason = f"{package}{kind} has no integer form"
    elif change := change_of(module):
        reason = change
    elif module.weight.dtype not in STORABLE:
        reason = f"{str(module.weight.dtype).removeprefix('torch.')} weight has no integer form"
    return Entry(name, kind, shape, size, None if reason else scheme, reason, unsupported=bool(reason))


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The kind of KINDS that computes what the class of `module` does: its own, or that of a subclass which does not
    change how it computes, as parametrizations do not. nn.MultiheadAttention reads its layer's weight itself."""
    if type(module) in KINDS:
        return type(module)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    kinds = (kind for kind, names in _COMPUTING.items() if all(_inherits(module, kind, name) for name in names))
    return next(kinds, None)


def _inherits(module: nn.Module, kind: type[nn.Module], name: str) -> bool:
    return isinstance(module, kind) and getattr(type(module), name) is getattr(kind, name)


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the name of a layer, matches it, or is or matches what stands above it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def _check_patterns(patterns: Sequence[str], names: Sequence[str], option: str) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, 1, 0.0)
            remedy = f"nearest: '{near[0]}'" if near else "the model has no such layers"
            raise UsageError(f"{option}: '{pattern}' matches no layer; {remedy}.")


class Rules(NamedTuple):
    """The wishes and defaults by which `make_plan` leaves layers float."""

    keep_float: Sequence[str]
    quantize: Sequence[str]
    defaults: Mapping[str, str] | None
    more: Mapping[str, str]


def _reason(model: nn.Module, entry: Entry, rules: Rules, blocks: Sequence[str]) -> str | None:
    if any(matches(entry.name, pattern) for pattern in rules.keep_float):
        return _KEPT_BY_USER
    if any(matches(entry.name, pattern) for pattern in rules.quantize):
        return None
    if rules.defaults is None and (reason := general_reason(model, entry, blocks)):
        return reason
    patterns = rules.more if rules.defaults is None else rules.defaults
    return next((reason for pattern, reason in patterns.items() if matches(entry.name, pattern)), None)


def block_names(model: nn.Module) -> list[str]:
    """The blocks a model is made of: members of the outermost nn.ModuleLists, where these have modules inside.

    None where no block has a linear: the stages of a convolutional network are no transformer's blocks.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(block + ".") for block in blocks):
            blocks |= {
                f"{name}.{index}": child for index, child in enumerate(module) if any(True for _ in child.children())
            }
    linear = any(isinstance(module, nn.Linear) for block in blocks.values() for module in block.modules())
    return list(blocks) if linear else []


def general_reason(model: nn.Module, entry: Entry, blocks: Sequence[str]) -> str | None:
    """Why a layer of a model nobody knows stays float: None for what is inside repeated blocks, except what diffusers
    itself keeps in a wider dtype and what is known to be sensitive. A model without blocks has all quantized."""
    if blocks and not any(entry.name.startswith(block + ".") for block in blocks):
        return "outside the repeated blocks"
    patterns = getattr(model, "_skip_layerwise_casting_patterns", None)
    for pattern in patterns or (_SKIPPED if blocks else ()):
        if re.search(pattern, entry.name):
            source = "its class" if patterns else "diffusers"
            return f"{source} keeps '{pattern}' out of 8-bit storage"
    for part in getattr(model, "_keep_in_fp32_modules", None) or ():
        if part in entry.name.split("."):
            return f"its class keeps '{part}' in float32"
    sensitive = _SENSITIVE.items() if blocks else ()
    return next((reason for pattern, reason in sensitive if re.search(pattern, entry.name)), None)


def layer_at(model: nn.Module, name: str) -> FloatLayer:
    """The float layer of that name."""
    module = model.get_submodule(name)
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    return module


def named(model: nn.Module, entries: Plan) -> Iterator[tuple[Entry, FloatLayer]]:
    """The layers of the plan that become integers, with their modules."""
    for entry in entries.entries:
        if entry.scheme:
            yield entry, layer_at(model, entry.name)
