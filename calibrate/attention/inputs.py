"""Brings the arguments of F.scaled_dot_product_attention into one form, and computes the attention in float32."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of attention.

    | field   | meaning                                                                                              |
    |---------|------------------------------------------------------------------------------------------------------|
    | query   | (batch, heads, rows, width), in the dtype of the model                                               |
    | key     | (batch, heads, keys, width); where several query heads share a key head, it is repeated              |
    | value   | (batch, heads, keys, width of the output), repeated like the key                                     |
    | bias    | (batch, heads, rows, keys) float32, added to the scores, -infinity for masked keys; None if all zero |
    | scale   | the number that multiplies the scores                                                                |
    | grouped | whether several query heads share a key head                                                         |
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    scale: float
    grouped: bool = False

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> "Inputs":
        """Makes the Inputs from the arguments of F.scaled_dot_product_attention. `dropout_p` is ignored, because a
        calibration runs models in eval mode."""
        grouped = enable_gqa and key.shape[-3] != query.shape[-3]
        if grouped:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        bias = _bias(query, key, attn_mask, is_causal)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return cls(_by_batch(query), _by_batch(key), _by_batch(value), bias, scale, grouped)

    @property
    def heads(self) -> int:
        """The number of heads of the query."""
        return self.query.shape[1]

    @property
    def width(self) -> int:
        """The number of channels of a head of query and key."""
        return self.query.shape[-1]

    def of_heads(self, start: int, stop: int) -> "Inputs":
        """Returns the Inputs of the heads from `start` to `stop`, which is excluded."""
        bias = None if self.bias is None else self.bias[:, start:stop]
        query, key, value = (x[:, start:stop] for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, bias=bias)

    def bias_of(self, rows: Tensor) -> Tensor | None:
        """Returns the bias of the query rows with the positions `rows`."""
        return None if self.bias is None else self.bias[:, :, rows]


def _by_batch(x: Tensor) -> Tensor:
    """Reshapes `x` (..., rows, columns) to four axes: batch, heads, rows and columns."""
    return x[(None,) * max(0, 4 - x.ndim)].flatten(0, -4)


def _bias(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    shape = *query.shape[:-1], key.shape[-2]
    if is_causal:
        mask = torch.ones(shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    else:
        bias = mask.to(torch.float32)
    return _by_batch(bias.expand(shape)) if bool(bias.any()) else None


def weights_of(scores: Tensor) -> Tensor:
    """Returns the softmax of `scores` (..., rows, keys) in their dtype. Rows whose scores are all -infinity become
    zeros, as in torch's attention."""
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest.masked_fill(largest == -torch.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Returns softmax(query @ transposed key * scale + bias) @ value, (batch, heads, rows, width of the value), in
    float32. `query` is (batch, heads, rows, width), `key` (batch, heads, keys, width), `value` (batch, heads, keys, its
    own width), and `bias` (batch, heads, rows, keys) or None."""
    scores = query.to(torch.float32) @ key.to(torch.float32).transpose(-1, -2) * scale
    return weights_of(scores if bias is None else scores + bias) @ value.to(torch.float32)
