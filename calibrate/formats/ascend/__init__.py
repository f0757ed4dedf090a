"""Format `ascend`: the layout that msModelSlim writes and MindIE-SD loads."""
