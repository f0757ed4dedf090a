"""Chooses the float operators of accelerated models on a CPU by measuring them on this processor for a few
milliseconds.

Feature flags do not say which kernel is fastest: bfloat16 products are twice as fast as float32 on one processor with
AVX512_BF16 and half as fast on another. So the first use of a dtype measures the candidates on small inputs, once in a
process. All threads and all later calls get the same answer.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.capture.tensors import dtype_name

from .attention import ATTENTION, CANDIDATES, DTYPES

LEAST_SCORES = 1 << 11  # with fewer scores in a head, torch's attention always serves: calls are too short to gain
LEAST_ROWS = 16  # products of fewer rows keep their dtype: converting the weight would take longer than the product
MANY_ROWS = 256  # from this number of rows on a product has the choice of the measurement with so many rows
# size classes of attention by name: the number of scores in a head at which a class begins, and the heads, rows and
# keys of its measurement. With few heads all inputs would stay in the cache; torch's kernel works in larger
# pieces from 768 rows on.
_SIZES = {
    "small": (LEAST_SCORES, (4, 64, 64)),
    "medium": (1 << 15, (2, 256, 256)),
    "large": (1 << 18, (1, 768, 512)),
}
_WIDTH = 64  # width of a head in a measurement
_CLEAR = 0.9  # a candidate is chosen if it takes less than this part of torch's time; less is noise of a busy machine
_HOPELESS = 1.5  # a candidate that took this many times as long as the fastest is not measured again
_ROUNDS, _SECONDS = 5, 0.005  # a measurement ends after so many rounds, or after two once it took so many seconds

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_measured: dict[torch.dtype, "Times"] = {}


class Times(NamedTuple):
    """The measured seconds of each candidate, a way to compute the same output, for inputs of one dtype; infinity for a
    candidate that failed.

    `attention`: a dict from size class to the seconds of the candidates for attention (keys of CANDIDATES). `products`:
    a dict from kind of float layer to the seconds of its candidates, which are two dtypes: that of the inputs, and
    float32. The kinds are "few rows" and "many rows" (linear layers with such inputs) and "convolution". If the inputs
    are float32, the dict is empty.
    """

    attention: dict[str, dict[str, float]]
    products: dict[str, dict[str, float]]


def fastest(times: Mapping[str, float]) -> str:
    """Returns the name of the candidate to use: the fastest if it takes less than 90 % of the time of the first, which
    is torch's own; otherwise the first. `times` is a dict from name to seconds."""
    first, best = next(iter(times)), min(times, key=times.__getitem__)
    return best if times[best] < _CLEAR * times[first] else first


def size_class(scores: int) -> str:
    """Returns the size class of a call of attention with `scores` scores (rows times keys) in a head: "small", "medium"
    from 2**15 scores on, or "large" from 2**18 on."""
    return next((name for name, (least, _) in reversed(_SIZES.items()) if scores >= least), "small")


def attention_for(dtype: torch.dtype, size: str, word: str) -> str:
    """Returns the way to compute attention that is fastest for inputs of `dtype` and `size`, a size class: "small",
    "medium" or "large". The result is a key of CANDIDATES, such as "torch" or "integers". `word`, a key of ATTENTION,
    says which candidates are allowed: "auto" allows all, "float" all but integers."""
    allowed = ATTENTION[word]
    return allowed[0] if len(allowed) == 1 else choose_attention(times_of(dtype), size, word)


def choose_attention(times: Times, size: str, word: str = "auto") -> str:
    """Returns the candidate with which to compute attention, by the seconds in `times` for `size`, a size class
    ("small", "medium" or "large"): the fastest, or torch's own unless the fastest takes less than 90 % of its time.
    `word`, a key of ATTENTION, says which candidates are allowed: "auto" allows all, "float" all but integers."""
    return fastest({name: seconds for name, seconds in times.attention[size].items() if name in ATTENTION[word]})


def in_float32(dtype: torch.dtype, kind: str) -> bool:
    """Returns whether float layers should compute in float32 for inputs of `dtype`, because that was measured to be
    faster on this processor. `kind` says which layers: "few rows" or "many rows" (linear layers with so many rows in
    the input), or "convolution". Returns False if `dtype` is float32 itself."""
    return dtype in DTYPES[1:] and fastest(times_of(dtype).products[kind]) == "float32"


def linear_in_float32(dtype: torch.dtype, rows: int) -> bool:
    """Returns whether a linear layer should compute in float32 for an input of `dtype` with `rows` rows, because that
    was measured to be faster. Returns False for fewer than 16 rows (LEAST_ROWS), because converting the weight would
    then take longer than it saves."""
    return rows >= LEAST_ROWS and in_float32(dtype, "many rows" if rows >= MANY_ROWS else "few rows")


def attention_gains(dtype: torch.dtype, word: str) -> bool:
    """Returns whether, for inputs of `dtype` of some size, a candidate for attention is faster than torch's own
    function. `word`, a key of ATTENTION, says which candidates are allowed: "auto" allows all, "float" all but
    integers."""
    return any(attention_for(dtype, size, word) != "torch" for size in _SIZES)


