"""Trains the bundled pipeline and writes it to pipelines/demo/model: `python -m octavo.pipelines.demo.train --help`.

There are three stages, and an interrupted run continues from the files in the work directory. First a small KL
autoencoder is trained on drawn pictures. Then it encodes every training scene to latents. Last, an SD3 transformer and
two CLIP text encoders are trained together on these latents, by rectified flow (Esser et al., Scaling Rectified Flow
Transformers, arXiv 2403.03206, 2024). Pictures are drawn by code and every seed is fixed; nothing is downloaded.
"""

import copy
import json
import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from .scene import COLOURS, RELATIONS, SHAPES, Scene, split

MODEL = Path(__file__).parent / "model"
MAX_TOKENS = 20  # tokens of a padded prompt
T5_TOKENS = 256  # zero tokens that StableDiffusion3Pipeline appends when there is no T5 encoder


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Makes a CLIP BPE tokenizer and saves it to `folder`.

    Each word of the scenes' prompts is one token; other words have several.
    """
    words = " ".join([*COLOURS, *SHAPES, *RELATIONS, "a an on background"]).split()
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    vocab = alphabet + [c + "</w>" for c in alphabet]
    merges: list[Any] = []
    for word in sorted(set(words)):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = next((p for p in merges if p in pairwise(parts)), (parts[0], parts[1]))
            if pair not in merges:
                merges.append(pair)
                vocab.append("".join(pair))
            index = next(i for i in range(len(parts) - 1) if (parts[i], parts[i + 1]) == pair)
            parts[index : index + 2] = ["".join(pair)]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    words_as_tokens = CLIPTokenizer({t: i for i, t in enumerate(vocab)}, merges, model_max_length=MAX_TOKENS)
    words_as_tokens.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def text_encoder(tokens: CLIPTokenizer, width: int, projection: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokens), hidden_size=width, intermediate_size=4 * width, projection_dim=projection,
            num_hidden_layers=3, num_attention_heads=width // 32, max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
        )
    )  # fmt: skip


def autoencoder() -> Any:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=8, norm_num_groups=8, sample_size=64,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip


def transformer() -> Any:
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=8, out_channels=8, num_layers=4, attention_head_dim=32,
        num_attention_heads=5, joint_attention_dim=160, caption_projection_dim=160, pooled_projection_dim=128,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip


class CountedTokenProcessor:
    """Computes attention in which the last context token counts as T5_TOKENS (256) equal tokens.

    At inference the context ends with 256 zero tokens, in training with a single zero token that stands for all of
    these. Because n equal keys act as one key whose logit is larger by log n, log 256 is added to the logits of the
    single token. So training computes the same function as inference.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        image = [heads(p(hidden_states)) for p in (attn.to_q, attn.to_k, attn.to_v)]
        text = [heads(p(encoder_hidden_states)) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        image[:2] = attn.norm_q(image[0]), attn.norm_k(image[1])
        text[:2] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
        bias = torch.zeros(1, 1, 1, k.shape[2])
        bias[..., -1] = math.log(T5_TOKENS)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        tokens = hidden_states.shape[1]
        context = out[:, tokens:]
        return attn.to_out[0](out[:, :tokens]), context if attn.context_pre_only else attn.to_add_out(context)


def drawn(scenes: list[Scene], seed: int) -> Tensor:
    """Draws pictures of `scenes`, each shape moved and both resized a little: (n, 3, 64, 64) in [-1, 1]. `seed`
    determines the moves and sizes."""
    rng = np.random.default_rng(seed)
    pictures = [scene.draw(rng.uniform(-1.5, 1.5, (2, 2)), rng.uniform(-0.5, 0.5)) for scene in scenes]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def rate(step: int, cycle: int, peak: float) -> float:
    """Returns the learning rate at `step`. In each cycle of `cycle` steps it rises linearly to `peak` over 200 steps,
    then falls as a cosine to peak / 100 (Loshchilov and Hutter, SGDR, arXiv 1608.03983, 2016)."""
    step %= cycle
    warm = min(1.0, (step + 1) / 200)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / cycle)))


