"""The plan: a list of all nn.Linear and nn.Conv2d of a model, with the scheme of each or the reason why it stays float.

Layers of other kinds with weights, such as nn.Conv1d, are listed too, as layers without an integer form.
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
}  # the methods that compute the output of a layer of this kind
FloatLayer = nn.Linear | nn.Conv2d
_UNSUPPORTED = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d, nn.Embedding, nn.MultiheadAttention, nn.Bilinear)
# patterns of names that diffusers keeps out of 8-bit storage in model classes without such a list of their own
# (diffusers.hooks.layerwise_casting)
_SKIPPED = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
# Patterns of layer names, with the reason why such layers stay float. The first are the layers that the filters of
# modelopt and deepcompressor keep float in diffusers' UNets; the second compute the modulation of norms, where 8 bits
# save nothing: they run on one row for each sample. skip_connection and emb_layers are the names of such layers in
# guided-diffusion's UNet.
_RESIDUAL = r"(^|\.)(conv_shortcut|shortcut_projection|skip_connection|downsamplers|upsamplers)(\.|$)"
_SENSITIVE = {
    _RESIDUAL: "receives the residual stream itself",
    r"(^|\.)(time_emb_proj|emb_layers|\w*_mod|\w*modulation\w*|(?i:adaln)\w*)(\.|$)": "modulation: one row per sample",
}
_KEPT_BY_USER = "kept float on request"  # the reason of a layer that the user's options keep float
_SAFE_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")  # module names that every checkpoint format can hold


@dataclass(frozen=True)
class Entry:
    """One layer of a plan: its `name` in the model, its class `kind` (such as "Linear"), the `shape` of its weight.
    `scheme`: how the layer becomes integers, such as "W8A8"; None for a layer that stays float because of `reason`.

    `bytes`: the size of the layer's parameters. `unsupported`: whether the layer has no integer form, because of its
    class, its dtype or a change such as a hook. `forced`: whether a layer that was to become integers stays float,
    because its inputs or its weights cannot be quantized.
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
    """Lists the layers of a model, with the scheme of each: `entries` has an Entry for each layer, in the order of the
    model's modules."""

    entries: tuple[Entry, ...]

    @property
    def quantized(self) -> tuple[str, ...]:
        """The names of the layers that become integers."""
        return tuple(entry.name for entry in self.entries if entry.scheme)

    def forced_float(self, reasons: Mapping[str, str]) -> "Plan":
        """Returns the plan in which further layers stay float because they cannot be quantized: the keys of `reasons`,
        a dict from layer name to the reason."""
        return self._without(reasons, forced=True)

    def kept_float(self, reasons: Mapping[str, str]) -> "Plan":
        """Returns the plan in which further layers stay float because the user's options say so: the keys of `reasons`,
        a dict from layer name to the reason."""
        return self._without(reasons, forced=False)

    def replaced(self, part: "Plan") -> "Plan":
        """Returns this plan with the entries of `part`, a plan for some of its layers, in place of the entries of these
        layers."""
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
    """Returns the plan for `model`: which layers get the scheme `scheme`, and which stay float for which reason.

    `keep_float`: patterns of layers that the user keeps float, whatever other patterns say. `quantize`: patterns of
    layers that are quantized although a default keeps them float. `defaults`: a dict from pattern to reason, for layers
    that the model's family keeps float; None if it has no family. Then layers outside repeated blocks stay float
    (`general_reason`), and those that match `more`, another such dict. A pattern is the name of a layer or of a module
    that contains layers, with wildcards * and ?: `blocks.0` matches all layers of that block. `option`: the user's name
    of `keep_float`, for messages.

    Raises UsageError for a pattern of `keep_float` or `quantize` that matches no layer, a plan without a quantized
    layer, a model whose layers are not plain float layers (`check_model`), and a model that is itself a layer;
    FileError for a module name that a checkpoint cannot hold.
    """
    if (alone := kind_of(model)) is not None:
        raise UsageError(f"model: is a single {KINDS[alone]} layer. Pass torch.nn.Sequential(layer).")
    check_model(model)
    for name in model.state_dict():
        if not _SAFE_NAME.fullmatch(name):
            raise FileError(
                f"{name!r}: a checkpoint cannot hold a tensor of this name. Rename its module in the model."
            )
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
    """Returns a text of the reasons why the layers of `entries` stay float, the most frequent reason first, each with
    its number of layers."""
    counts = Counter(entry.reason for entry in entries)
    return "; ".join(f"{count} layer{'s' * (count > 1)}: {reason}" for reason, count in counts.most_common())


def _nothing_left(kind: str, plan: Plan, option: str) -> str:
    """Returns the error message for a plan without a layer to quantize. `kind` is the class of the model, `option` the
    name under which the user gave the layers to keep float."""
    supported = [entry for entry in plan.entries if not entry.unsupported]
    if not plan.entries:
        return f"{kind}: has no nn.Linear or nn.Conv2d to quantize. Choose another model."
    reasons = reasons_of(supported or plan.entries)
    if any(entry.reason == _KEPT_BY_USER for entry in supported):
        return f"{option}: no layer is left to quantize ({reasons}). Keep fewer layers float."
    if supported:
        remedies = {"disable_names": "List in disable_names the layers that stay float: all others become integers"}
        remedy = remedies.get(option, "Choose some with octavo calibrate --quantize")
        return f"{kind}: no layer is left to quantize ({reasons}). {remedy}."
    dtypes = any(entry.kind in KINDS.values() for entry in plan.entries)
    remedy = "Load it in float32, float16 or bfloat16" if dtypes else "Choose another model"
    return f"{kind}: no layer can become integers ({reasons}). {remedy}."


