"""Checks that after `import octavo` diffusers knows the quantization method octavo, in either order of the imports."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOME = "diffusers.quantizers.auto"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


def test_diffusers_knows_the_method_when_it_comes_later_and_nothing_is_left_of_the_wait():
    code = f"import octavo, sys, {HOME} as home\n"
    code += "print('octavo' in home.AUTO_QUANTIZER_MAPPING, 'octavo' in home.AUTO_QUANTIZATION_CONFIG_MAPPING)\n"
    code += "print([f for f in sys.meta_path if 'octavo' in type(f).__module__], type(home.__loader__).__name__)"
    assert python(code).split("\n") == ["True True", "[] SourceFileLoader"]


@pytest.mark.slow
def test_the_quantizer_may_be_the_first_import():
    code = f"import octavo.calibrate.formats.diffusers.quantizer as ours, {HOME} as home\n"
    code += "print(home.AUTO_QUANTIZER_MAPPING['octavo'] is ours.OctavoQuantizer)\n"
    code += "print(home.AUTO_QUANTIZATION_CONFIG_MAPPING['octavo'] is ours.OctavoConfig)"
    assert python(code).split("\n") == ["True", "True"]


def test_importing_octavo_alone_imports_neither_torch_nor_diffusers():
    assert python("import sys, octavo; print({'torch', 'diffusers'} & set(sys.modules))") == "set()"