class Run:
    """A training loop over the parameters of `modules`. Iterating yields pairs: the number of a step, and a random
    generator seeded with this number.

    After each `every` steps the loop prints its progress and saves weights and optimizer to `file`, from which it also
    resumes. `peak` is the largest learning rate, and `cycle` the number of steps after which the rate rises again. The
    attribute `average` is a copy of `modules` with the moving average of their weights.
    """

    def __init__(
        self, file: Path, modules: nn.ModuleDict, steps: int, peak: float, cycle: int, every: int = 100
    ) -> None:
        self.file, self.modules, self.steps = file, modules, steps
        self.peak, self.cycle, self.every = peak, cycle, every
        self.average = copy.deepcopy(modules).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(modules.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.02, fused=True)
        self.start = 0
        if file.exists():
            state = torch.load(file, weights_only=True)
            modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.start = state["step"]

    def __iter__(self) -> Iterator[tuple[int, torch.Generator]]:
        began, done = time.monotonic(), self.start
        for step in range(self.start, self.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = rate(step, self.cycle, self.peak)
            yield step, torch.Generator().manual_seed(step)
            if (step + 1) % self.every == 0 or step + 1 == self.steps:
                self.save(step + 1)
                left = (time.monotonic() - began) / (step + 1 - done) * (self.steps - step - 1)
                print(
                    f"{self.file.stem}: step {step + 1}/{self.steps}, loss {self.loss:.4f}, {left / 60:.0f} min left",
                    flush=True,
                )

    def update(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        step = self.optimizer.state[next(iter(self.optimizer.state))]["step"].item()
        decay = min(0.999, (1 + step) / (10 + step))
        for mean, value in zip(self.average.parameters(), self.modules.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - decay)
        self.loss = 0.98 * getattr(self, "loss", loss.item()) + 0.02 * loss.item()

    def save(self, step: int) -> None:
        state = {"modules": self.modules.state_dict(), "average": self.average.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "step": step}  # fmt: skip
        torch.save(state, self.file.with_suffix(".part"))
        self.file.with_suffix(".part").replace(self.file)


def train_autoencoder(work: Path, scenes: list[Scene], steps: int) -> Any:
    run = Run(work / "vae.pt", nn.ModuleDict({"vae": autoencoder()}), steps, 2e-3, cycle=steps)
    vae: Any = run.modules["vae"]
    for step, rng in run:
        chosen = torch.randint(len(scenes), (32,), generator=rng)
        pictures = drawn([scenes[i] for i in chosen], seed=step)
        posterior = vae.encode(pictures).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
        error = vae.decode(latents).sample - pictures
        # a small shape is a fiftieth of the picture: its surroundings weigh eight times as much as plain background
        shape = (pictures - pictures[:, :, :1, :1]).abs().amax(1, keepdim=True).gt(0.02).float()
        weight = 1.0 + 7.0 * F.max_pool2d(shape, 5, stride=1, padding=2)
        error = error * (weight / weight.mean((2, 3), keepdim=True))
        run.update(error.abs().mean() + error.square().mean() + 1e-4 * posterior.kl().mean() / 64)
    return run.average["vae"]


@torch.no_grad()
def encode(vae: Any, scenes: list[Scene], work: Path, copies: int) -> Tensor:
    """Returns the latents of all n scenes, each drawn `copies` times: (copies, n, 8, 16, 16), scaled to mean 0 and
    standard deviation 1.

    Stores the unscaled latents in `work`, or reads them from there if they exist. Sets the scaling in the config of
    `vae`.
    """
    file = work / "latents.pt"
    if not file.exists():
        batches = []
        for copy_ in range(copies):
            for start in range(0, len(scenes), 256):
                batch = drawn(scenes[start : start + 256], seed=copy_ * 1_000_000 + start)
                batches.append(vae.encode(batch).latent_dist.mean)
            print(f"latents: {copy_ + 1}/{copies}", flush=True)
        torch.save(torch.cat(batches).view(copies, len(scenes), 8, 16, 16), file)
    latents = torch.load(file, weights_only=True)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def text_states(ids: Tensor, modules: nn.ModuleDict) -> tuple[Tensor, Tensor]:
    """Returns the transformer's text inputs for token `ids` (n, 20): states (n, 21, 160) and pooled (n, 128).

    `modules` has the two text encoders. The last state is the zero token that stands for the T5_TOKENS zero tokens of
    inference.
    """
    encoded = [modules[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    states = torch.cat([e.hidden_states[-2] for e in encoded], dim=-1)
    return F.pad(states, (0, 0, 0, 1)), torch.cat([e.text_embeds for e in encoded], dim=-1)


def train_transformer(
    work: Path, scenes: list[Scene], latents: Tensor, tokens: CLIPTokenizer, steps: int
) -> nn.ModuleDict:
    modules = nn.ModuleDict({
        "transformer": transformer(),
        "text_encoder": text_encoder(tokens, 64, 48),
        "text_encoder_2": text_encoder(tokens, 96, 80),
    })  # fmt: skip
    model: Any = modules["transformer"]
    model.set_attn_processor(CountedTokenProcessor())
    run = Run(work / "transformer.pt", modules, steps, 1e-3, cycle=1500)
    padded = dict(padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids = tokens([str(s) for s in scenes], **padded).input_ids
    empty = tokens("", **padded).input_ids
    for _, rng in run:
        index = torch.randint(len(scenes), (64,), generator=rng)
        clean = latents[torch.randint(len(latents), (64,), generator=rng), index]
        captions = torch.where(torch.rand(64, 1, generator=rng) < 0.1, empty, ids[index])
        noise = torch.randn(clean.shape, generator=rng)
        sigma = torch.sigmoid(torch.randn(64, generator=rng) + 0.3)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
        states, pooled = text_states(captions, modules)
        velocity = model(
            hidden_states=noisy, encoder_hidden_states=states, pooled_projections=pooled,
            timestep=1000 * sigma, return_dict=False,
        )[0]  # fmt: skip
        run.update(F.mse_loss(velocity, noise - clean))
    trained: Any = run.average["transformer"]
    trained.set_attn_processor(JointAttnProcessor2_0())
    return run.average


def assemble(vae: Any, parts: nn.ModuleDict, tokens: CLIPTokenizer) -> Any:
    return StableDiffusion3Pipeline(
        transformer=parts["transformer"], vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        text_encoder=parts["text_encoder"], tokenizer=tokens,
        text_encoder_2=parts["text_encoder_2"], tokenizer_2=tokens,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


@click.command()
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("build/demo"), help="Checkpoints; reused on the next start."
)
@click.option("--out", type=click.Path(path_type=Path), default=MODEL, help="Where the pipeline is written.")
@click.option("--vae-steps", default=1200, show_default=True)
@click.option("--steps", default=3000, show_default=True, help="Steps of the transformer, 64 pictures each.")
@click.option("--copies", default=1, show_default=True, help="How often each training scene is drawn.")
def main(work: Path, out: Path, vae_steps: int, steps: int, copies: int) -> None:
    """Train the bundled text-to-image pipeline on the CPU (about 50 minutes on two cores)."""
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    scenes, _ = split()
    tokens = tokenizer(work / "tokenizer")
    vae = train_autoencoder(work, scenes, vae_steps)
    latents = encode(vae, scenes, work, copies)
    parts = train_transformer(work, scenes, latents, tokens, steps)
    assemble(vae, parts, tokens).to(torch.float16).save_pretrained(out)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(json.dumps({"out": str(out), "bytes": size}))


if __name__ == "__main__":
    main()
