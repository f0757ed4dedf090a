"""Format `sdnq`: a model directory that diffusers loads with the library sdnq and without Octavo."""
