"""What the documentation shows is run: Python blocks, the examples in docstrings, and command lines are parsed."""

from __future__ import annotations

import doctest
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import metafit

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("README.md"), *ROOT.glob("CONTRIBUTING.md"), *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(metafit.__path__, "metafit.") if not info.name.endswith("__main__")
)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of the page that the text starts on."""

    language: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown page, but for those under ``<!-- no-test -->``."""
    lines = page.splitlines()
    start, language = None, ""
    for number, line in enumerate(lines):
        fence = re.match(r"\s*```+\s*(\w*)", line)
        if fence is None:
            continue
        if start is None:
            start, language = number, fence[1]
            continue
        if start == 0 or lines[start - 1].strip() != "<!-- no-test -->":
            indent = len(lines[start]) - len(lines[start].lstrip())
            yield Block(language, "\n".join(text[indent:] for text in lines[start + 1 : number]), start + 2)
        start = None


def commands(page: str) -> Iterator[tuple[int, list[str]]]:
    """The arguments of each ``metafit`` command line of the page's shell blocks, with its line."""
    for block in blocks(page):
        if block.language not in ("sh", "bash", "console", "shell"):
            continue
        joined = re.sub(r"\\\n\s*", lambda match: " " * len(match[0]), block.text)
        for offset, line in enumerate(joined.splitlines()):
            for part in re.split(r"&&|\||;|>", line):
                words = shlex.split(part.strip().removeprefix("$ "), comments=True)
                if words[:1] == ["metafit"]:
                    yield block.line + offset, words[1:]


def wrong_commands(page: str) -> list[str]:
    """The commands and options that the page shows and the command line does not have."""
    from typer.main import get_command

    from metafit.cli.app import app

    group: Any = get_command(app)
    context = group.make_context("metafit", [], resilient_parsing=True)
    wrong = []
    for line, words in commands(page):
        if words[:1] in (["--help"], ["--version"]):
            continue
        command = group.get_command(context, words[0]) if words else None
        if command is None:
            wrong.append(f"line {line}: no command {words[:1]}")
            continue
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.split("=")[0] for word in words[1:] if re.match(r"--?[A-Za-z]", word)}
        wrong += [f"line {line}: {words[0]} has no option {word}" for word in sorted(used - known - {"--help", "-h"})]
    return wrong


def test_blocks_are_found() -> None:
    page = "a\n```python\nx = 1\n```\n<!-- no-test -->\n```python\nx = 2\n```\n"
    page += "- b\n  ```sh\n  metafit demo \\\n    --out o\n  ```\n"
    assert list(blocks(page)) == [Block("python", "x = 1", 3), Block("sh", "metafit demo \\\n  --out o", 11)]
    assert [words for _, words in commands(page)] == [["demo", "--out", "o"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace, in an empty folder; a traceback names the line of the page."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_parse(page: Path) -> None:
    assert wrong_commands(page.read_text(encoding="utf-8")) == []


def test_wrong_command_lines_are_found() -> None:
    page = "```sh\nmetafit demo --out o  # fine\nmetafit dmo\nmetafit demo --nonsense=1 -x\n```\n"
    found = ["line 3: no command ['dmo']", "line 4: demo has no option --nonsense", "line 4: demo has no option -x"]
    assert wrong_commands(page) == found


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    failed, _ = doctest.testmod(import_module(module))
    assert failed == 0


def test_the_meta_optimizer_of_the_guide_is_one_file_and_its_lines(tmp_path: Path) -> None:
    """In a copy of the package: the file, the two lines where they belong, and then the catalogue has the method."""
    guide = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a meta-optimizer")[2].partition("\n## ")[0]
    file, lines = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[:2]
    imported, rule, variant = (f"{line}\n" for line in lines.splitlines() if line.strip())
    assert file.count("\n") < 60
    shutil.copytree(ROOT / "src" / "metafit", tmp_path / "metafit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "metafit" / "optim" / "bent.py").write_text(file)
    for page, line, follows in (
        ("choices.py", imported, "from metafit.errors import"),
        ("choices.py", rule, '    "sgd": lambda'),
        ("catalog.py", variant, '        _variant("alfa+metal"'),
    ):
        path = tmp_path / "metafit" / "learners" / page
        before, found, after = path.read_text().partition(follows)
        assert found
        path.write_text(before + line + found + after)
    suite = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_conformance.py"), "-k"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    made = subprocess.run([sys.executable, *suite, "bent"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:]  # 5 where there is nothing to run
