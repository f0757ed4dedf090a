"""The `torch.save` lists of calls that msModelSlim documents: read as data, never as code, and written."""
