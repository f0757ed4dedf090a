"""Constants of the Open-Sora family, for all its models; importing them does not need torch."""

# fnmatch patterns of module names that stay float: all Linears outside the blocks. These Linears take a few rows a call
# (embedders, t_block) or write the velocity itself (final_layer).
KEEP_FLOAT = ("x_embedder*", "t_embedder*", "fps_embedder*", "t_block*", "y_embedder*", "final_layer*")

# The transformer works on z = (z_vae - shift) / scale, with one number for each latent channel.
LATENT_SHIFT = (-0.10, 0.34, 0.27, 0.98)
LATENT_SCALE = (3.85, 2.32, 2.33, 3.06)

VAE_FACTOR = 8  # pixels of one latent position along height and width
IMAGE_FPS = 120  # frames per second that the fps input has for a single image
ALIGN = 5  # latent frames of one 17-frame clip of the temporal VAE; conditioning frames start at its multiples
