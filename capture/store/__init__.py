"""The store: a directory of sealed, deduplicated units, one for each prompt."""
