"""Checks that a message names an option only if every command that can show the message has the option."""

import ast
import re
from pathlib import Path

import click

from octavo.cli import main

from ...test_architecture import FILES, ROOT, package_of

OPTION = re.compile(r"(?<![\w-])(-o\b|--[a-z][a-z-]*)")
CAPTURE, CALIBRATE, CNN, GENERATE, COMPARE = "capture", "calibrate", "calibrate-cnn", "generate", "compare"
BOTH, RUNS = (CALIBRATE, CNN), (CAPTURE, GENERATE, COMPARE)
# The commands that show the messages of a module, or that these messages name, as in "Finish with capture --resume".
SHOWN_BY: dict[str, tuple[str, ...]] = {
    "octavo.capture.kept_steps": (CAPTURE,),
    "octavo.capture.ranks": (CAPTURE,),
    "octavo.capture.store.directory": (CAPTURE,),
    "octavo.capture.store.layout": (CAPTURE,),
    "octavo.capture.store.reader": (CAPTURE, CALIBRATE),
    "octavo.capture.store.unit": (CAPTURE,),
    "octavo.capture.store.writer": (CAPTURE,),
    "octavo.calibrate.advice": BOTH,
    "octavo.calibrate.attention.measure": (CALIBRATE,),
    "octavo.calibrate.blockwise.blocks": (CALIBRATE,),
    "octavo.calibrate.blockwise.calibration": (CALIBRATE,),
    "octavo.calibrate.formats.attention": (CALIBRATE,),
    "octavo.calibrate.formats.bfl.check": (CALIBRATE,),
    "octavo.calibrate.formats.bfl.rules": (CALIBRATE,),
    "octavo.calibrate.formats.bfl.write": (CALIBRATE,),
    "octavo.calibrate.formats.diffusers.write": (CALIBRATE,),
    "octavo.calibrate.formats.export": BOTH,
    "octavo.calibrate.formats.inspect": BOTH,
    "octavo.calibrate.formats.record": (CALIBRATE,),
    "octavo.calibrate.formats.target": BOTH,
    "octavo.calibrate.formats.torchao.write": (CALIBRATE,),
    "octavo.calibrate.mixed_precision.sensitivity": (CALIBRATE,),
    "octavo.capture.pth.pth": (CAPTURE,),
    "octavo.capture.sealed": (CAPTURE,),
    "octavo.pipelines.denoisers": (CAPTURE, CALIBRATE, GENERATE, COMPARE),
    "octavo.pipelines.inspection": (CAPTURE, CALIBRATE, GENERATE, COMPARE),
    "octavo.pipelines.load": (CALIBRATE, GENERATE, CAPTURE),
    "octavo.pipelines.run": RUNS,
    "octavo.pipelines.prompted": RUNS,
    "octavo.pipelines.images": (CNN,),
    "octavo.pipelines.finite": (GENERATE, COMPARE),
    "octavo.calibrate.plan": (CALIBRATE,),
    "octavo.calibrate.preparation.synthetic_inputs": (CNN,),
    "octavo.calibrate.replay.sqnr": BOTH,
    "octavo.argument_values": RUNS,
    "octavo.checkpoints": (GENERATE, CALIBRATE),
    "octavo.comparing.comparison": (COMPARE,),
    "octavo.commands.compare_options": (COMPARE,),
    "octavo.terminal": (CAPTURE, CALIBRATE, CNN, "inspect", GENERATE, COMPARE, "convert-pth"),
    "octavo.commands.calibrate": (CAPTURE, CALIBRATE, CNN),
    "octavo.commands.calibrate_blockwise": (CALIBRATE,),
    "octavo.commands.calibrate_classifier": BOTH,
    "octavo.commands.calibrate_options": BOTH,
    "octavo.commands.capture": (CAPTURE,),
    "octavo.commands.capture_job": (CAPTURE,),
    "octavo.commands.captured_model": (CAPTURE, CALIBRATE),
    "octavo.commands.compare": (COMPARE, CALIBRATE),
    "octavo.commands.doctor": (CAPTURE,),
    "octavo.commands.early": (CALIBRATE, GENERATE),
    "octavo.commands.generate": (GENERATE,),
    "octavo.commands.inspect_capture": (CAPTURE,),
    "octavo.commands.machine_facts": (CAPTURE,),
    "octavo.commands.rerun": (CALIBRATE,),
    "octavo.run_options": RUNS,
    "octavo.commands.save_output": (GENERATE,),
    "octavo.pipelines.loras": (CAPTURE, GENERATE),
    "octavo.calibrate.formats.native": (CALIBRATE,),
    "octavo.calibrate.formats.linears": (CALIBRATE,),
    "octavo.calibrate.formats.comfy.check": (CALIBRATE,),
    "octavo.calibrate.formats.comfy.names": (CALIBRATE,),
    "octavo.calibrate.formats.comfy.write": (CALIBRATE,),
    "octavo.calibrate.formats.modelopt.check_sglang": (CALIBRATE,),
    "octavo.calibrate.formats.modelopt.files": (CALIBRATE,),
    "octavo.calibrate.formats.modelopt.write": (CALIBRATE,),
    "octavo.calibrate.formats.onnx.placeholders": BOTH,
    "octavo.calibrate.formats.sdnq.check": (CALIBRATE,),
    "octavo.calibrate.formats.sdnq.write": (CALIBRATE,),
    "octavo.calibrate.formats.sglang.check": (CALIBRATE,),
    "octavo.calibrate.formats.sglang.write": (CALIBRATE,),
    "octavo.calibrate.formats.vllm_omni.check": (CALIBRATE,),
    "octavo.calibrate.formats.vllm_omni.write": (CALIBRATE,),
}
# Modules whose messages name options that not all their commands have. These messages say which command they mean.
ONE_OF_THEM = {
    "reader", "load", "checkpoints", "captured_model", "run_options", "export",
    "calibrate", "calibrate_classifier", "calibrate_options", "compare", "early",
}  # fmt: skip
NO_MESSAGES = ("octavo.cli", "octavo.help_pages", "octavo.words", "octavo.declarations", "octavo.page")


