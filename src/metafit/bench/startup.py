"""Starting: a new Python each time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

from metafit.bench.race import Contender, Settings, race

SLOWER = 1.3  # times `import torch` that `import metafit` may take
TORCH = "import torch"
HELP = "import sys; sys.argv = ['metafit', '--help']; from metafit.cli.app import main; main()"
AT_END = r"""
import atexit, pathlib, re, sys
def tell():
    status = pathlib.Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    print("at the end", found[1] if found else 0, "torch" in sys.modules)
atexit.register(tell)
"""


def startup(settings: Settings) -> list[dict[str, Any]]:
    settings = replace(settings, least=0)
    about = "a new Python each, files in the system's cache"
    note = f"the target is {SLOWER} times the time of import torch at most"
    imports = "imports" if _at_end(HELP)[1] else "does not import"
    torch = _python("import torch", TORCH)
    return [
        race("import", "import metafit", round(1 / SLOWER, 2), _python("import metafit", "import metafit"), [torch],
             settings, data=about, note=note),
        race("help", "metafit --help", 1, _python("metafit --help", HELP), [torch], settings, data=about,
             note=f"{imports} torch"),
    ]  # fmt: skip


def _python(name: str, code: str) -> Contender:
    return Contender(name, lambda: _run(code), memory=lambda: _at_end(code)[0])


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False).stdout


def _at_end(code: str) -> tuple[int | None, bool]:
    """The peak memory of such a Python in bytes, where the system tells, and whether it had imported torch."""
    peak, torch = _run(AT_END + code).rpartition("at the end")[2].split()
    return int(peak) * 1024 or None, torch == "True"
