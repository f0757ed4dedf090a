"""Folds batch norms into convolutions. In eval mode a batch norm scales and shifts each channel; the convolution before
it can do this with other weights and another bias.

    bn(conv(x)) = (w * x + b - mean) * s + beta        s = gamma / sqrt(var + eps)
                = (s w) * x + (b - mean) * s + beta

Here w and b are weight and bias of the convolution; mean, var, gamma, beta and eps are those of the batch norm. A run
of the model shows which convolution feeds only one batch norm. During the run every operation is observed, so it does
not matter how the modules are nested or written.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from octavo.capture.errors import UsageError

from ..layers.changes import change_of
from ..layers.install import names_of, replace
from ..plan import kind_of
from ..replay.calls import Call, evaluating, run
from ..replay.hooks import hooked

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # the batch norms that are folded; subclasses may compute something else
_TOLERANCE = 1e-4  # relative error of the output up to which float32 roundings explain it; more is another function


class Pair(NamedTuple):
    """The names of a convolution and of the batch norm that is the only reader of its output."""

    conv: str
    norm: str


class FoldedModel(NamedTuple):
    """A model in which the batch norms of `pairs` are folded into their convolutions. `warning`: why pairs that were
    found were not folded; "" if there is nothing to warn of."""

    model: nn.Module
    pairs: tuple[Pair, ...]
    warning: str = ""


def has_norms(model: nn.Module) -> bool:
    """Returns whether the model has batch norms with running statistics."""
    return any(has_statistics(module) for module in model.modules())


def has_statistics(module: nn.Module) -> bool:
    """Returns whether `module` is a batch norm with running statistics, which in eval mode scales and shifts each
    channel by fixed numbers."""
    return isinstance(module, NORMS) and type(module) in NORMS and module.running_mean is not None


def fold_norms(model: nn.Module, call: Call, *, changing: bool = False) -> FoldedModel:
    """Folds the model's batch norms into the convolutions before them, for eval mode.

    If `changing` is True, `model` itself is changed and returned; otherwise a copy. If there is nothing to fold,
    returns `model` as it is. `call` has to run every module of the model, because its run shows which operations read
    the output of a convolution. If the model's output for `call` differs after folding, nothing is folded and the
    result has a warning.

    Raises UsageError for a model that cannot be copied, MisfitError for a call that does not fit the model, and
    DeviceError when memory runs out.
    """
    pairs = pairs_of(model, call) if has_norms(model) else ()
    if not pairs:
        return FoldedModel(model, ())
    folded = model if changing else _copy(model)
    with evaluating(folded):
        before = run(folded, call, 0)
        undo = _fold(folded, pairs)
        try:
            unchanged = _close(before, run(folded, call, 0))
        except Exception:  # the model's code accesses a batch norm that is gone
            unchanged = False
    if unchanged:
        return FoldedModel(folded, pairs)
    for name, module in undo:
        replace(folded, name, module)
    return FoldedModel(model, (), "batch norms: folding them would change the model's output; they are not folded.")


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        fact = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"{type(model).__name__}: cannot be copied to fold its batch norms ({fact}). "
            "Fold the batch norms yourself before the calibration."
        ) from error


def pairs_of(model: nn.Module, call: Call) -> tuple[Pair, ...]:
    """Runs `call`, and returns the pairs of convolution and batch norm that can be folded, in the order of the model's
    modules.

    A pair can be folded under three conditions. Each time the convolution runs, only the batch norm reads the
    convolution's output, and the batch norm has no other inputs. Nothing but the convolution reads the convolution's
    weight. Neither module has hooks.
    """
    watch = _Watch(model)
    with evaluating(model), watch.hooks(), watch:
        output = run(model, call, 0)
    pairs = watch.pairs()
    del output  # afterwards an output of a convolution is alive only if the model keeps a reference to it
    return pairs


class _Output(NamedTuple):
    """One output of the convolution named `conv`; `alive` is a weak reference to this tensor. `readers` has an entry
    for each operation that read the output: the name of a batch norm, or None for any other operation."""

    conv: str
    alive: "weakref.ref[Tensor]"  # returns the output while it is alive, else None
    readers: list[str | None]  # the name of the batch norm for each read; None for another reader


class _Watch(TorchDispatchMode):
    """Observes all operations, and records what reads the outputs and the weights of convolutions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._convs = {n: m for n, m in model.named_modules() if kind_of(m) is nn.Conv2d and not change_of(m)}
        self._norms = {n: m for n, m in model.named_modules() if has_statistics(m) and not _hooked(m)}
        self._weights = {id(conv.weight): name for name, conv in self._convs.items()}
        self._inside: list[str] = []
        self._outputs: list[_Output] = []
        self._live: dict[int, _Output] = {}
        self._reads: Counter[str] = Counter()  # by convolution: how often its weight was read
        # by batch norm: how often its input came from each convolution; None: from something else
        self._sources: dict[str, Counter[str | None]] = {name: Counter() for name in self._norms}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                if name := self._weights.get(id(value)):
                    self._reads[name] += 1
                if (output := self._of(value)) is not None:
                    output.readers.append(self._inside[-1] if self._inside else None)
        return func(*args, **kwargs)

    def _of(self, value: Tensor) -> _Output | None:
        output = self._live.get(id(value))
        return output if output is not None and output.alive() is value else None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Installs the hooks that record which convolutions and batch norms run, and with which tensors, inside the
        `with` statement."""
        recorders = {name: self._records_output(name) for name in self._convs}
        entering = {name: self._enters(name) for name in self._norms}
        leaving = dict.fromkeys(self._norms, self._leaves)
        with hooked(self._model, after=recorders), hooked(self._model, entering, leaving, always_call=True):
            yield

    def _records_output(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            convolved = _Output(name, weakref.ref(output), [])
            self._outputs.append(convolved)
            self._live[id(output)] = convolved

        return record

    def _enters(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = next((argument for argument in (*args, *kwargs.values()) if isinstance(argument, Tensor)), None)
            output = None if x is None else self._of(x)
            self._sources[name][None if output is None else output.conv] += 1
            self._inside.append(name)

        return enter

    def _leaves(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._inside.pop()

    def pairs(self) -> tuple[Pair, ...]:
        """Returns the pairs of a convolution and a batch norm that can be folded into one convolution, according to the
        recorded reads of outputs and weights."""
        pairs = []
        for name in self._convs:
            outputs = [output for output in self._outputs if output.conv == name]
            readers = {reader for output in outputs for reader in output.readers}
            if len(readers) != 1 or any(len(output.readers) != 1 or output.alive() is not None for output in outputs):
                continue
            norm = next(iter(readers))
            if norm is None or self._reads[name] != len(outputs):
                continue
            if self._sources[norm] == {name: len(outputs)}:
                pairs.append(Pair(name, norm))
        return tuple(pairs)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _fold(model: nn.Module, pairs: tuple[Pair, ...]) -> list[tuple[str, nn.Module]]:
    """Folds the batch norm of each pair into its convolution. Returns the modules that were replaced, with their names,
    to undo the folding."""
    names, before = names_of(model), []
    for pair in pairs:
        conv, norm = model.get_submodule(pair.conv), model.get_submodule(pair.norm)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, NORMS)
        for name, replacement in ((pair.conv, merged(conv, norm)), (pair.norm, nn.Identity())):
            before += [(alias, model.get_submodule(alias)) for alias in names[name]]
            for alias in names[name]:
                replace(model, alias, replacement.train(model.training))
    return before


def merged(conv: nn.Conv2d, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> nn.Conv2d:
    """Returns a convolution with a bias that computes what `conv` and then `norm` compute in eval mode."""
    convolution = copy.deepcopy(conv)
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("the batch norm has no running statistics")
    scale = (var.double() + norm.eps).rsqrt()
    bias = mean.double().neg()
    if conv.bias is not None:
        bias += conv.bias.detach().double()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    bias = bias * scale
    if norm.affine:
        bias = bias + norm.bias.detach().double()
    weight = conv.weight.detach().double() * scale.view(-1, 1, 1, 1)
    trained = conv.weight.requires_grad
    convolution.weight = nn.Parameter(weight.to(conv.weight.dtype), trained)
    convolution.bias = nn.Parameter(bias.to(conv.weight.dtype), trained)
    return convolution


def _close(before: Any, after: Any) -> bool:
    """Returns whether two outputs of a model, `before` and `after`, are equal up to rounding: for each floating-point
    tensor, norm(after - before) <= t * norm(before), where t is the larger of 1e-4 and 64 times the eps of the
    dtype."""
    pairs = list(zip(tree_leaves(before), tree_leaves(after), strict=True))
    for old, new in pairs:
        if isinstance(old, Tensor) and old.is_floating_point():
            tolerance = max(_TOLERANCE, 64 * torch.finfo(old.dtype).eps)
            if old.shape != new.shape or not float((new - old).norm()) <= tolerance * float(old.norm()):
                return False
    return True
