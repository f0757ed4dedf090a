"""A float pipeline beside its integers: the same prompts and noise, pictures and numbers."""
