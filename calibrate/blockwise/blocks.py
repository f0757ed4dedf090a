"""A model of repeated blocks, of which one at a time has weights in memory: what it is given is passed on on disk.

The model's own forward runs as it is, with stubs in the place of its blocks. Stage by stage one block, the frontier, is
real. Blocks before it return what they returned in their stage; the first block after it ends the forward. So whatever
a model does between its blocks is done, each weight is read once in a sweep over the blocks, however many calls there
are, and nothing has to be known of how blocks follow each other.

What a stage reads from disk is what its block is made from, mostly the output of the block before. That is found out
once, on zeros: each block's output in turn is NaN, and what it reaches is seen. Later, outputs that nothing needs any
more are deleted, and NaN stands for them; a block of which an input is NaN then is an error, not a wrong number.
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

END = ""  # the stage after all blocks
_TOLERANCE = 1e-3  # relative, of outputs: another device or kernel may round otherwise
Visit = Callable[[str], Callable[[], None] | None]


def do_nothing(name: str) -> None:
    """A visit that does nothing."""


def every_position(position: int) -> bool:
    """All calls are wanted."""
    return True


class Stub(nn.Module):
    """Stands for a block, and has its attributes: models ask for them."""

    def __init__(self, block: nn.Module, answer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.__dict__["_block"], self._answer = block, answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output that the block had before; raises Stopped where the forward ends."""
        return self._answer([args, kwargs])


class BlockOutputs:
    """Outputs of blocks by call; a block that runs several times in a row has one for each run."""

    def __init__(self) -> None:
        self.outputs: dict[str, dict[int, list[Any]]] = {}
        self.gone: set[str] = set()  # blocks whose outputs are no longer on disk


