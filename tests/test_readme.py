"""The README's code runs as it stands, from top to bottom."""

import re
from pathlib import Path

import jax.numpy as jnp

README = Path(__file__).parents[1] / "README.md"


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 6
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        if "value" in names:
            assert names.pop("value") < jnp.log(10)  # both recipes learn beyond chance
    assert names["second"]["s"].shape == (200, 8, 100)
