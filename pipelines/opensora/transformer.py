"""STDiT3, the denoiser of Open-Sora 1.2 (Zheng et al., Open-Sora: Democratizing Efficient Video Production, 2024)."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from octavo.capture.errors import MisfitError, UsageError

from .attention import Captions, captions_of_lengths, pack_captions
from .blocks import FinalLayer, STDiT3Block
from .embedders import CaptionEmbedder, PatchEmbedder, RotaryFrequencies, ScalarEmbedder, position_table


class STDiT3(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both declare config_name
    """Alternating spatial and temporal blocks over patches of latent frames; predicts the rectified-flow velocity.

    Parameter names and shapes are those of hpcai-tech/OpenSora-STDiT-v3. Fields of the config that only concern
    training or kernels, such as class_dropout_prob, are kept and change nothing. If the field skip_y_embedder is True,
    the caller embeds the captions: the argument y is then their tokens, packed without padding, (1, sum of lengths, C),
    and the argument mask has the lengths.
    """

    _no_split_modules = ["STDiT3Block"]  # type: ignore[assignment]  # noqa: RUF012 - the form diffusers reads
    _repeated_blocks = ["STDiT3Block"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        input_size: Sequence[int | None] = (None, None, None),
        input_sq_size: int = 512,
        in_channels: int = 4,
        patch_size: Sequence[int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        pred_sigma: bool = True,
        drop_path: float = 0.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
        enable_flash_attn: bool = False,
        enable_layernorm_kernel: bool = False,
        enable_sequence_parallelism: bool = False,
        only_train_temporal: bool = False,
        freeze_y_embedder: bool = False,
        skip_y_embedder: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % 4 or hidden_size % (2 * num_heads):
            raise MisfitError(
                f"hidden_size: {hidden_size} does not split into {num_heads} heads of an even width, or is no multiple "
                "of 4. Change hidden_size or num_heads.",
            )
        self.patch = (patch_size[0], patch_size[1], patch_size[2])
        self.out_channels = in_channels * 2 if pred_sigma else in_channels
        self.rope = RotaryFrequencies(hidden_size // num_heads)
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, self.patch)
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.fps_embedder = ScalarEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        sizes = (hidden_size, num_heads, mlp_ratio, qk_norm)
        self.spatial_blocks = nn.ModuleList(STDiT3Block(*sizes, temporal=False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(*sizes, temporal=True) for _ in range(depth))
        values = self.patch[0] * self.patch[1] * self.patch[2] * self.out_channels
        self.final_layer = FinalLayer(hidden_size, values)
        initialize(self)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        """Returns (B, out, T, H, W) in float32: the first half of the channels is the velocity, the rest is unused. x
        (B, in, T, H, W) has B samples of T latent frames with `in` channels. timestep (B,) is 0 (clean) to 1000
        (noise); y (B, 1, L, E), captions of L states with E channels; mask (n, L), 0 for padding in y, is repeated from
        n to B rows; x_mask (B, T), False for clean frames. fps (frames per second), height and width (pixels) must be
        given, each (m,). n and m divide B. num_frames and ar are ignored."""
        if fps is None or height is None or width is None:
            raise UsageError("forward: fps, height or width is missing. Pass all three as tensors.")
        dtype = self.x_embedder.proj.weight.dtype
        size = x.shape[2:]
        t, t0 = self._times(timestep.to(dtype), fps, x_mask is not None)
        captions = self._captions(y.to(dtype), mask)
        modulation = self.t_block(t)[:, None]  # (B, 1, 6C)
        if t0 is not None and x_mask is not None:
            x_mask = x_mask.to(device=t.device, dtype=torch.bool)
            modulation = torch.where(x_mask[:, :, None], modulation, self.t_block(t0)[:, None])  # (B, T, 6C)
        modulation = modulation.unflatten(-1, (6, -1))
        x = self.x_embedder(x.to(dtype))  # (B, C, T, H, W)
        grid = x.shape[2:]
        scale = (float(height.flatten()[0]) * float(width.flatten()[0])) ** 0.5 / self.config["input_sq_size"]
        x = x.flatten(3).permute(0, 2, 3, 1).contiguous()  # (B, T, S, C)
        x = x + position_table(grid[1], grid[2], x.shape[-1], scale, x)
        rotation = self.rope(grid[0])
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, captions, modulation)
            x = temporal(x, captions, modulation, rotation)
        x = self.final_layer(x, t, t0, x_mask)
        return self._unpatchify(x, grid)[:, :, : size[0], : size[1], : size[2]].float()

    def _times(self, timestep: Tensor, fps: Tensor, clean: bool) -> tuple[Tensor, Tensor | None]:
        """Returns the sum of the embeddings of `timestep` (the time) and `fps`, (B, C), for B samples and C channels.
        If `clean` is True, also returns the sum for time 0, for frames that are taken as clean; else None."""
        rate = self.fps_embedder(fps.flatten().to(timestep.device), timestep.dtype)
        rate = rate.repeat(timestep.shape[0] // rate.shape[0], 1)
        t = self.t_embedder(timestep, timestep.dtype) + rate
        return t, self.t_embedder(torch.zeros_like(timestep), timestep.dtype) + rate if clean else None

    def _captions(self, y: Tensor, mask: Tensor | None) -> Captions:
        if self.config["skip_y_embedder"]:
            if mask is None:
                raise UsageError("mask: it is missing. With skip_y_embedder, pass the lengths of the captions as mask.")
            return captions_of_lengths(y.reshape(1, -1, y.shape[-1]), torch.as_tensor(mask).flatten().long())
        return pack_captions(self.y_embedder(y).squeeze(1), mask)

    def _unpatchify(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Joins patches: (B, T, H * W, pt * ph * pw * out) to (B, out, T * pt, H * ph, W * pw).

        `grid` is (T, H, W), the number of patches along each axis. A patch has pt x ph x pw positions; in its values
        the channel changes fastest.
        """
        x = x.unflatten(-1, (*self.patch, self.out_channels)).unflatten(2, (grid[1], grid[2]))
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def initialize(model: STDiT3) -> None:
    """Sets the values that training starts from: xavier-uniform weights and zero biases. The weight of the last layer
    is zero in fps_embedder. In each temporal block, the weight of the last layer is zero in the self-attention, the
    cross-attention and the MLP. So these modules add nothing at first."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    silent = r"fps_embedder\.mlp\.2|temporal_blocks\.\d+\.(attn\.proj|cross_attn\.proj|mlp\.fc2)"
    for name, parameter in model.named_parameters():
        if re.fullmatch(rf"({silent})\.weight", name):
            nn.init.zeros_(parameter)
