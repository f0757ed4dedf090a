"""What happens to a model before the first replay: folded batch norms, casts found, inputs made up."""
