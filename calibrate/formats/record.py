"""Defines the class Format, whose objects hold what export, inspect, compare and generate need to know about a format.

Importing this module, and making a Format, needs no torch. A Format has the names of schemes, dtypes and transforms as
text. Its functions import torch only when they are called, if at all.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes

from ..layers.schemes import DYNAMIC, STATIC, TIMESTEP, WEIGHT_ONLY
from .verdict import Verdict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..attention.measure import AttentionRow
    from ..layers.modules import QuantizedLayer


class Deployment(NamedTuple):
    """Holds what the writers of formats need to know besides the layers, such as the noise levels of the denoising
    steps.

    | field      | meaning                                                                                    |
    |------------|--------------------------------------------------------------------------------------------|
    | timesteps  | noise level of each denoising step in which the checkpoint will be used; None if no range  |
    |            | depends on the noise level                                                                 |
    | example    | a call of the model, args and kwargs, that an exporter can trace; None if there is none    |
    | parameters | the float parameters with smoothing factors folded in: a dict from name to a function that |
    |            | returns the new value                                                                      |
    | axes       | dict from the name of a layer to the number of axes of its input                           |
    | shard      | largest size of a weight file in bytes                                                     |
    | attention  | dict from each attention module that is quantized to the row with its type and rotation    |
    """

    timesteps: Sequence[float] | None
    example: Any
    parameters: "Mapping[str, Callable[[], Tensor]]"
    axes: Mapping[str, int]
    shard: int
    attention: "Mapping[str, AttentionRow]"


class Writer(Protocol):
    """A function that writes the files of one format into the existing folder `directory`, with the permissions
    `modes`.

    `layers` is a dict from layer name to integer layer. `model` is the float model, or the same model with the integer
    layers in place. `deployment` holds what some formats need besides, such as noise levels. Raises UsageError for
    layers that the format cannot hold, and NumbersError for a number to be written that is NaN or infinite.
    """

    def __call__(
        self,
        layers: "Mapping[str, QuantizedLayer]",
        model: "nn.Module",
        directory: Path,
        modes: Modes,
        deployment: Deployment,
    ) -> None: ...


def model_writer(path: str) -> Writer:
    """Returns the writer of a format that is a model directory: config.json and weights. The writer calls the function
    that `path` names, as in "octavo.calibrate.formats.sdnq.write:write_sdnq", and passes on the float parameters that
    smoothing factors were folded into, and the largest size of a weight file. The module of the function, which may
    import torch, is imported when the writer is called."""

    def write(
        layers: "Mapping[str, QuantizedLayer]",
        model: "nn.Module",
        directory: Path,
        modes: Modes,
        deployment: Deployment,
    ) -> None:
        function = resolve_name(path)
        function(layers, model, directory, modes, parameters=deployment.parameters, shard=deployment.shard)

    return write


class Description(NamedTuple):
    """Describes a checkpoint in one format: a title; `lines`, each a (subject, fact) in words; and `schemes`, a dict
    from each scheme to the number of its layers."""

    title: str
    lines: tuple[tuple[str, str], ...]
    schemes: dict[str, int]


class Readable(Protocol):
    """A checkpoint whose integer layers can be read one by one, to be put into a float model."""

    @property
    def layer_names(self) -> Sequence[str]:
        """The names of the integer layers in the checkpoint."""

    def layer(self, name: str) -> "QuantizedLayer":
        """Reads the integer layer `name`. Raises FileError for numbers that no export writes, such as a negative
        scale."""

    def difference(self, model: "nn.Module") -> str | None:
        """Returns a fact, in words, that shows that the checkpoint was not made from the float `model`, such as a layer
        that the model lacks; None if there is no such fact."""


def nowhere(directory: Path) -> Path | None:
    """Returns None for every directory. Formats that `octavo inspect` does not look for have this function as their
    `find`."""
    return None


def any_model(kind: str, config: Mapping[str, Any]) -> str | None:
    """Returns None for every class name and configuration of a denoiser. Formats that hold every denoiser have this
    function as their `refusal`."""
    return None


def no_layers(model: "nn.Module", names: Collection[str], scheme: str) -> Collection[str]:
    """Returns no names for any model and scheme. Formats that hold every layer in 8 bits have this function as their
    `kept_float`."""
    return ()


def no_groups(model: "nn.Module", names: Collection[str]) -> Collection[Collection[str]]:
    """Returns no groups for any model. Formats whose consumer joins no layers have this function as their `joined`."""
    return ()


def read_everywhere(model: "nn.Module", modules: Collection[str]) -> Mapping[str, str]:
    """Returns no reasons for any attention modules. Formats whose consumer reads a type of attention for every module
    have this function as their `unread`."""
    return {}


def unchecked(path: Path) -> list[Verdict]:
    """Returns no verdicts for any path. Formats whose files are not checked have this function as their `check`."""
    return []


@dataclass(frozen=True)
class Format:
    """Describes one format of checkpoints: how it is written, found, checked, described and read.

    | field       | meaning                                                                                            |
    |-------------|----------------------------------------------------------------------------------------------------|
    | name        | name on the command line; also of a subfolder, if another format's files have the same names       |
    | files       | regular expression of the format's file names                                                      |
    | writer      | function that writes the files                                                                     |
    | schemes     | schemes of layers that the format can hold; messages recommend the first                           |
    | whole       | schemes in which the consumer takes only one scale for a whole weight                              |
    | joined      | function that takes a denoiser and the names of its quantized layers, and returns groups of those  |
    |             | that the consumer joins into one matrix, which has one scale in the schemes of `whole`             |
    | mixed       | True if layers of one checkpoint may have different schemes                                        |
    | clamping    | True if the consumer chooses the scales of MXFP8 inputs as Ascend does (`Scheme.clamping`)         |
    | transforms  | names of the classes in layers.transforms that inputs may go through before they become codes      |
    | plain       | schemes whose inputs go through none of `transforms`                                               |
    | packages    | packages needed to write the format, which Octavo's `extra` installs                               |
    | extra       | name of Octavo's extra that installs `packages`                                                    |
    | consumer    | name of the software that loads the format, as verdicts call it                                    |
    | also        | names of further software that loads the format                                                    |
    | find        | function from a checkpoint's directory to the path of the format's files, or None without any      |
    | check       | function from the path that `find` returns to verdicts; never raises FileError                     |
    | foreign     | function from the directory of a checkpoint that is not in this format to verdicts on whether the  |
    |             | consumer can load it nevertheless; these verdicts never make a checkpoint unsound                  |
    | optional    | subjects of verdicts that may be negative although the checkpoint is sound                         |
    | describe    | function from the path that `find` returns to a short description; raises FileError                |
    | read        | function from the path that `find` returns to a Readable; None if other software loads the layers  |
    | refusal     | function from the class name and the configuration of a denoiser to the reason why the format      |
    |             | cannot hold it, and what the user can do; None if it can                                           |
    | kept_float  | function that takes a denoiser, the names of the layers that would become 8-bit layers, and their  |
    |             | scheme ("" if it is not known), and returns the names of those that have to stay float for the     |
    |             | consumer                                                                                           |
    | dtypes      | dtypes in which the consumer runs a denoiser, such as "bfloat16"; empty if it runs any             |
    | folds       | True if the consumer loads float parameters from the files: smoothing can then be folded into them |
    | made_biases | True if the consumer loads a bias for a layer that has none in the float model                     |
    | attention   | types of quantized attention that a checkpoint can ask the consumer for (`attention.names`)        |
    | unread      | function that takes a denoiser and names of attention modules, and returns a dict from each module |
    |             | for which the consumer reads no type of attention to the reason                                    |
    | is_model    | True if diffusers loads the format's directory as a model once octavo is imported                  |
    | alone       | True if the consumer takes every weight file of a directory for its own, so that no other format's |
    |             | files may lie there                                                                                |
    """

    name: str
    files: str
    writer: Writer
    schemes: tuple[str, ...] = (STATIC, TIMESTEP, DYNAMIC, WEIGHT_ONLY)
    whole: tuple[str, ...] = ()
    joined: "Callable[[nn.Module, Collection[str]], Collection[Collection[str]]]" = no_groups
    mixed: bool = True
    clamping: bool = False
    transforms: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    extra: str = ""
    consumer: str = ""
    also: tuple[str, ...] = ()
    find: Callable[[Path], Path | None] = nowhere
    check: Callable[[Path], list[Verdict]] = unchecked
    foreign: Callable[[Path], list[Verdict]] = unchecked
    optional: frozenset[str] = field(default_factory=frozenset)
    describe: Callable[[Path], Description] | None = None
    read: Callable[[Path], Readable] | None = None
    refusal: Callable[[str, Mapping[str, Any]], str | None] = any_model
    kept_float: "Callable[[nn.Module, Collection[str], str], Collection[str]]" = no_layers
    dtypes: tuple[str, ...] = ()
    folds: bool = False
    made_biases: bool = True
    attention: tuple[str, ...] = ()
    unread: "Callable[[nn.Module, Collection[str]], Mapping[str, str]]" = read_everywhere
    is_model: bool = False
    alone: bool = False

    @property
    def loadable(self) -> bool:
        """Whether `octavo generate` and `octavo compare` can load the format."""
        return self.is_model or self.read is not None

    def write(
        self,
        layers: "Mapping[str, QuantizedLayer]",
        model: "nn.Module",
        directory: Path,
        modes: Modes,
        deployment: Deployment,
    ) -> None:
        """Passes all arguments to `writer`, which writes the files and may raise UsageError or NumbersError.

        Raises UsageError before that for a layer that the format cannot hold: one whose scheme is not in `schemes`,
        whose input goes through a transform not in `transforms`, or whose bias the consumer would not load.
        """
        for name, layer in layers.items():
            transform = layer.transform
            if layer.scheme not in self.schemes:
                fact = f"cannot hold layer {name}, whose scheme is {layer.scheme}"
                raise UsageError(f"format {self.name}: {fact}. Choose another format.")
            if transform is not None and (kind := type(transform).__name__) not in self.transforms_of(layer.scheme):
                fact = f"cannot hold layer {name}, whose input goes through the transform {kind}"
                raise UsageError(f"format {self.name}: {fact}. Choose another format.")
            if layer.made_bias and not self.made_biases:
                fact = f"cannot hold the bias correction of layer {name}, which has no bias in the float model"
                raise UsageError(f"format {self.name}: {fact}. Use --no-bias-correction.")
        self.writer(layers, model, directory, modes, deployment)

    def transforms_of(self, scheme: str) -> tuple[str, ...]:
        """Returns the names of the transforms that inputs of layers of this `scheme` may go through."""
        return () if scheme in self.plain else self.transforms

    @property
    def shown(self) -> bool:
        """True if `octavo inspect` looks for the format in a checkpoint."""
        return self.describe is not None
