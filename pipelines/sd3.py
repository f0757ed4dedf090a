"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206, 2024): SD3Transformer2DModel."""

from .family import Family

SD3 = Family(
    name="sd3",
    pipelines=("StableDiffusion3",),
    defaults={"num_inference_steps": 28, "output_type": "latent"},
    keep_float={
        "pos_embed.*": "patch embedding: few operations, every token depends on it",
        "time_text_embed.*": "timestep and text embedder: one row per sample",
        "context_embedder": "text embedder: wide range of the text states",
        "norm_out.*": "output modulation: one row per sample",
        "proj_out": "output projection: its error is the output's",
    },
)
