"""The record of a format: everything that export, inspect, compare and generate know about a format.

Records can be made without torch: what they say of layers is said in names, and their functions that write or load
import what they need.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes

from ..layers.schemes import DYNAMIC, STATIC, TIMESTEP, WEIGHT_ONLY
from .verdict import Verdict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..layers.modules import QuantizedLayer


class Deployment(NamedTuple):
    """The facts about a model and its deployment that writers need: the noise level of each denoising step, a call of
    the model, functions that make the new values of float parameters by name, the number of axes of each layer's input,
    and the most bytes of a file."""

    timesteps: Sequence[float] | None
    example: Any
    parameters: "Mapping[str, Callable[[], Tensor]]"
    axes: Mapping[str, int]
    shard: int


class Writer(Protocol):
    """Writes the files of one format into an existing directory. Raises UsageError for layers without a form in the
    format, and NumbersError for numbers that are not finite."""

    def __call__(
        self,
        layers: "Mapping[str, QuantizedLayer]",
        model: "nn.Module",
        directory: Path,
        modes: Modes,
        deployment: Deployment,
    ) -> None: ...


class Description(NamedTuple):
    """A short description of a checkpoint in one format: a title, lines of (subject, fact), layers of each scheme."""

    title: str
    lines: tuple[tuple[str, str], ...]
    schemes: dict[str, int]


class Readable(Protocol):
    """The integer layers of a checkpoint, to be put into a float model."""

    @property
    def layer_names(self) -> Sequence[str]:
        """The names of the layers in the checkpoint."""

    def layer(self, name: str) -> "QuantizedLayer":
        """Reads the layer `name`. Raises FileError for numbers that no export writes."""

    def difference(self, model: "nn.Module") -> str | None:
        """The first sign that the checkpoint was not made from the float `model`; None where there is none."""


def nowhere(directory: Path) -> Path | None:
    """The `find` of a format whose files are not looked for in a checkpoint's directory: None."""
    return None


def unchecked(place: Path) -> list[Verdict]:
    """The `check` of a format whose files are not checked: no verdicts."""
    return []


@dataclass(frozen=True)
class Format:
    """The record of one format of checkpoints.

    | field    | meaning                                                                                               |
    |----------|-------------------------------------------------------------------------------------------------------|
    | name     | name on the command line; also of the folder, where another format has files of the same names        |
    | files    | a regular expression of the format's file names                                                       |
    | writer   | writes the files                                                                                      |
    | schemes  | schemes of layers that the format has a form for; the first is recommended                            |
    | elements | dtypes of the numbers that codes may be                                                               |
    | transforms | what may happen to inputs before they become codes: names of the types in layers.transforms         |
    | packages | packages needed to write the format; `extra` of Octavo installs them                                  |
    | consumer | who loads the format, in the words of verdicts                                                        |
    | find     | path of the files in a checkpoint's directory; None where there are none                              |
    | check    | verdicts on the files at a path; raises nothing for files that cannot be read                         |
    | optional | subjects of verdicts that a sound checkpoint may fail                                                 |
    | describe | short description of the files at a path; raises FileError                                            |
    | read     | opens the layers to be put into a float model, for formats that run so                                |
    | folds    | whether float tensors are loaded from the files, and may hold factors of smoothing              |
    | is_model | whether diffusers loads the directory as a model, with octavo imported                                |
    """

    name: str
    files: str
    writer: Writer
    schemes: tuple[str, ...] = (STATIC, TIMESTEP, DYNAMIC, WEIGHT_ONLY)
    elements: tuple[str, ...] = ("torch.int8",)
    transforms: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    extra: str = ""
    consumer: str = ""
    find: Callable[[Path], Path | None] = nowhere
    check: Callable[[Path], list[Verdict]] = unchecked
    optional: frozenset[str] = field(default_factory=frozenset)
    describe: Callable[[Path], Description] | None = None
    read: Callable[[Path], Readable] | None = None
    folds: bool = False
    is_model: bool = False

    def write(
        self,
        layers: "Mapping[str, QuantizedLayer]",
        model: "nn.Module",
        directory: Path,
        modes: Modes,
        deployment: Deployment,
    ) -> None:
        """Writes the files as `writer` does. Raises UsageError for a layer that the format has no form for."""
        for name, layer in layers.items():
            element, transform = str(layer.input_scheme.element.dtype), layer.transform
            if element not in self.elements:
                raise UsageError(f"format {self.name}: has no form for {name} in {element}. Choose another format.")
            if transform is not None and (kind := type(transform).__name__) not in self.transforms:
                raise UsageError(f"format {self.name}: has no form for {name} with {kind}. Choose another format.")
        self.writer(layers, model, directory, modes, deployment)

    @property
    def shown(self) -> bool:
        """Whether `octavo inspect` looks for the format in a checkpoint."""
        return self.describe is not None
