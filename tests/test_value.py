"""What the product promises, on real data: minutes each, run with `make test-slow`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture
def benchmark_data() -> Path:
    folder = os.environ.get("METAFIT_DATA")
    if not folder:
        pytest.skip("set METAFIT_DATA to the folder of the benchmark data")
    return Path(folder)


def test_the_demo_shows_a_gain_on_classes_never_met(tmp_path: Path) -> None:
    from metafit.apps.demo import run

    text, _, images = run(tmp_path)
    for made in (text, images):
        parts = made["source"]["classes"]
        assert not set(parts["train"]) & set(parts["test"])
        frozen = next(row for row in made["against"] if row["learner"] == "centroid")
        assert frozen["paired_difference"]["mean"] - frozen["paired_difference"]["ci95"] > 0
    assert (tmp_path / "report.html").stat().st_size > 50_000


def test_banking77_gains_two_and_a_half_points_at_one_shot(benchmark_data: Path) -> None:
    from metafit.apps.comparing import compare_learners
    from metafit.apps.preparing import prepare
    from metafit.apps.protocol import Protocol

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from text import banking77

    made = compare_learners(prepare(banking77()), ["protonet"], Protocol(5, 1, episodes=1000), baselines=["centroid"])
    lead = made["against"][0]["paired_difference"]
    assert lead["mean"] > 0.025 and lead["mean"] - lead["ci95"] > 0


def test_maml_learns_sinusoids(benchmark_data: Path) -> None:
    command = [sys.executable, "sinusoid.py", "maml", "--shot", "10", "--steps", "10000"]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True)

    assert json.loads(done.stdout.splitlines()[-1])["mse"]["mean"] < 0.77
