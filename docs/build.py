"""Builds the site: README, the guides and the API reference, with search; fails on a dead link or any other warning.

    pip install -e ".[docs]" && python docs/build.py [FOLDER]     (by default out/site)

The pages stay in their places in the checkout; this copies them, with the files that they link to.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/*.md", "benchmarks/*.md", "tests/README.md")
LINK = re.compile(r"\]\(([^)#\s]+)")


def linked(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to, except for pages."""
    for target in LINK.findall(page.read_text()):
        path = (page.parent / target).resolve()
        if path.is_file() and path.suffix != ".md":
            yield path


def collect(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "*.yml", "__pycache__"))
    for page in (page for pattern in PAGES for page in ROOT.glob(pattern)):
        for path in (page, *linked(page)):
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def main() -> None:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "out/site").resolve()
    collect(ROOT / "out/pages")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(
        [*command, "--config-file", ROOT / "docs/mkdocs.yml", "--site-dir", site], check=True, env=environment
    )
    print(site / "index.html")


if __name__ == "__main__":
    main()