def options_of(command: str) -> set[str]:
    """Returns the options of a command."""
    parameters = main.commands[command].params
    return {
        word for item in parameters if isinstance(item, click.Option) for word in (*item.opts, *item.secondary_opts)
    }


def named_in(module: str) -> set[str]:
    """Returns the options that the messages of a module name. Docstrings and declarations of options are left out."""
    tree = ast.parse((ROOT / FILES[module]).read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("option", "flag", "several", "Option"):
            skipped |= set(ast.walk(node))
        elif isinstance(node, ast.ClassDef | ast.Assign | ast.AnnAssign) and not isinstance(node, ast.ClassDef):
            skipped |= {inner for inner in ast.walk(node) if isinstance(node, ast.AnnAssign) and inner is not node}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {option for text in texts if text not in skipped for option in OPTION.findall(str(text.value))}


def unlisted() -> list[str]:
    """Returns the options in messages that a command does not have, with their modules, and modules that SHOWN_BY
    lacks."""
    problems = []
    for module in FILES:
        if package_of(module) in ("tests", "bench") or module.startswith(NO_MESSAGES) or module.endswith(".train"):
            continue
        for option in sorted(named_in(module)):
            commands = SHOWN_BY.get(module, ())
            having = [command for command in commands if option in options_of(command)]
            if not having or (len(having) < len(commands) and module.rpartition(".")[2] not in ONE_OF_THEM):
                problems.append(f"{module}: {option}")
    return problems


def test_advice_names_options_that_the_commands_have() -> None:
    assert unlisted() == []


def test_the_table_names_modules_that_exist() -> None:
    assert set(SHOWN_BY) <= set(FILES)
    assert all((Path(ROOT) / FILES[module]).exists() for module in SHOWN_BY)
