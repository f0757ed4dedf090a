"""Weights of linear layers in the layout of oneDNN's products of uint8 and int8, written ten times as fast as there.

A weight (out, in), padded with zeros to multiples of 64, lies there as words of 4 inputs, (out / 64, in / 64, 16, 64);
minus the sum of each row comes behind them in int32. oneDNN calls it BA16a64b4a, and goes there byte by byte.
"""

import ctypes
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 64
_SAMPLED = 256  # words of a weight


class Layouts:
    """Packs the weights of one model.

    Which layout it is goes by the CPU, the shape and the version: oneDNN packs the first weight of a shape, and only
    where that is what would be written here, bit for bit, are those that follow written into a copy of it.
    """

    def __init__(self) -> None:
        self._same: WeakValueDictionary[torch.Size, Tensor] = WeakValueDictionary()

    def pack(self, weight: Tensor, sums: Tensor) -> Tensor:
        """What `qlinear_prepack` makes of a contiguous int8 weight (out, in), opaque; `sums`, int32, of its rows."""
        words = _words(weight)
        behind = F.pad(sums, (0, len(words) - len(sums))).neg()
        like = self._same.get(weight.shape)
        if like is None:
            packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
            if _tells(words) and _is(_memory(packed), words, behind):
                self._same[weight.shape] = packed
            return packed
        packed = like.clone()
        for part, values in zip(_parts(_memory(packed), words), (_blocks(words), behind), strict=True):
            part.copy_(values)
        return packed


def _words(weight: Tensor) -> Tensor:
    """A weight as int32 (rows, words), padded."""
    more = [-side % _ROWS for side in weight.shape]
    if any(more) or weight.storage_offset() % 4:
        weight = F.pad(weight, (0, more[1], 0, more[0]))
    return weight.view(torch.int32)


def _blocks(words: Tensor) -> Tensor:
    return words.view(len(words) // _ROWS, _ROWS, -1, 16).permute(0, 2, 3, 1)


def _memory(packed: Tensor) -> Tensor:
    """The bytes of an opaque tensor as int32, whole words of them, for as long as that lives."""
    size = torch.ops.mkldnn._nbytes(packed) // 4
    return torch.frombuffer((ctypes.c_int32 * size).from_address(torch.ops.mkldnn.data_ptr(packed)), dtype=torch.int32)


def _parts(memory: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    weight, sums = memory.split([words.numel(), len(words)])
    return weight.view(len(words) // _ROWS, -1, 16, _ROWS), sums


def _is(memory: Tensor, words: Tensor, behind: Tensor) -> bool:
    if len(memory) != words.numel() + len(words):
        return False
    weight, sums = _parts(memory, words)
    return torch.equal(sums, behind) and torch.equal(weight, _blocks(words))


def _tells(words: Tensor) -> bool:
    """Whether most words, of those all over the weight, differ: zeros look the same in any layout."""
    step = words.numel() // _SAMPLED | 1  # odd: not one column over and over
    sampled = words.flatten()[::step].tolist()
    return 2 * len(set(sampled)) > len(sampled)