def times_of(dtype: torch.dtype) -> Times:
    """Returns the measured seconds of every way to compute attention and float layers for inputs of `dtype`. The first
    call for a dtype measures them, and logs which way is the fastest."""
    if dtype not in _measured:
        with _lock:
            if dtype not in _measured:
                start = time.perf_counter()
                times = _measure_all(dtype)
                seconds = time.perf_counter() - start
                _log.info("%s (measured in %.0f ms)", describe(dtype, times), 1000 * seconds)
                _measured[dtype] = times
    return _measured[dtype]


def describe(dtype: torch.dtype, times: Times) -> str:
    """Returns a line of text: which implementation of attention and which dtype for float layers are the fastest for
    inputs of `dtype`, by the seconds in `times`."""
    attention = {size: choose_attention(times, size) for size in _SIZES}
    words = [f"attention by {_joined(attention)}"]
    if times.products:
        words.append(f"float layers in {_joined({kind: fastest(each) for kind, each in times.products.items()})}")
    return f"{dtype_name(dtype)}: {', '.join(words)}"


def _joined(choices: Mapping[str, str]) -> str:
    if len(set(choices.values())) == 1:
        return next(iter(choices.values()))
    return "; ".join(f"{choice} ({name})" for name, choice in choices.items())


@torch.no_grad()
def _measure_all(dtype: torch.dtype) -> Times:
    # modes of the caller, such as a default device or autocast, must not change what is measured
    with torch._C.DisableTorchFunction(), torch.autocast("cpu", enabled=False), one_thread():
        attention = {size: measure(_attentions(dtype, *shape)) for size, (_, shape) in _SIZES.items()}
        kinds: dict[str, Callable[..., Tensor]] = {} if dtype == torch.float32 else _PRODUCTS
        return Times(attention, {kind: measure(_products(dtype, kind)) for kind in kinds})


@contextmanager
def one_thread() -> Iterator[None]:
    """Makes torch compute with one thread inside the `with` statement. With several threads, a thread that another
    process keeps from running would make the others wait, so that on a busy machine all candidates would seem equally
    slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Returns a dict from the name of each function to the seconds of processor time that a call takes in the calling
    thread: the least of several calls, after one to warm up. The functions are called in turn. The time of a function
    that raises an exception is infinity."""
    times = {name: math.inf for name in functions}
    left = {name: function for name, function in functions.items() if _seconds(name, function) < math.inf}
    start = time.perf_counter()
    for number in range(_ROUNDS):
        for name, function in left.items():
            times[name] = min(times[name], _seconds(name, function))
        best = min(times.values(), default=math.inf)
        left = {name: left[name] for name in left if times[name] <= _HOPELESS * best or name == next(iter(functions))}
        if number and time.perf_counter() - start > _SECONDS:
            break
    return times


def _seconds(name: str, function: Callable[[], Any]) -> float:
    start = time.thread_time()
    try:
        function()
    except Exception as error:
        _log.debug("%s: cannot run here: %s: %s", name, type(error).__name__, error)
        return math.inf
    return time.thread_time() - start


def _randn(*shape: int) -> Tensor:
    # a generator of its own leaves the state of torch's generators as it is
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")


def _attentions(dtype: torch.dtype, heads: int, rows: int, keys: int) -> dict[str, Callable[[], Any]]:
    """Returns a dict from the name of each candidate that fits `dtype` to a function without arguments. The function
    computes attention on `heads` heads with `rows` queries and `keys` keys each. Its inputs lie in memory as in models,
    with the numbers of all heads of a token side by side."""
    shapes = [(1, length, heads, _WIDTH) for length in (rows, keys, keys)]
    inputs = [_randn(*shape).to(dtype).transpose(1, 2) for shape in shapes]
    return {name: partial(each.run, *inputs) for name, each in CANDIDATES.items() if each.fits(dtype)}


def _products(dtype: torch.dtype, kind: str) -> dict[str, Callable[[], Any]]:
    """Returns two functions without arguments that compute the same float layer on inputs of `dtype`, one in `dtype`
    and one in float32. The result is a dict from the name of this dtype, such as "bfloat16" or "float32", to the
    function. `kind` is the kind of the layer: "few rows" or "many rows" (linear layers with so many rows in the input),
    or "convolution"."""
    function = _PRODUCTS[kind]
    if kind == "convolution":
        inputs = _randn(1, 16, 16, 16).to(dtype), _randn(64, 16, 2, 2).to(dtype), _randn(64).to(dtype)
    else:
        rows = MANY_ROWS if kind == "many rows" else LEAST_ROWS
        inputs = _randn(rows, 128).to(dtype), _randn(256, 128).to(dtype), _randn(256).to(dtype)
    return {dtype_name(dtype): partial(function, *inputs), "float32": partial(by_float32, function, *inputs)}


def by_float32(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any) -> Tensor:
    """Computes `function`, a linear layer or a convolution of `x` with `weight` and `bias`, in float32 and returns the
    output in the dtype of `x`. `more` are further arguments, such as the stride."""
    y = function(x.float(), weight.float(), None if bias is None else bias.float(), *more)
    return y.to(x.dtype)


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "few rows": F.linear,
    "many rows": F.linear,
    "convolution": F.conv2d,
}
