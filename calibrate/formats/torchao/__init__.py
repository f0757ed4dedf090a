"""Format `torchao`: a model directory that diffusers loads with torchao and without Octavo."""
