"""Runs a model of repeated blocks with the weights of one block in memory at a time; block outputs are kept on disk.

The model's own forward runs, with stubs in place of its blocks. There is one stage for each block. In the stage of a
block, this block, called the frontier, is real: its weights are in memory. The stubs of earlier blocks return the
outputs that these blocks had in their own stages; the stub of the first later block ends the forward. So the operations
between blocks run as in the whole model. A sweep over the blocks reads each weight from disk once, however many calls
there are.

A stage reads from disk only the outputs that its block needs, mostly those of the block before. `rehearse` finds these
outputs. It runs the model once for each block X: the stub of X returns NaN, all other stubs return zeros, and the
blocks that receive NaN need the outputs of X. Outputs that no later stage needs are deleted; the stubs of their blocks
return NaN. A block that receives NaN in its own stage raises MisfitError, so no mistake of `rehearse` can give wrong
numbers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from octavo.capture.errors import MisfitError

from ..layers.install import swapped
from ..preparation.weight_reads import watching
from ..replay.calls import Call, Calls, Stopped, copied_to, evaluating, first, replaced, run
from ..replay.hooks import hooked, input_of
from ..replay.sqnr import tensors_in
from .parking import Parking
from .spill import Spill, SpilledTensor, SpillFile, floating

END = ""  # name of the stage after all blocks, in which the forward runs to its end
_TOLERANCE = 1e-3  # relative error below which outputs count as equal: devices and kernels round differently
# called with the name of the block in memory; returns a function that changes the block, or None
Visit = Callable[[str], Callable[[], None] | None]


def do_nothing(name: str) -> None:
    """Does nothing. The default of `visit`, the function that `Blocks.sweep` calls with the `name` of each block."""


def every_position(position: int) -> bool:
    """Returns True. The default of `wanted`, so that `Blocks.sweep` stores the outputs of the blocks for every call."""
    return True


class Stub(nn.Module):
    """A module in place of a block. `answer` receives the inputs as [args, kwargs] and returns the output that the
    model gets from the block. Attributes of the block can be read from the stub too, because models read them."""

    def __init__(self, block: nn.Module, answer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.__dict__["_block"], self._answer = block, answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what `answer` returns. `answer` may raise Stopped instead, which ends the model's forward here."""
        return self._answer([args, kwargs])


class BlockOutputs:
    """The outputs of each block for each call, as `Blocks.sweep` stores them. `outputs[block][position]` lists the
    outputs of `block` for the call at `position`: several if the block runs several times in a row in this call."""

    def __init__(self) -> None:
        self.outputs: dict[str, dict[int, list[Any]]] = {}  # by block, then by position of the call
        self.deleted: set[str] = set()  # blocks whose outputs are no longer on disk


