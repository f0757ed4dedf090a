"""Checks that the words an option accepts are the keys of the table in which the command looks them up."""

import subprocess
import sys

import pytest

from octavo import words
from octavo.calibrate.layers.inputs import ACTIVATIONS
from octavo.calibrate.observers.observers import OBSERVERS
from octavo.calibrate.rounding.methods import WEIGHT_METHODS
from octavo.calibrate.settings import ATTENTION, RECIPES, ROTATION
from octavo.capture.devices import DTYPES
from octavo.pipelines import FAMILIES
from octavo.prompts import BUNDLED


@pytest.mark.parametrize(
    ("repeated", "table"),
    [
        (words.OBSERVERS, OBSERVERS),
        (words.WEIGHT_METHODS, WEIGHT_METHODS),
        (words.RECIPES, RECIPES),
        (words.ROTATION, ROTATION),
        (words.ATTENTION, ATTENTION),
        ((*words.ACTIVATIONS, "float"), ACTIVATIONS),
        (words.DTYPES, DTYPES),
        (words.PROMPT_SETS, BUNDLED),
        (words.FAMILIES, FAMILIES),
    ],
    ids=["observers", "weights", "recipes", "rotation", "attention", "activations", "dtypes", "prompts", "families"],
)
def test_words_are_the_keys_of_their_table(repeated, table):
    assert list(repeated) == list(table)


def test_every_format_is_for_denoisers_or_for_classifiers():
    assert set(words.DENOISER_FORMATS) | set(words.CLASSIFIER_FORMATS) == set(words.FORMATS)


def test_words_import_nothing_heavy():
    code = "import sys, octavo.words; print(sorted({'torch', 'diffusers', 'numpy', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
