"""Every test, file and command that tests/README.md names exists; CITATION.cff agrees with the package."""

import ast
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml  # A dependency of Flax.

import slif

ROOT = Path(__file__).parents[1]
EVIDENCE = (ROOT / "tests/README.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/\w+\.py)::([\w:]+)`", EVIDENCE)))
QUOTED = re.findall(r"`([^`\n]+)`", EVIDENCE) + re.findall(r"^```bash\n(.*?)^```", EVIDENCE, re.MULTILINE | re.DOTALL)
# A word with one of these in front of a slash is a path of the repository, one that ends in .py or .md anywhere.
FOLDERS = ("tests", "slif", "benchmarks", "examples", "docs", ".ci", ".github", "ahead_of_time")


def defined(body):
    """Every name of a function or class; methods as Class::name."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}::{name}" for name in defined(node.body))


def paths():
    for quoted in QUOTED:
        for word in shlex.split(quoted, comments=True):
            path = word.partition("::")[0]
            if path.split("/")[0] in FOLDERS or path.endswith((".py", ".md")):
                yield path


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_the_named_tests_are_there(file):
    there = set(defined(ast.parse((ROOT / file).read_text()).body))
    assert {name for named, name in NAMED if named == file} <= there


def test_the_named_files_are_there():
    named = set(paths())
    assert {".ci/run", "ahead_of_time/run", "benchmarks/bench_simulate.py"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([^)#]+)\)", EVIDENCE)
    assert [link for link in links if not (ROOT / "tests" / link).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("bench_*.py")), ids=lambda path: path.stem)
def test_every_benchmark_prints_its_options(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(os, "environ", os.environ.copy())  # bench_gpu.py sets a variable
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_the_citation():
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert told.keys() >= {"cff-version", "message", "title", "authors"}
    assert (told["cff-version"], told["type"], told["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert told["version"] == slif.__version__
    assert f"## {told['version']}, {told['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text()
    for entry in (told, *told["references"]):
        assert entry["title"]
        assert all(author.keys() in ({"name"}, {"family-names", "given-names"}) for author in entry["authors"])
    assert {entry["type"] for entry in told["references"]} == {"article", "software"}
