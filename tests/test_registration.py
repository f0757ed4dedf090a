"""With `import octavo`, whatever is imported first, diffusers knows our checkpoints; without it, it says so."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOME = "diffusers.quantizers.auto"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    ["import octavo, diffusers", "import diffusers, octavo", f"import {HOME}, octavo", f"import octavo, {HOME}"],
)
def test_diffusers_knows_the_method_in_any_order(imports):
    code = f"{imports}\nfrom {HOME} import *\nimport sys\n"
    code += "print('octavo' in AUTO_QUANTIZER_MAPPING, 'octavo' in AUTO_QUANTIZATION_CONFIG_MAPPING)\n"
    code += "print([f for f in sys.meta_path if 'octavo' in type(f).__module__])\n"
    code += f"print(type(sys.modules['{HOME}'].__loader__).__name__)"
    assert python(code).split("\n") == ["True True", "[]", "SourceFileLoader"]


def test_importing_octavo_alone_imports_neither_torch_nor_diffusers():
    assert python("import sys, octavo; print({'torch', 'diffusers'} & set(sys.modules))") == "set()"
