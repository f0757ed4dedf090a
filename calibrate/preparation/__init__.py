"""Steps before the first replay: folds batch norms, makes synthetic inputs, finds layers that have to stay float."""
