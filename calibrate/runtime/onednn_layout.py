"""Packs weights of linear layers: copies them to oneDNN's layout for uint8 x int8 products, ten times as fast as
oneDNN's own function, which writes byte by byte.

In this layout, which oneDNN calls BA16a64b4a, a weight (out, in) is padded with zeros to multiples of 64 and cut into
blocks of 64 rows and 64 columns. A word is the four int8 values of four neighbouring columns of one row, so each row of
a block has 16 words. The words are stored in the order (out / 64, in / 64, 16, 64): block by block, and in a block word
by word for all 64 rows. The negated sum of each row follows, in int32.
"""

import ctypes
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 64  # number of rows, and of columns, in a block of the layout
_SAMPLED = 256  # number of words sampled from a weight to see whether its values differ enough to compare layouts


class Layouts:
    """Packs the weights of one model in oneDNN's layout.

    oneDNN's layout depends on the CPU, the shape of the weight and the version of oneDNN. So oneDNN packs the first
    weight of each shape. If the result is bit for bit what this class would write, this class packs all later weights
    of the shape itself, into a copy of the first result; otherwise oneDNN packs them too.
    """

    def __init__(self) -> None:
        self._same: WeakValueDictionary[torch.Size, Tensor] = WeakValueDictionary()

    def pack(self, weight: Tensor, sums: Tensor) -> Tensor:
        """Returns the contiguous int8 `weight` (out, in) in oneDNN's layout: an opaque tensor, as torch's
        `qlinear_prepack` returns it. `sums`: the sum of each row of the weight, int32 (out,)."""
        words = _words(weight)
        negated_sums = F.pad(sums, (0, len(words) - len(sums))).neg()
        template = self._same.get(weight.shape)
        if template is None:
            packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
            if _is_distinctive(words) and _has_layout(_memory(packed), words, negated_sums):
                self._same[weight.shape] = packed
            return packed
        packed = template.clone()
        for part, values in zip(_parts(_memory(packed), words), (_blocks(words), negated_sums), strict=True):
            part.copy_(values)
        return packed


def _words(weight: Tensor) -> Tensor:
    """Returns an int8 weight (rows, columns), padded with zeros to multiples of 64, as int32 words (rows, columns / 4).
    A word holds the four int8 values of four neighbouring columns of a row."""
    padding = [-side % _ROWS for side in weight.shape]
    if any(padding) or weight.storage_offset() % 4:
        weight = F.pad(weight, (0, padding[1], 0, padding[0]))
    return weight.view(torch.int32)


def _blocks(words: Tensor) -> Tensor:
    """Returns the words of a padded weight in the order of oneDNN's layout. A word is the int8 codes of four
    neighbouring columns of a row, so `words` is (rows, columns / 4). The result is (rows / 64, columns / 64, 16, 64),
    in blocks of 64 rows and 64 columns: the last two axes are the 16 words of a row in the block, and the block's 64
    rows."""
    return words.view(len(words) // _ROWS, _ROWS, -1, 16).permute(0, 2, 3, 1)


def _memory(packed: Tensor) -> Tensor:
    """Returns a view of the memory of the opaque tensor `packed` as int32 words (n,). The view may be used only while
    `packed` is alive."""
    size = torch.ops.mkldnn._nbytes(packed) // 4
    return torch.frombuffer((ctypes.c_int32 * size).from_address(torch.ops.mkldnn.data_ptr(packed)), dtype=torch.int32)


def _parts(memory: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Splits the int32 words of a packed weight's memory into two views: the weight, (rows / 64, columns / 64, 16, 64),
    and the negated sum of each row, (rows,). `words` (rows, columns / 4) is the padded weight with four int8 values in
    each int32 word; only its shape is used."""
    weight, sums = memory.split([words.numel(), len(words)])
    return weight.view(len(words) // _ROWS, -1, 16, _ROWS), sums


def _has_layout(memory: Tensor, words: Tensor, negated_sums: Tensor) -> bool:
    """Returns whether `memory` holds a weight exactly as the class Layouts would write it. `memory` has the int32 words
    of the memory of a weight that oneDNN packed. `words` (rows, columns / 4) is the same weight, padded but not packed,
    with four int8 values in each int32 word, and `negated_sums` (rows,) has the negated sum of each of its rows."""
    if len(memory) != words.numel() + len(words):
        return False
    weight, sums = _parts(memory, words)
    return torch.equal(sums, negated_sums) and torch.equal(weight, _blocks(words))


def _is_distinctive(words: Tensor) -> bool:
    """Returns whether the values of a weight differ enough to recognize a memory layout by them: a weight of zeros, for
    example, looks the same in every layout. True if more than half of about 256 sampled `words` (four int8 values each)
    are different values."""
    step = words.numel() // _SAMPLED | 1  # odd, so that the samples come from different columns
    sampled = words.flatten()[::step].tolist()
    return 2 * len(set(sampled)) > len(sampled)
