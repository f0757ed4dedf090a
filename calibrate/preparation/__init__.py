"""Steps before the first replay of a model: folded batch norms, casts found, inputs made up."""