class Blocks:
    """The blocks `names` of `model`, calibrated or run one after the other. `order` is that in which they run.

    `layers` are to become integers. Those outside the blocks are given what the whole model gives them at the stage
    END.
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
        self.used: dict[str, str] = {}  # layers whose weight is used elsewhere, with the reason, after `rehearse`
        self._real = {name: model.get_submodule(name) for name in names}
        self._watched = [
            layer for layer in self._layers if not any(layer.startswith(f"{name}.") for name in self._real)
        ]
        self.order: list[str] = []
        self._needs: dict[str, set[str]] = {}  # by stage: the blocks whose outputs it is made from
        self._track, self._frontier = BlockOutputs(), END
        self._source: Calls = lambda: ()
        self._count: int | None = None  # of the calls of the sweep, once they were given to the end
        self._at, self._fresh = 0, False  # of the running call
        self._runs: dict[str, int] = {}
        self._expected: list[Tensor] = []  # the whole model's output for the first call

    def rehearse(self, calls: Iterable[Call]) -> None:
        """Runs one call of each kind, with each block in memory in its turn, and finds out the order and what each
        stage needs. Kinds differ in arguments other than tensors and numbers, like a list of layers to skip."""
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
        """Outputs of each block that runs, whose values are gone, in the order in which the blocks run.

        Raises MisfitError where the outputs of the blocks do not suffice to compute that of the model.
        """
        shapes: dict[str, list[Any]] = {}
        running: list[str] = []
        with self._spill.writing() as file:

            def answer(name: str, inputs: Any) -> Any:
                block = self._real[name]
                with _disable_current_modes():  # fetching reads weights that are watched
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
        """Inside, a layer of a block that is not the last of `running` may not be called."""

        def hook_for(block: str) -> Callable[..., None]:
            def check(*_: Any) -> None:
                if running[-1:] != [block]:
                    fact = f"the model calls parts of block {block}, and not the block"
                    raise MisfitError(f"{fact}. Calibrate without --memory.")

            return check

        blocks = {layer: name for layer in self._layers for name in self._real if layer.startswith(f"{name}.")}
        with hooked(self._model, {layer: hook_for(name) for layer, name in blocks.items()}):
            yield

    def _check_passed_on(self, call: Call, outputs: dict[str, list[Any]], expected: list[Tensor]) -> None:
        """Raises MisfitError where the model computes something else from the outputs of its blocks alone."""
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
        """Raises MisfitError where the first call, at the stage END, gives something else than the whole model does."""
        with evaluating(self._model):
            for call in first(self.calls, 1):
                if not same(self._expected, tensors_in(run(self._model, call, 0))):
                    raise _hidden_state_error()

    def _find_needs(self, call: Call, shapes: dict[str, list[Any]], needs: dict[str, set[str]]) -> None:
        """Adds to `needs`, by stage, the blocks whose outputs reach it."""
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
        """The calls of the sweep; the one that was given last is the one that may run."""
        position = -1
        for position, call in enumerate(self._source()):
            self._at = position
            yield call
        self._count = position + 1

    def sweep(
        self, calls: Calls, visit: Visit = do_nothing, wanted: Callable[[int], bool] = every_position
    ) -> BlockOutputs:
        """All blocks in their order, each given what the ones before returned for `calls`.

        `visit` is told the block's name, and runs `self.calls()` or some of them on the model as it likes; what it
        returns changes the block. What the block returned before that is passed on: for the calls that a visit ran, and
        those whose position is `wanted` after it. No later visit may run others. Weights are read once.
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
        """Inside, the model computes all of `calls` from what its blocks returned in a sweep over them, once."""
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
        """Inside, it is known where a forward begins."""

        def begin(*_: Any) -> None:
            self._runs = {}
            outputs = self._track.outputs.get(self._frontier, {})
            self._fresh = self._at not in outputs
            outputs.setdefault(self._at, [])

        with hooked(self._model, {"": begin}):
            yield

    @contextmanager
    def _real_one(self, name: str, file: SpillFile) -> Iterator[None]:
        """Inside, the block is in memory and in its place, and what it returns for each call is kept once."""
        block = self._real[name]
        self._parking.fetch(name, block)
        hooks = {"": self._check}, {"": partial(self._keep, name, file)}
        with hooked(block, *hooks), swapped(self._model, {name: block}):
            yield

    def _check(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        if has_nan([args, kwargs]):
            fact = f"block {self._frontier} is given NaN, or outputs of other blocks than in the first call"
            raise MisfitError(f"{fact}. Calibrate without --memory.")

    def _keep(self, name: str, file: SpillFile, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._fresh:
            self._track.outputs[name][self._at].append(file.put(output))

    def _complete(self, wanted: Callable[[int], bool]) -> None:
        """Runs the calls that are wanted and the visit did not."""
        if len(self._track.outputs[self._frontier]) == self._count:
            return
        with evaluating(self._model):
            for call in self.calls():
                if self._at not in self._track.outputs[self._frontier] and wanted(self._at):
                    run(self._model, call, self._at)

    def _answer(self, name: str, inputs: Any) -> Any:
        """The output of a block that is not being calibrated."""
        if name not in self._track.outputs:
            raise Stopped
        outputs, run_index = self._track.outputs[name].get(self._at, []), self._runs.get(name, 0)
        self._runs[name] = run_index + 1
        if run_index >= len(outputs):
            fact = f"block {name} runs again after others"
            raise MisfitError(f"{fact}, or not in the order of the first call. Calibrate without --memory.")
        if name in self._needs[self._frontier]:
            return replaced(outputs[run_index], SpilledTensor, lambda place: place.read().to(self._device))
        return replaced(outputs[run_index], SpilledTensor, lambda place: _blank(place, float("nan"), self._device))

    def _forget(self, ahead: list[str]) -> None:
        """Deletes the files of outputs that none of the stages `ahead` needs."""
        needed = {name for stage in ahead for name in self._needs[stage]}
        for name in self._track.outputs.keys() - needed - self._track.gone:
            self._track.gone.add(name)
            places: list[SpilledTensor] = []
            replaced(list(self._track.outputs[name].values()), SpilledTensor, places.append)
            for path in {place.path for place in places}:
                path.unlink()

    @property
    def _device(self) -> torch.device:
        return self._parking.device


def _hidden_state_error() -> MisfitError:
    fact = "the blocks pass on more than what they return, by changing their inputs or keeping something"
    return MisfitError(f"{fact}. Calibrate without --memory.")


def same(expected: list[Tensor], computed: list[Tensor]) -> bool:
    """Whether outputs of the model are equal up to rounding."""
    if [x.shape for x in expected] != [x.shape for x in computed]:
        return False
    pairs = zip(expected, computed, strict=True)
    return all(
        bool((x - y.to(x.device)).norm() <= max(_TOLERANCE, 8 * torch.finfo(x.dtype).eps) * x.norm()) for x, y in pairs
    )


def _blank(place: SpilledTensor, value: float, device: torch.device) -> Tensor:
    return place.filled(value).to(device)


def _kind_of(call: Call) -> Any:
    """The arguments of a call without tensors, and without numbers that stand alone."""
    arguments = [*enumerate(call.args), *call.kwargs.items()]
    plain = {name: type(value) if type(value) in (int, float) else value for name, value in arguments}
    return replaced(plain, Tensor, lambda tensor: Tensor)


def _merged(ran: list[str], names: list[str]) -> list[str]:
    """`ran`, with the other `names` each after the one it is listed after."""
    order = list(ran)
    for index, name in enumerate(names):
        if name not in order:
            before = [order.index(other) for other in names[:index] if other in order]
            order.insert(before[-1] + 1 if before else 0, name)
    return order


def has_nan(value: Any) -> bool:
    """Whether a floating-point tensor inside containers holds NaN."""
    findings: list[bool] = []
    replaced(value, Tensor, lambda x: findings.append(x.is_floating_point() and bool(x.isnan().any())))
    return any(findings)
