"""Checks that packages import each other in one direction, that light modules import no torch, and that code stays
short."""

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("capture", "calibrate", "pipelines", "prompts")  # folders at the root, links inside octavo/
# The packages that each package may import.
ALLOWED = {
    "octavo.capture": set(),
    "octavo.prompts": {"octavo.capture"},
    "octavo.pipelines": {"octavo.capture"},
    "octavo.calibrate": {"octavo.capture"},
    "octavo": {"octavo.capture", "octavo.prompts", "octavo.pipelines", "octavo.calibrate"},
    "tests": {"octavo", "octavo.capture", "octavo.prompts", "octavo.pipelines", "octavo.calibrate"},
    "bench": {"octavo", "octavo.capture", "octavo.prompts", "octavo.pipelines", "octavo.calibrate", "tests"},
}


# The parts of octavo/calibrate. A part may import those of the lines above its own.
ORDER = (
    {"errors", "byte_sizes", "resources", "report_file", "torch_state", "native"},
    {"layers"},
    {"given_model"},
    {"replay", "plan", "runtime"},
    {"observers", "choice", "preparation", "attention"},
    {"result", "smoothing", "rounding", "mixed_precision"},
    {"settings", "formats"},
    {"guard", "error_causes"},
    {"report"},
    {"choose"},
    {"learning_curve", "part"},
    {"advice"},
    {"calibration"},
    {"blockwise", "msmodelslim_api"},
)
# Base classes of torch and diffusers require these signatures.
LONG = {
    "octavo.pipelines.opensora.pipeline.OpenSoraPipeline.__call__",
    "octavo.pipelines.opensora.transformer.STDiT3.__init__",
}


def python_files(folder: str) -> Iterator[Path]:
    """Yields the Python files of a package, following links, as paths below the root."""
    for place, _, names in os.walk(ROOT / folder, followlinks=True):
        yield from (Path(place, name).relative_to(ROOT) for name in names if name.endswith(".py"))


def module_of(file: Path) -> str:
    """Returns the name that a file is imported by."""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for folder in ("octavo", "tests", "bench") for file in python_files(folder)}


def package_of(module: str) -> str:
    """Returns the package of a module, a key of ALLOWED."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "octavo" and parts[1:2] and parts[1] in FOLDERS else parts[0]


def typing_only(tree: ast.AST) -> set[ast.AST]:
    """Returns the nodes below `if TYPE_CHECKING:`, which never run."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports_of(module: str, *, at_import: bool = False) -> Iterator[str]:
    """Yields the modules of this project that a module imports. With `at_import`, imports in functions and for type
    checkers are left out."""
    file = FILES[module]
    tree = ast.parse((ROOT / file).read_text())
    skipped = typing_only(tree)
    if at_import:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        skipped |= {inner for function in functions for inner in ast.walk(function)}
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in FILES:
                    yield inner
                elif base in FILES:
                    yield base


@pytest.mark.parametrize("module", sorted(FILES))
def test_packages_import_one_way(module):
    package = package_of(module)
    for name in imports_of(module):
        assert package_of(name) in ALLOWED[package] | {package}, f"{module} imports {name}"


def test_packages_are_imported_below_octavo():
    for module, file in FILES.items():
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] in FOLDERS], module


def test_the_parts_of_calibrate_import_one_way():
    above = {part: line for line, parts in enumerate(ORDER) for part in parts}
    parts = {name: name.split(".")[2] for name in FILES if name.startswith("octavo.calibrate.")}
    assert set(parts.values()) == set(above)
    for name, part in parts.items():
        for other in imports_of(name):
            if other in parts and parts[other] != part:
                assert above[parts[other]] < above[part], f"{name} imports {other}"


def test_no_files_import_each_other_in_a_circle():
    """Imports in functions and for type checkers count too. Names that a package loads lazily do not."""
    remaining = {module: set(imports_of(module)) - {module} for module in FILES}
    while free := {module for module, names in remaining.items() if not names & remaining.keys()}:
        remaining = {module: names for module, names in remaining.items() if module not in free}
    assert not remaining, f"these import each other, or import files that do: {sorted(remaining)}"


@pytest.mark.parametrize(
    "module", ["octavo", "octavo.cli", "octavo.prompts", "octavo.capture.files", "octavo.pipelines.demo.judge"]
)
def test_importing_a_light_module_leaves_torch_alone(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def lengths() -> dict[str, int]:
    return {module: len((ROOT / file).read_text().splitlines()) for module, file in FILES.items()}


def test_no_file_is_longer_than_400_lines_and_half_are_shorter_than_120():
    assert not {module: length for module, length in lengths().items() if length > 400}
    product = [length for module, length in lengths().items() if package_of(module) not in ("tests", "bench")]
    assert median(product) <= 120


def functions(node: ast.AST, inside: str) -> Iterator[tuple[str, int]]:
    """Yields the full name of each function below a node, and its length in lines."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            name = f"{inside}.{child.name}"
            if isinstance(child, ast.FunctionDef):
                assert child.end_lineno is not None
                yield name, child.end_lineno - child.lineno + 1
            yield from functions(child, name)
        else:
            yield from functions(child, inside)


def test_no_function_is_longer_than_40_lines():
    sizes = (
        function for name, file in FILES.items() for function in functions(ast.parse((ROOT / file).read_text()), name)
    )
    assert {name for name, length in sizes if length > 40} == LONG


def test_every_package_has_a_docstring():
    for module, file in FILES.items():
        if file.name == "__init__.py" and package_of(module) not in ("tests", "bench"):
            assert ast.get_docstring(ast.parse((ROOT / file).read_text())), f"{file} has no docstring"


@pytest.mark.parametrize("name", ["octavo", "octavo.capture", "octavo.calibrate"])
def test_public_names_load_on_first_use(name):
    code = f"import sys, {name}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"
    module = importlib.import_module(name)
    for public in module.__all__:
        assert getattr(module, public).__name__ == public
    with pytest.raises(AttributeError, match="no attribute"):
        module.nothing  # noqa: B018
