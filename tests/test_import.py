"""The public names: all there, and none imported before it is used."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import metafit


def _fresh(code: str) -> str:
    """What a new Python prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light() -> None:
    heavy = ["torch", "numpy", "sklearn", "pandas", "matplotlib", "transformers", "datasets", "rich"]
    assert _fresh(f"import sys, metafit; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_help_is_light() -> None:
    heavy = ["torch", "numpy", "pydantic", "yaml", "tensorboardX"]
    code = "import sys; sys.argv = ['metafit', '--help']\nfrom metafit.cli.app import main\ntry: main()\n"
    assert _fresh(f"{code}except SystemExit: print([m for m in {heavy} if m in sys.modules])").endswith("[]")


def test_packages_leave_optional_and_slow_libraries_alone() -> None:
    packages = "metafit.training, metafit.evaluation, metafit.backbones"
    slow = ["sklearn", "matplotlib", "transformers", "datasets", "jinja2", "pyarrow", "tensorboardX", "yaml"]
    assert _fresh(f"import sys, {packages}; print([m for m in {slow} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("name", metafit.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(metafit, name) is not None


def test_every_public_name_is_listed_and_typed_alike() -> None:
    """The lazy table, ``__all__`` and the imports that type checkers see name the same things."""
    assert set(metafit.__all__) <= set(dir(metafit))
    assert {*metafit._HOME, "BadInput", "__version__"} == set(metafit.__all__)
    tree = ast.parse(inspect.getsource(metafit))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == metafit._HOME


@pytest.mark.parametrize("package", ["data", "backbones", "optim", "losses", "learners", "training", "evaluation"])
def test_every_name_that_a_package_lists_resolves(package: str) -> None:
    module = import_module(f"metafit.{package}")
    assert sorted(name for name in module.__all__ if not hasattr(module, name)) == []


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'FewShotClasifier'"):
        metafit.FewShotClasifier  # noqa: B018
