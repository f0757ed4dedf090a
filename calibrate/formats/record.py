"""The record of a format: everything that export, inspect, compare and generate know of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes

from ..layers.inputs import WORDS, Input
from ..layers.modules import QuantizedLayer
from ..layers.scheme import INT8, STORABLE, Element
from ..layers.transforms import Transform
from ..smoothing.fold import Group
from .verdict import Verdict

Groups = Callable[[Any], Iterable[Group]]


class Deployment(NamedTuple):
    """What is known of the model and of where it goes: the noise level of each denoising step, a call of the model, the
    layers whose multipliers can go, how many axes the inputs of layers have, and the most bytes of a file."""

    timesteps: Sequence[float] | None
    example: Any
    groups: Groups | None
    axes: Mapping[str, int]
    shard: int


class Writer(Protocol):
    """Writes the files of one format into an existing directory. Raises UsageError for layers it has no form for, and
    NumbersError for numbers that are not finite."""

    def __call__(
        self,
        layers: Mapping[str, QuantizedLayer],
        model: nn.Module,
        directory: Path,
        modes: Modes,
        deployment: Deployment,
    ) -> None: ...


class Description(NamedTuple):
    """A checkpoint in one format in a few words: what it is, more lines of (subject, fact), layers of each scheme."""

    title: str
    lines: tuple[tuple[str, str], ...]
    schemes: dict[str, int]


class Readable(Protocol):
    """The integer layers of a checkpoint, for a float model that they are put into."""

    @property
    def layer_names(self) -> Sequence[str]:
        """The layers that are in the checkpoint."""

    def layer(self, name: str) -> QuantizedLayer:
        """One of them. Raises FileError for numbers that no export writes."""

    def difference(self, model: nn.Module) -> str | None:
        """The first fact that tells the checkpoint from the float `model`; None: it was made of it."""


def nowhere(directory: Path) -> Path | None:
    """Files that are not looked for in a checkpoint's directory."""
    return None


def unchecked(place: Path) -> list[Verdict]:
    """No verdicts."""
    return []


@dataclass(frozen=True)
class Format:
    """One format.

    | field    | meaning                                                                                               |
    |----------|-------------------------------------------------------------------------------------------------------|
    | name     | on the command line; of its folder, where another format has files of the same names                  |
    | files    | a regular expression of the names of its files                                                        |
    | writer   | writes them                                                                                           |
    | inputs   | how inputs may become codes for it to have a form; the first is recommended                           |
    | elements | the numbers that codes may be                                                                         |
    | transforms | what may happen to inputs before they become codes                                                  |
    | dtypes   | those that the deployment may be in                                                                   |
    | packages | what has to be installed to write it, and the extra of Octavo that has it                             |
    | consumer | who loads it, in the words of verdicts                                                                |
    | find     | where its files are in a checkpoint's directory; None where they are not                              |
    | check    | the verdicts on the files at a place; nothing is raised for what cannot be read                       |
    | optional | subjects of verdicts that a sound checkpoint may fail                                                 |
    | describe | a few words on the files at a place; raises FileError                                                 |
    | read     | opens its layers to be put into a float model, where that is how it is run                            |
    | is_model | diffusers loads the directory as a model, with octavo imported                                        |
    """

    name: str
    files: str
    writer: Writer
    inputs: tuple[type[Input], ...] = tuple(WORDS)
    elements: tuple[Element, ...] = (INT8,)
    transforms: tuple[type[Transform], ...] = ()
    dtypes: tuple[torch.dtype, ...] = STORABLE
    packages: tuple[str, ...] = ()
    extra: str = ""
    consumer: str = ""
    find: Callable[[Path], Path | None] = nowhere
    check: Callable[[Path], list[Verdict]] = unchecked
    optional: frozenset[str] = field(default_factory=frozenset)
    describe: Callable[[Path], Description] | None = None
    read: Callable[[Path], Readable] | None = None
    is_model: bool = False

    def write(
        self,
        layers: Mapping[str, QuantizedLayer],
        model: nn.Module,
        directory: Path,
        modes: Modes,
        deployment: Deployment,
    ) -> None:
        """Writes the files as `writer` does. Raises UsageError for a layer that the format has no form for."""
        for name, layer in layers.items():
            element, transform = layer.input_scheme.element, layer.transform
            if element not in self.elements:
                raise UsageError(
                    f"format {self.name}: has no form for {name} in {element.dtype}. Choose another format."
                )
            if transform is not None and type(transform) not in self.transforms:
                kind = type(transform).__name__
                raise UsageError(f"format {self.name}: has no form for {name} with {kind}. Choose another format.")
        self.writer(layers, model, directory, modes, deployment)

    @property
    def shown(self) -> bool:
        """Whether `octavo inspect` looks for it in a checkpoint."""
        return self.describe is not None
