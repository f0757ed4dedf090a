"""The bundled pipeline: a small Stable Diffusion 3, its trainer, the scenes it draws and the judge of its pictures."""
