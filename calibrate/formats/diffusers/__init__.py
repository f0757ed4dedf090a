"""Format `diffusers`: a model directory that `from_pretrained` loads once octavo is imported."""
