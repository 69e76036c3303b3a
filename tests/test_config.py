"""One YAML file in place of options: the same words, the same bits, and one line for what is wrong in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from metafit.cli import app as cli


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def metafit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Done]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["metafit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return Done(int(stopped.value.code or 0), *capsys.readouterr())

    return run


def weights(folder: str) -> str:
    return json.loads((Path(folder) / "model.json").read_text())["sha256"]


def written(folder: str) -> dict[str, Any]:
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: digits\nleraner: anil\n", ("line 2", "unknown word 'leraner'", "did you mean 'learner'")),
        ("data: digits\ntrain_backbone: true\n", ("line 2", "did you mean 'train-backbone'")),
        ("data: digits\nresume: true\n", ("line 2", "unknown word 'resume'")),
        ("data: digits\n\nsteps: many\n", ("line 3: steps 'many'", "valid integer")),
        ("data: digits\nsteps: '300'\n", ("line 2: steps '300'", "valid integer")),
        ("data: digits\nsteps: true\n", ("line 2: steps True", "valid integer")),
        ("data: digits\nsteps: 300.0\n", ("line 2: steps 300.0", "valid integer")),
        ("data: digits\nsteps: [300]\n", ("line 2: steps [300]", "valid integer")),
        ("data: digits\nsteps: 0\n", ("line 2: steps 0", "greater than or equal to 1")),
        ("data: digits\nseed: 4294967296\n", ("line 2: seed 4294967296", "less than or equal to 4294967295")),
        ("data: digits\ntrain-backbone: 1\n", ("line 2: train-backbone 1", "boolean")),
        ("data: digits\nlabel: no\n", ("line 2: label False", "string", "quotes")),
        ("data: digits\nquery:\n", ("line 2: query", "holds nothing", "leave it out")),
        ("data: digits\noption: 3\n", ("line 2: option 3",)),
        ("data: digits\noption: [rate]\n", ("--option 'rate'", "name=value")),
        ("data: digits\noption: {when: 2020-01-01}\n", ("line 2: option",)),
        ("data: digits\nway: 2\ndata: animals\n", ("line 3", "data", "line 1")),
        ("data: digits\noption:\n  rate: 1\n  rate: 2\n", ("line 4", "rate", "line 3")),
        ("data: digits\n  way: 2\n", ("line 2", "is not YAML")),
        ("data: 'digits\n", ("is not YAML",)),
        ("data: digits\x07\n", ("is not YAML",)),
        ("data: 2020-13-01\n", ("is not YAML",)),
        ("a: b\n---\nc: d\n", ("is not YAML",)),
        ("data: " + "[" * 900 + "]" * 900, ("is not YAML", "nested too deep")),
        ("digits\n", ("holds no words",)),
        ("- data: digits\n", ("holds no words",)),
        ("data: !!python/object/apply:os.system ['touch harmed']\n", ("line 1", "tags are not read")),
        ("data: digits\noption: {a: !!python/name:os.system ''}\n", ("line 2", "tags are not read")),
        ("data: &d digits\nlearner: *d\n", ("line 1", "anchors", "write the value")),
        ("data: digits\n<<: {way: 2}\n", ("line 2", "unknown word '<<'")),
        ("way: 2\n", ("--data",)),
    ],
)
def test_what_is_wrong_in_a_file_is_told_in_one_line(
    text: str, words: tuple[str, ...], metafit: Callable[..., Done]
) -> None:
    Path("run.yaml").write_text(text)
    done = metafit("train", "--config", "run.yaml")
    assert done.status == 2 and done.err.startswith("metafit: ") and done.err.strip().count("\n") == 0, done.err
    for word in words:
        assert word in done.err
    assert sorted(path.name for path in Path().iterdir()) == ["run.yaml"], "nothing is begun, and nothing is run"


def test_files_that_cannot_be_read(metafit: Callable[..., Done]) -> None:
    Path("folder").mkdir()
    Path("binary.yaml").write_bytes(b"data: \xff\xfe\n")
    for name, word in (("none.yaml", "does not exist"), ("folder", "cannot be read"), ("binary.yaml", "not UTF-8")):
        done = metafit("train", "--config", name)
        assert done.status == 2 and name in done.err and word in done.err and done.err.strip().count("\n") == 0


def test_options_of_environments_and_backbones_stay_too(metafit: Callable[..., Done]) -> None:
    Path("env.yaml").write_text("env: bandit\nsteps: 1\nenv-option: {arms: 3, pulls: 5}\n")
    assert metafit("train", "--config", "env.yaml", "--env-option", "arms=4", "--out", "agent").status == 0
    complete = written("agent")
    assert complete["env-option"] == {"arms": 4, "pulls": 5}
    assert complete["learner"] == "rl2"  # whoever chose it
    Path("pre.yaml").write_text("data: digits\nsteps: 1\noption: {width: 16, norm: batch}\n")
    assert metafit("pretrain", "--config", "pre.yaml", "--option", "width=32", "--out", "backbone").status == 0
    made = json.loads(Path("backbone/backbone.json").read_text())["options"]
    assert (made["width"], made["norm"]) == (32, "batch")
    assert metafit("pretrain", "--data", "digits", "--rate", 0, "--out", "no").status == 2
    assert metafit("train", "--data", "digits", "--rate", 0, "--out", "no").status == 2


def test_a_file_and_options_train_to_the_same_bits(metafit: Callable[..., Done]) -> None:
    """Command line over file, option by option; and what a run wrote down repeats it."""
    Path("run.yaml").write_text(
        "data: digits\nbackbone: none\nlearner: anil\nway: 2\nshot: 1-2\nsteps: 9\nseed: 3\nquery: 5\n"
        "option:\n  rate: 1e-1\n  steps: 5\n  loss: smoothed\n"
    )
    over = ("--steps", 4, "--option", "steps=2")
    assert metafit("train", "--config", "run.yaml", *over, "--out", "by-file").status == 0
    words = ("--data", "digits", "--backbone", "none", "--learner", "anil", "--way", 2, "--shot", "1-2", "--seed", 3)
    options = ("--query", 5, "--option", "rate=0.1", "--option", "steps=2", "--option", "loss=smoothed", "--steps", 4)
    assert metafit("train", *words, *options, "--out", "by-options").status == 0
    assert weights("by-file") == weights("by-options")
    complete = written("by-file")
    assert {**complete, "out": None} == {**written("by-options"), "out": None}
    assert complete["option"] == {"rate": 0.1, "steps": 2, "loss": "smoothed"}
    assert (complete["way"], complete["shot"], complete["steps"], complete["patience"]) == ("2", "1-2", 4, 8)
    assert complete["label"] == "label" and complete["augment"] is None and complete["train-backbone"] is False

    assert metafit("train", "--config", "by-file/config.yaml", "--out", "again").status == 0
    assert weights("again") == weights("by-file") and {**written("again"), "out": "by-file"} == complete


def test_comparing_and_evaluating_from_a_file(metafit: Callable[..., Done]) -> None:
    Path("run.yaml").write_text("data: digits\nbackbone: none\nway: 2\nquery: 3\nepisodes: 5\nsteps: 2\nlearner: knn\n")
    made = json.loads(metafit("compare", "--config", "run.yaml", "--json").out)
    assert made["learner"]["name"] == "knn" and made["protocol"]["episodes"] == 5
    about = json.loads(Path("out/run.json").read_text())
    assert about["command"] == "compare" and about["status"] == "finished" and about["metric"] == "test accuracy"
    assert about["best"] == made["metrics"]["accuracy"]["mean"] == about["figures"]["accuracy"]
    refused = metafit("evaluate", "--config", "run.yaml")
    assert refused.status == 2 and "unknown word 'steps'" in refused.err, "which evaluation does not have"
    Path("run.yaml").write_text(
        "data: digits\nbackbone: none\nway: 2\nquery: 3\nepisodes: 5\nlearner: knn\nseed: null\n"
    )
    assert json.loads(metafit("evaluate", "--config", "run.yaml", "--json").out)["metrics"] is not None
    assert written("out")["seed"] is None and metafit("evaluate", "--config", "out/config.yaml").status == 0


def test_a_refused_run_leaves_the_folder_as_it_was(metafit: Callable[..., Done]) -> None:
    short = ("train", "--data", "digits", "--backbone", "none", "--way", 2, "--steps", 1, "--query", 2)
    assert metafit(*short, "--option", "metric=taxicab").status == 2 and not list(Path("model").iterdir())
    assert metafit(*short).status == 0
    before = {path.name: path.read_bytes() for path in Path("model").iterdir()}
    assert metafit(*short, "--option", "metric=taxicab").status == 2
    assert {path.name: path.read_bytes() for path in Path("model").iterdir()} == before


def test_a_password_in_a_url_is_written_to_no_file(tmp_path):
    from metafit.cli.config import _PASSWORD

    assert _PASSWORD.sub(r"\1***@", "postgresql://me:se:cret@host/db") == "postgresql://me:***@host/db"
    assert _PASSWORD.sub(r"\1***@", "sqlite:////tmp/a@b.db") == "sqlite:////tmp/a@b.db"
