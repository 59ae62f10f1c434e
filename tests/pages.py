"""The Python of a page in Markdown, run as a reader would type it in."""

import re
from itertools import chain
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
# What a block needs beyond the package itself, by text that it contains.
NEEDS = {
    "import nir": "nir",
    "from slif import plot": "matplotlib",
    "from jax import export": "flatbuffers",
    "import equinox": "equinox",
    "import orbax": "orbax.checkpoint",
}


def recipes(path):
    """The blocks of each section by title, and under None those before the first section."""
    head, *sections = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)
    texts = {None: head} | {text.partition("\n")[0]: text for text in sections}
    return {title: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for title, text in texts.items()}


def run_blocks(blocks, path, names=None):
    """The names after the last block, put into `names`; skips if a package that the blocks need is absent."""
    for words, package in NEEDS.items():
        if any(words in block for block in blocks):
            pytest.importorskip(package)
    # One dict for all, so that a test can change the values that the page's functions see.
    names = {} if names is None else names
    for block in blocks:
        with jax.numpy_rank_promotion("allow"):  # JAX's default, which readers have
            exec(compile(block, str(path), "exec"), names)
    return names


def run_code(path, folder, monkeypatch):
    """The names of a whole page, run from top to bottom, and every "value" as "losses"; files go to the folder."""
    monkeypatch.chdir(folder)
    names, losses = {}, []
    for block in chain.from_iterable(recipes(path).values()):
        run_blocks([block], path, names)
        if "value" in names:
            losses.append(names.pop("value"))
    names["losses"] = losses
    return names