class Blocks:
    """The blocks `names` of `model`, calibrated or run one after the other, each while its weights are in memory.

    `parking` loads and frees the weights, `spill` stores the outputs of blocks on disk. `layers`: the names of the
    layers that become integers. A stage is the work on one block; in the last stage, END, the layers outside the blocks
    are calibrated. `order`: the order in which the blocks run, known after `rehearse`.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        parking: Parking,
        spill: Spill,
        layers: Iterable[str] = (),
    ) -> None:
        self._model, self._parking, self._spill = model, parking, spill
        self._layers = tuple(layers)
        self.used: dict[str, str] = {}  # after `rehearse`: layers whose weight is used elsewhere, with the reason
        self._real = {name: model.get_submodule(name) for name in names}
        self._watched = [
            layer for layer in self._layers if not any(layer.startswith(f"{name}.") for name in self._real)
        ]
        self.order: list[str] = []
        self._needs: dict[str, set[str]] = {}  # by stage: the blocks whose outputs it needs
        self._track, self._frontier = BlockOutputs(), END
        self._source: Calls = lambda: ()
        self._count: int | None = None  # the number of calls of the sweep; None before the last call was yielded
        self._position, self._fresh = 0, False  # the running call, and whether the frontier's outputs for it are new
        self._runs: dict[str, int] = {}  # by block: how often it ran in this forward
        self._expected: list[Tensor] = []  # the whole model's output for the first call

    def rehearse(self, calls: Iterable[Call]) -> None:
        """Finds the order of the blocks, and for each block the earlier blocks whose outputs it needs. Runs only the
        first call of each kind. Two calls are of one kind if their arguments differ only in the values of tensors and
        of numbers. Calls that skip different layers, for example, are of two kinds."""
        kinds: list[Any] = []
        ran: list[str] = []
        needs: dict[str, set[str]] = {}
        with evaluating(self._model):
            for call in calls:
                kind = _kind_of(call)
                if kind not in kinds:
                    kinds.append(kind)
                    shapes = self._shapes(call, keep=len(kinds) == 1)
                    ran = _merged(ran, list(shapes))
                    self._find_needs(call, shapes, needs)
        self.order = _merged(ran, list(self._real))
        self._needs = {stage: needs.get(stage, set()) for stage in [*self.order, END]}

    def _shapes(self, call: Call, *, keep: bool) -> dict[str, list[Any]]:
        """Runs `call`, with each block's weights in memory only while the block runs. Returns a dict from block name to
        the list of the block's outputs, one for each run, in the order of the blocks. In the outputs a SpilledTensor
        stands for each tensor, and has its dtype and shape; the values are deleted. If `keep` is True, keeps the
        model's output for `check_end`. Raises MisfitError if blocks pass on data otherwise than in their outputs, for
        example by changing an input in place."""
        shapes: dict[str, list[Any]] = {}
        running: list[str] = []
        with self._spill.writing() as file:

            def answer(name: str, inputs: Any) -> Any:
                block = self._real[name]
                with _disable_current_modes():  # fetching reads the weights, and shall not count as a use of them
                    self._parking.fetch(name, block)
                running.append(name)
                inside = [layer[len(name) + 1 :] for layer in self._layers if layer.startswith(f"{name}.")]
                with watching(block, inside) as used:
                    output = block(*inputs[0], **inputs[1])
                self.used |= {f"{name}.{layer}": reason for layer, reason in used.items()}
                running.pop()
                self._parking.park(name)
                shapes.setdefault(name, []).append(file.put(output))
                return output

            with watching(self._model, self._layers) as used, self._only_inside(running), self._stubbed(answer):
                output = copied_to(tensors_in(run(self._model, call, 0)), torch.device("cpu"))
            self.used |= used
        self._expected = output if keep else self._expected
        self._check_passed_on(call, shapes, output)
        file.path.unlink()
        return shapes

    @contextmanager
    def _only_inside(self, running: list[str]) -> Iterator[None]:
        def hook_for(block: str) -> Callable[..., None]:
            def check(*_: Any) -> None:
                if running[-1:] != [block]:
                    fact = f"the model calls layers inside block {block} without calling the block"
                    raise MisfitError(f"{fact}. Calibrate without --memory.")

            return check

        blocks = {layer: name for layer in self._layers for name in self._real if layer.startswith(f"{name}.")}
        with hooked(self._model, {layer: hook_for(name) for layer, name in blocks.items()}):
            yield

    def _check_passed_on(self, call: Call, outputs: dict[str, list[Any]], expected: list[Tensor]) -> None:
        """Runs the model on `call`, with stubs that return the stored `outputs` in place of its blocks. Raises
        MisfitError unless the model's output equals `expected`, up to rounding."""
        runs: dict[str, int] = {}

        def answer(name: str, inputs: Any) -> Any:
            runs[name] = runs.get(name, 0) + 1
            return replaced(outputs[name][runs[name] - 1], SpilledTensor, lambda place: place.read().to(self._device))

        try:
            with self._stubbed(answer):
                computed = tensors_in(run(self._model, call, 0))
        except MisfitError as error:
            raise _hidden_state_error() from error
        if not same(expected, computed):
            raise _hidden_state_error()

    def check_end(self) -> None:
        """Raises MisfitError unless the model, with stubs that return the blocks' stored outputs, gives the same output
        for the first call as it gave with its blocks in `rehearse`. Only for use inside `with self.ended(...)`."""
        with evaluating(self._model):
            for call in first(self.calls, 1):
                if not same(self._expected, tensors_in(run(self._model, call, 0))):
                    raise _hidden_state_error()

    def _find_needs(self, call: Call, shapes: dict[str, list[Any]], needs: dict[str, set[str]]) -> None:
        """Adds to `needs`, a dict from stage to block names, the blocks whose outputs each stage needs for `call`. A
        stage is named after the block that it works on; the stage after the last block is END. Runs the model once for
        each block, with NaN in place of the block's outputs; the stages that receive NaN need these outputs. Integer
        outputs cannot be NaN, so all stages count as needing them. `shapes` is a dict from block name to the block's
        outputs in `call`, in which a SpilledTensor stands for each tensor."""
        needed = {stage: needs.setdefault(stage, set()) for stage in [*shapes, END]}
        for poisoned, outputs in shapes.items():
            if not all(map(floating, outputs)):
                for blocks in needed.values():
                    blocks.add(poisoned)
                continue
            runs: dict[str, int] = {}

            def answer(name: str, inputs: Any, poisoned: str = poisoned, runs: dict[str, int] = runs) -> Any:
                if has_nan(inputs):
                    needed[name].add(poisoned)
                runs[name] = runs.get(name, 0) + 1
                value = float("nan") if name == poisoned else 0.0
                return replaced(
                    shapes[name][runs[name] - 1], SpilledTensor, lambda place: _blank(place, value, self._device)
                )

            def watch(_: nn.Module, args: Any, kwargs: Any, poisoned: str = poisoned) -> None:
                if has_nan(input_of(args, kwargs)):
                    needed[END].add(poisoned)

            with self._stubbed(answer), hooked(self._model, dict.fromkeys(self._watched, watch)):
                if has_nan(run(self._model, call, 0)):
                    needed[END].add(poisoned)

    def calls(self) -> Iterator[Call]:
        """Yields, one by one, the calls that the running `sweep` or the running `with ended(...)` was given. The caller
        may run the model on the call that was yielded last, but not on earlier ones."""
        position = -1
        for position, call in enumerate(self._source()):
            self._position = position
            yield call
        self._count = position + 1

    def sweep(
        self, calls: Calls, visit: Visit = do_nothing, wanted: Callable[[int], bool] = every_position
    ) -> BlockOutputs:
        """Visits all blocks in order, each while its weights are in memory, and returns their outputs for `calls`.

        `visit` is called with the block's name. It may run the model on some or all of `self.calls()`, several times;
        in each run the block receives its inputs. If `visit` returns a function, this function is called afterwards to
        change the block, for example to install integer layers. Later blocks receive the outputs from before this
        change.

        The block's outputs are stored for each call on which `visit` ran the model. Then the model runs on each other
        call for which `wanted(index)` is True (`index`: position in `calls`, counted from 0), and the block's outputs
        are stored too. Later visits may only run calls whose outputs are stored.
        """
        self._source, self._count, self._track = calls, None, BlockOutputs()
        with self._stubbed(self._answer), self._counting():
            for stage, name in enumerate(self.order):
                self._frontier, self._track.outputs[name] = name, {}
                with self._spill.writing() as file, self._real_one(name, file):
                    change = visit(name)
                    self._complete(wanted)
                    if change is not None:
                        change()
                if change is None:
                    self._parking.park(name)
                else:
                    self._parking.keep(name, self._real[name])
                self._forget([*self.order[stage + 1 :], END])
        return self._track

    @contextmanager
    def ended(self, calls: Calls, track: BlockOutputs) -> Iterator[None]:
        """Makes the model run only the operations outside its blocks, inside the `with` statement: in place of each
        block, a stub returns the outputs that the block had in `sweep` for the same `calls`. `track` holds these
        outputs; afterwards they are deleted from disk."""
        self._source, self._track, self._frontier = calls, track, END
        with self._stubbed(self._answer), self._counting():
            yield
        self._forget([])

    @contextmanager
    def _stubbed(self, answer: Callable[[str, Any], Any]) -> Iterator[None]:
        with swapped(self._model, {name: Stub(block, partial(answer, name)) for name, block in self._real.items()}):
            yield

    @contextmanager
    def _counting(self) -> Iterator[None]:
        def begin(*_: Any) -> None:
            self._runs = {}
            outputs = self._track.outputs.get(self._frontier, {})
            self._fresh = self._position not in outputs
            outputs.setdefault(self._position, [])

        with hooked(self._model, {"": begin}):
            yield

    @contextmanager
    def _real_one(self, name: str, file: SpillFile) -> Iterator[None]:
        """Inside the `with` statement, puts the block `name`, with its weights in memory, into the model in place of
        its stub. The first time that the model runs on a call, the block's outputs are written to `file`."""
        block = self._real[name]
        self._parking.fetch(name, block)
        hooks = {"": self._check}, {"": partial(self._keep, name, file)}
        with hooked(block, *hooks), swapped(self._model, {name: block}):
            yield

    def _check(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        if has_nan([args, kwargs]):
            fact = f"block {self._frontier} receives NaN, or outputs of other blocks than in the first call"
            raise MisfitError(f"{fact}. Calibrate without --memory.")

    def _keep(self, name: str, file: SpillFile, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._fresh:
            self._track.outputs[name][self._position].append(file.put(output))

    def _complete(self, wanted: Callable[[int], bool]) -> None:
        """Runs the model on each call for whose index, counted from 0, `wanted` returns True, so that the outputs of
        the block in memory are stored. Leaves out calls for which they are stored already."""
        if len(self._track.outputs[self._frontier]) == self._count:
            return
        with evaluating(self._model):
            for call in self.calls():
                if self._position not in self._track.outputs[self._frontier] and wanted(self._position):
                    run(self._model, call, self._position)

    def _answer(self, name: str, inputs: Any) -> Any:
        """Returns the output that the block `name` had for the running call, read from disk. If the block in memory
        does not need this output, returns NaN in the shape of the output. Raises Stopped if `name` comes after the
        block in memory, MisfitError if the block runs more often in the call than it did when it was in memory.
        `inputs` is ignored."""
        if name not in self._track.outputs:
            raise Stopped
        outputs, run_index = self._track.outputs[name].get(self._position, []), self._runs.get(name, 0)
        self._runs[name] = run_index + 1
        if run_index >= len(outputs):
            fact = f"block {name} runs again after other blocks, or not in the order of the first call"
            raise MisfitError(f"{fact}. Calibrate without --memory.")
        if name in self._needs[self._frontier]:
            return replaced(outputs[run_index], SpilledTensor, lambda place: place.read().to(self._device))
        return replaced(outputs[run_index], SpilledTensor, lambda place: _blank(place, float("nan"), self._device))

    def _forget(self, ahead: list[str]) -> None:
        """Deletes the files of block outputs that no later stage needs. `ahead` has the names of the later stages: the
        names of blocks, and END for the stage after the last block."""
        needed = {name for stage in ahead for name in self._needs[stage]}
        for name in self._track.outputs.keys() - needed - self._track.deleted:
            self._track.deleted.add(name)
            places: list[SpilledTensor] = []
            replaced(list(self._track.outputs[name].values()), SpilledTensor, places.append)
            for path in {place.path for place in places}:
                path.unlink()

    @property
    def _device(self) -> torch.device:
        return self._parking.device


def _hidden_state_error() -> MisfitError:
    fact = "the blocks pass on more than their outputs: they change their inputs or keep state"
    return MisfitError(f"{fact}. Calibrate without --memory.")


def same(expected: list[Tensor], computed: list[Tensor]) -> bool:
    """Returns whether two outputs of the model, `expected` and `computed`, lists of tensors, have equal shapes and
    differ by rounding only. The norm of the difference between two tensors may be 0.1 % (_TOLERANCE) of the norm of the
    expected tensor, or 8 times the machine epsilon of its dtype in float16 (0.8 %) and bfloat16 (6 %)."""
    if [x.shape for x in expected] != [x.shape for x in computed]:
        return False
    pairs = zip(expected, computed, strict=True)
    return all(
        bool((x - y.to(x.device)).norm() <= max(_TOLERANCE, 8 * torch.finfo(x.dtype).eps) * x.norm()) for x, y in pairs
    )


def _blank(place: SpilledTensor, value: float, device: torch.device) -> Tensor:
    return place.filled(value).to(device)


def _kind_of(call: Call) -> Any:
    """Returns a value that is equal for calls of the same kind: the arguments of the call, with each tensor and each
    argument that is a number replaced by its type."""
    arguments = [*enumerate(call.args), *call.kwargs.items()]
    plain = {name: type(value) if type(value) in (int, float) else value for name, value in arguments}
    return replaced(plain, Tensor, lambda tensor: Tensor)


def _merged(ran: list[str], names: list[str]) -> list[str]:
    """Returns `ran`, a list of block names, with the names that only `names` has inserted: each directly behind the
    name before it in `names`, or at the start. For example, ["a", "c"] and ["a", "b", "c"] give ["a", "b", "c"]."""
    order = list(ran)
    for index, name in enumerate(names):
        if name not in order:
            before = [order.index(other) for other in names[:index] if other in order]
            order.insert(before[-1] + 1 if before else 0, name)
    return order


def has_nan(value: Any) -> bool:
    """Returns whether `value`, a tensor or a container of tensors, contains a floating-point NaN."""
    findings: list[bool] = []
    replaced(value, Tensor, lambda x: findings.append(x.is_floating_point() and bool(x.isnan().any())))
    return any(findings)