def _ruled(model: nn.Module, entry: Entry, rules: "Rules", blocks: Sequence[str]) -> Entry:
    """Returns `entry` with a reason and without a scheme if one of `rules` keeps the layer float, otherwise `entry`
    unchanged. `blocks`: the names of the model's repeated blocks."""
    reason = _reason(model, entry, rules, blocks) if entry.scheme else None
    return replace(entry, scheme=None, reason=reason) if reason else entry


def _listed(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d, *_UNSUPPORTED))


def _entry(name: str, module: nn.Module, scheme: str) -> Entry:
    """Returns the entry of the layer `module` before any rule is applied: with `scheme` if the layer has an integer
    form, otherwise with the reason why it has none."""
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
    """Returns the class, nn.Linear or nn.Conv2d (KINDS), whose computation `module` has; None for other computations.

    A module of a subclass has that computation unless the subclass overrides it; parametrizations do not override it.
    Returns None for the output projection of nn.MultiheadAttention, because the attention reads the weight without
    calling the layer.
    """
    if type(module) in KINDS:
        return type(module)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    kinds = (kind for kind, names in _COMPUTING.items() if all(_inherits(module, kind, name) for name in names))
    return next(kinds, None)


def _inherits(module: nn.Module, kind: type[nn.Module], name: str) -> bool:
    return isinstance(module, kind) and getattr(type(module), name) is getattr(kind, name)


def matches(name: str, pattern: str) -> bool:
    """Returns whether `pattern` matches the layer `name` or a module that contains the layer."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def _check_patterns(patterns: Sequence[str], names: Sequence[str], option: str) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, 1, 0.0)
            remedy = f"The nearest name is '{near[0]}'" if near else "The model has no layer that it could match"
            raise UsageError(f"{option}: '{pattern}' matches no layer. {remedy}.")


class Rules(NamedTuple):
    """The patterns of layer names by which `make_plan` decides which layers stay float. `keep_float` and `quantize` are
    the user's patterns of layers to keep float or to quantize; a layer that matches both stays float. For all other
    layers, `defaults` decides, a dict from pattern to reason, for the layers that the model's family keeps float. If
    the model has no family, `defaults` is None; then the general rule (`general_reason`) decides, and `more`, a dict
    from pattern to reason, keeps further layers float."""

    keep_float: Sequence[str]
    quantize: Sequence[str]
    defaults: Mapping[str, str] | None
    more: Mapping[str, str]


def _reason(model: nn.Module, entry: Entry, rules: Rules, blocks: Sequence[str]) -> str | None:
    """Returns the reason why `rules` keep the layer of `entry` float; None if they let it be quantized. `blocks` are
    the names of the model's repeated blocks."""
    if any(matches(entry.name, pattern) for pattern in rules.keep_float):
        return _KEPT_BY_USER
    if any(matches(entry.name, pattern) for pattern in rules.quantize):
        return None
    if rules.defaults is None and (reason := general_reason(model, entry, blocks)):
        return reason
    patterns = rules.more if rules.defaults is None else rules.defaults
    return next((reason for pattern, reason in patterns.items() if matches(entry.name, pattern)), None)


def block_names(model: nn.Module) -> list[str]:
    """Returns the names of a model's repeated blocks: the members of its outermost nn.ModuleLists. Members that contain
    no other modules, such as single layers, are left out.

    Returns [] if no block contains a linear layer, because the stages of a convolutional network do not count as
    blocks.
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
    """Returns the reason why the layer of `entry` stays float under the general rule, for models without defaults of a
    family; None for a layer to be quantized.

    In a model with repeated blocks, whose names are `blocks`, the rule keeps float all layers outside blocks, and the
    layers inside that are known to be sensitive to 8 bits. In any model it keeps float the layers that the model's
    class lists in diffusers' attributes `_skip_layerwise_casting_patterns` and `_keep_in_fp32_modules`. If the class
    has no `_skip_layerwise_casting_patterns`, and the model has blocks, diffusers' default patterns apply instead.
    """
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
    """Returns the float layer `name` of `model`."""
    module = model.get_submodule(name)
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    return module


def groups_of(module: nn.Module) -> int:
    """Returns the number of groups of `module`, a convolution; 1 for other layers."""
    return module.groups if isinstance(module, nn.Conv2d) else 1


def named(model: nn.Module, entries: Plan) -> Iterator[tuple[Entry, FloatLayer]]:
    """Yields (entry, float layer) for each of `entries` whose layer becomes integers."""
    for entry in entries.entries:
        if entry.scheme:
            yield entry, layer_at(model, entry.name)
