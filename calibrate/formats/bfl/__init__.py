"""Format `bfl`: a model directory in the layout `fp8r` of Black Forest Labs, which diffusers loads without Octavo."""
