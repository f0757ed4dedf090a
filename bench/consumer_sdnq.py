"""Shows that diffusers with the library sdnq, and without Octavo, loads and computes directories in format `sdnq`.

    python -m bench.consumer_sdnq [FOLDER]

sdnq (GPL-3.0) is not part of this project: it is installed into a folder of its own and runs in a process of its own,
on the CPU. For a tiny model of each family the program writes the files and lets diffusers load them with
from_pretrained. It checks that no tensor is missing or left over; that the integers and scales are those that were
written; and that each layer computes what Octavo's layer computes. With 64 rows sdnq multiplies integers, as Octavo
does, but it divides by the scale of a token in the order max / 127 and adds the bias before it rounds to the dtype.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

PACKAGES = ("sdnq==0.2.8",)
SCHEMES = {"W8A8_DYNAMIC": torch.float32, "W8A16": torch.bfloat16}
LEAST = {torch.float32: 100.0, torch.bfloat16: 45.0}  # dB of a layer's output; bfloat16 itself has about 50


def prove(folder: Path) -> list[tuple[str, str, bool, str]]:
    """Returns for each family and scheme the name, how it was shown, whether sdnq agrees, and the fact in words. Files
    are written to `folder`."""
    from .consumer_environment import installed, run
    from .consumer_models import FAMILIES, written

    packages, rows = installed("sdnq", PACKAGES), []
    for family in FAMILIES:
        for scheme, dtype in SCHEMES.items():
            out = folder / "sdnq" / f"{family}-{scheme}" / "out"
            kind = type(written(family, "sdnq", scheme, out, dtype)).__name__
            report = run("bench.consumer_sdnq", packages, "--child", out, kind, SDNQ_USE_TORCH_COMPILE="0")
            facts = json.loads(report.splitlines()[-1])
            ok = facts["equal"] and facts["unmatched"] == 0 and facts["compared"] and facts["least"] > LEAST[dtype]
            word = str(dtype).removeprefix("torch.")
            fact = f"{scheme} in {word}: {facts['layers']} layers with the integers and scales that were written, "
            fact += (
                f"{facts['unmatched']} tensors missing or left over, outputs of layers agree to {facts['least']:.0f} dB"
            )
            rows.append((family, "computed", bool(ok), fact))
    return rows


@torch.inference_mode()
def child(out: Path, kind: str) -> None:
    """Loads the directory `out` with diffusers' class `kind` and sdnq, and prints what was found as JSON."""
    import diffusers

    from .consumer_models import REFERENCE

    reference = torch.load(out.parent / REFERENCE)
    dtype = next(iter(reference.values()))["x"].dtype
    model, info = getattr(diffusers, kind).from_pretrained(out, torch_dtype=dtype, output_loading_info=True)
    assert "octavo" not in type(model.hf_quantizer).__module__
    equal, compared, least = True, 0, 400.0
    for name, layer in reference.items():
        theirs, ours = model.get_submodule(name), layer["tensors"]
        assert type(theirs).__name__ == "SDNQLinear", name
        across = theirs.sdnq_dequantizer.use_quantized_matmul
        weight = theirs.weight.t() if across else theirs.weight
        equal &= torch.equal(weight, ours["weight"]) and torch.equal(theirs.scale.flatten(), ours["weight_scale"])
        if across or layer["scheme"] == "W8A16":  # sdnq keeps the inputs of small W8A8_DYNAMIC layers float
            compared, least = compared + 1, min(least, _decibels(layer["y"], theirs(layer["x"])))
    unmatched = sum(len(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    facts = {"layers": len(reference), "equal": equal, "unmatched": unmatched, "compared": compared, "least": least}
    print(json.dumps(facts))


def _decibels(exact: torch.Tensor, other: torch.Tensor) -> float:
    error = (exact.double() - other.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / error.clamp_min(1e-30)))


def main() -> None:
    """Runs the proof and prints a line for each family, or loads one directory in the child process."""
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3])
        return
    with tempfile.TemporaryDirectory() as temporary:
        for family, how, ok, fact in prove(Path(sys.argv[1] if sys.argv[1:] else temporary)):
            print(f"{family:<12} {how:<9} {'yes' if ok else 'NO':<4} {fact}", flush=True)


if __name__ == "__main__":
    main()
