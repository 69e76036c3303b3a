"""The command line: exit status, one-line errors, JSON on standard output, and the whole way from files to answers."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from metafit.cli import app as cli


class Done:
    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def metafit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["metafit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return Done(int(stopped.value.code or 0), out, err)

    return run


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits as a table: 10 classes of 30 rows, 64 numeric columns."""
    from sklearn.datasets import load_digits

    found = load_digits()
    rows = np.concatenate([np.flatnonzero(found.target == c)[:30] for c in range(10)])
    path = tmp_path_factory.mktemp("data") / "digits.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"p{i}" for i in range(64)), "label"])
        writer.writerows([*(found.data[r] / 16).tolist(), f"digit {found.target[r]}"] for r in rows)
    return path


@pytest.fixture(scope="session")
def fetched() -> None:
    """The first time on a machine, a command says what it fetches: here that is before, and not among its words."""
    from metafit import backbones
    from metafit.data import packaged

    packaged.load("home-intents")
    backbones.load("minilm-l6")


def refused(done: Done, *words: str) -> None:
    assert done.status == 2, done.err
    assert done.err.startswith("metafit: ") and done.err.strip().count("\n") == 0, done.err
    for word in words:
        assert word in done.err


def test_help_does_not_import_torch() -> None:
    code = "import sys; sys.argv = ['metafit', '--help']\nfrom metafit.cli.app import main\n"
    code += "try: main()\nexcept SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("0 False")


def test_a_learner_tells_its_options(metafit: Callable[..., Done]) -> None:
    told = {row["option"]: row for row in json.loads(metafit("learners", "maml++", "--json").out)}
    assert told["multi_step"] == {"option": "multi_step", "default": "annealed", "takes": "last, annealed, learned"}
    assert told["per_step_norm"]["default"] is True and told["rule"]["default"] == "per-step"
    table = metafit("learners", "maml++").out
    assert "multi_step" in table and "tuple[float, float]" in table and "meta-curvature" in told["rule"]["takes"]
    assert "did you mean 'maml'" in metafit("learners", "mamll").err


@pytest.mark.parametrize("command", ["learners", "backbones"])
def test_catalogues(metafit: Callable[..., Done], command: str) -> None:
    rows = json.loads(metafit(command, "--json").out)
    assert {"protonet", "maml"} <= {r["name"] for r in rows} or {"minilm-l6", "conv4"} <= {r["name"] for r in rows}
    assert rows[0]["name"] in metafit(command).out


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", "--data", "nowhere.csv"), ("nowhere.csv", "check the path")),
        (("compare", "--data", "home-intent"), ("did you mean", "home-intents")),
        (("compare", "--data", "DIGITS", "--label", "lable"), ("lable", "label")),
        (("compare", "--data", "DIGITS", "--learner", "protonett"), ("did you mean 'protonet'",)),
        (("compare", "--data", "DIGITS", "--unsupervised", "umtr"), ("did you mean 'umtra'",)),
        (("compare", "--data", "DIGITS", "--backbone", "minilm-l7"), ("minilm-l6",)),
        (("compare", "--data", "DIGITS", "--way", "9"), ("way 9", "classes")),
        (("compare", "--data", "DIGITS", "--way", "2", "--shot", "40"), ("shot", "'digit")),
        (("compare", "--data", "DIGITS", "--way", "two"), ("--way 'two'",)),
        (("compare", "--data", "DIGITS", "--option", "heads=3"), ("option", "heads")),
        (("compare", "--data", "DIGITS", "--way", "2", "--option", "metric=taxicab"), ("taxicab", "cosine")),
        (
            ("compare", "--data", "DIGITS", "--way", "2", "--option", "strength=-1", "--learner", "linear"),
            ("strength",),
        ),
        (("compare", "--data", "DIGITS", "--learner", ","), ("--learner",)),
        (("compare", "--data", "DIGITS", "--budget", "ten minutes"), ("budget 'ten minutes'", "10m")),
        (("compare", "--data", "DIGITS", "--way", "5-3"), ("--way '5-3'", "a range as 3-5")),
        (("adapt",), ("see metafit adapt --help",)),
        (("train", "--env", "bandit", "--env-option", "arms=abc"), ("option arms 'abc'", "a whole number")),
        (("train", "--env", "grid", "--env-option", "size=-1"), ("option size -1", "1 or more")),
        (("compare", "--data", "DIGITS", "--backbone", "minilm-l6"), ("is vector", "choose none")),
        (("compare", "--data", "DIGITS", "--backbone", "./nowhere"), ("nowhere", "does not exist")),
        (("compare", "--data", "DIGITS", "--seed", "-1"), ("--seed", "0")),
        (("pretrain", "--data", "DIGITS", "--method", "distill"), ("did you mean 'distil'",)),
        (("pretrain", "--data", "DIGITS", "--option", "width"), ("--option 'width'", "name=value")),
        (("pretrain", "--data", "DIGITS", "--method", "denoise", "--mixup", "0.2"), ("mixup 0.2", "leave it out")),
        (
            ("pretrain", "--data", "DIGITS", "--method", "distil", "--teacher", "minilm-l6"),
            ("are vector", "'minilm-l6' reads text"),
        ),
        (("train", "--data", "DIGITS", "--way", "2", "--steps", "0"), ("--steps", "1")),
        (("train", "--data", "DIGITS", "--way", "2", "--query", "0"), ("--query", "1")),
        (("train", "--data", "DIGITS", "--precision", "bf61"), ("precision 'bf61'", "did you mean 'bf16'")),
        (("train", "--data", "DIGITS", "--ema", "2"), ("ema 2.0", "between 0 and 1")),
        (("train", "--data", "DIGITS", "--accumulate", "0"), ("accumulate 0",)),
        (("train", "--data", "DIGITS", "--schedule", "cos"), ("did you mean 'cosine'",)),
        (("evaluate", "--data", "DIGITS", "--learner", "knn", "--episodes", "0"), ("--episodes", "1")),
        (("evaluate", "--data", "DIGITS", "--model", "m", "--backbone", "conv4"), ("--backbone", "leave")),
        (("compare", "--data", "home-intents", "--backbone", "none"), ("needs a backbone",)),
        (("train", "--data", "DIGITS", "--learner", "knn"), ("nothing to meta-train",)),
        (("evaluate", "--data", "DIGITS", "--model", "nowhere"), ("nowhere", "does not exist")),
        (("evaluate", "--data", "DIGITS"), ("--model", "--learner")),
        (("predict", "nowhere", "DIGITS"), ("nowhere", "does not exist")),
        (("frobnicate",), ("frobnicate",)),
        (("compare",), ("--data",)),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    metafit: Callable[..., Done], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments, words
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(metafit(*(str(digits) if a == "DIGITS" else a for a in arguments)), *words)
    assert not list(tmp_path.rglob("*.json")), "nothing may be left of a command that was refused"


def test_tables_that_cannot_be_learned_from(metafit: Callable[..., Done], tmp_path: Path) -> None:
    def learn(content: str) -> Done:
        (tmp_path / "t.csv").write_text(content)
        return metafit("adapt", tmp_path / "t.csv", "--text", "text", "-o", tmp_path / "task")

    refused(learn("text,label\nhello,a\n,b\n"), "t.csv", "row 2")
    refused(learn("text,label\nhello,a\nbye,a\n"), "class")
    refused(learn("text,mark\nhello,a\nbye,b\n"), "label", "mark")
    refused(learn(""), "t.csv")
    (tmp_path / "t.csv").write_text("x,label\n1,a\nnan,b\n")
    refused(metafit("adapt", tmp_path / "t.csv", "--features", "x", "-o", tmp_path / "task"), "row 2")
    assert not list((tmp_path / "task").glob("*"))


def test_images_that_cannot_be_learned_from(metafit: Callable[..., Done], tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "images" / name / "1.png")
    broken = tmp_path / "images" / "dog" / "2.png"
    broken.write_bytes((tmp_path / "images" / "dog" / "1.png").read_bytes()[:60])
    refused(metafit("adapt", tmp_path / "images", "-o", tmp_path / "task"), "2.png")
    broken.write_text("not an image")
    refused(metafit("adapt", tmp_path / "images", "-o", tmp_path / "task"), "2.png")


def test_output_folders_that_cannot_be_written(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(metafit("adapt", digits, "-o", tmp_path / "file"), "file")
    refused(metafit("compare", "--data", digits, "--way", "2", "--out", tmp_path / "file" / "out"), "file")
    refused(metafit("compare", "--data", digits, "--way", "2", "--out", "/proc/metafit"), "/proc/metafit")
    assert (tmp_path / "file").read_text() == "mine"


def test_labels_that_differ_by_case_are_told(metafit: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,label\n0,on\n0.1,on\n5,On\n5.1,On\n9,off\n9.1,off\n")
    done = metafit("adapt", tmp_path / "t.csv", "-o", tmp_path / "task")
    assert done.status == 0 and "On" in done.err


def test_a_locked_folder_is_named(tmp_path: Path, digits: Path) -> None:
    """As a user whom permissions bind: not the root that containers run as, who may do all."""
    root = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    if root and shutil.which("setpriv") is None:
        pytest.skip("no setpriv to give up root's powers with")
    locked = tmp_path / "locked"
    locked.mkdir(0o000)
    try:
        for arguments in ((locked / "t.csv", "-o", tmp_path / "task"), (digits, "-o", locked / "task")):
            command = [*root, sys.executable, "-m", "metafit.cli.app", "adapt", *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True)
            refused(Done(done.returncode, done.stdout, done.stderr), str(locked), "not permitted for this user")
    finally:
        locked.chmod(0o700)


def test_from_a_table_to_answers(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    told = json.loads(metafit("adapt", digits, "-o", tmp_path / "task", "--json").out)
    assert told["learner"] == "in-context" and told["classes"] == [f"digit {i}" for i in range(10)]
    rows = json.loads(metafit("predict", tmp_path / "task", digits, "--json").out)
    with digits.open() as file:
        truth = [row["label"] for row in csv.DictReader(file)]
    assert np.mean([row["prediction"] == label for row, label in zip(rows, truth, strict=True)]) > 0.95
    assert all(0 < row["confidence"] <= 1 for row in rows)
    done = metafit("predict", tmp_path / "task", digits, "-o", tmp_path / "answers.csv")
    assert done.status == 0 and done.out == ""
    with (tmp_path / "answers.csv").open() as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == [row["prediction"] for row in rows]


def test_answers_stand_beside_what_was_asked_and_are_scored(metafit: Callable[..., Done], tmp_path: Path) -> None:
    """Every column comes back; filled labels are compared, with the interval of Wilson (by hand: 3 of 4, z = 1.96)."""
    (tmp_path / "few.csv").write_text("x,what\n0,low\n0.1,low\n1,high\n1.1,high\n")
    assert metafit("adapt", tmp_path / "few.csv", "--label", "what", "-o", tmp_path / "task").status == 0
    rows = "1,0.10,low,0.9\n2,0,low,\n3,1,high,\n4,1,medium,\n5,1,,\n"
    (tmp_path / "new.csv").write_text(f"id,x,what,confidence\n{rows}")
    done = metafit("predict", tmp_path / "task", tmp_path / "new.csv", "-o", tmp_path / "answers.csv")
    assert "3 of 4 answers are as labelled, 75.0% (95 % interval 30.1% to 95.4%;" in done.err
    assert "it has not learned 'medium'" in done.err and "columns 'confidence' are replaced" in done.err
    with (tmp_path / "answers.csv").open() as file:
        answers = list(csv.DictReader(file))
    assert list(answers[0]) == ["id", "x", "what", "confidence", "prediction"]
    assert [row["id"] for row in answers] == ["1", "2", "3", "4", "5"] and answers[0]["confidence"] != "0.9"
    assert answers[0]["x"] == "0.10"  # in the digits of the file
    (tmp_path / "new.csv").write_text("id,x,id\n1,0.1,2\n")
    refused(metafit("predict", tmp_path / "task", tmp_path / "new.csv"), "new.csv", "2 columns are called 'id'")


def test_dates_and_gaps_of_a_parquet_file_come_back(metafit: Callable[..., Done], tmp_path: Path) -> None:
    from datetime import date

    import pyarrow as pa
    from pyarrow import parquet

    columns = {"x": [0.0, 1.0], "label": ["a", "b"], "when": [date(2026, 1, 2), None], "gap": [float("nan"), 1.5]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = (tmp_path / "t.parquet", "--features", "x")
    assert metafit("adapt", *table, "-o", tmp_path / "task").status == 0
    rows = json.loads(metafit("predict", tmp_path / "task", tmp_path / "t.parquet", "--json").out)
    assert [(row["when"], row["gap"], row["prediction"]) for row in rows] == [
        ("2026-01-02", None, "a"),
        (None, 1.5, "b"),
    ]


def test_numbers_from_a_table(metafit: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,label\n" + "".join(f"{x},{2 * x}\n" for x in range(20)))
    assert metafit("adapt", tmp_path / "t.csv", "-o", tmp_path / "task", "--regression").status == 0
    rows = json.loads(metafit("predict", tmp_path / "task", tmp_path / "t.csv", "--json").out)
    assert np.corrcoef([row["prediction"] for row in rows], range(20))[0, 1] > 0.99
    assert "confidence" not in rows[0] and rows[3]["label"] == "6"
    (tmp_path / "new.csv").write_text("name,x,label\na,3,16\nb,4,\nc,5,?\n")
    done = metafit("predict", tmp_path / "task", tmp_path / "new.csv", "--json")
    first = json.loads(done.out)[0]
    assert list(first) == ["name", "x", "label", "prediction"] and first["name"] == "a"
    assert f"off by {16 - first['prediction']:.4g} on average, over 1 inputs" in done.err


def test_from_images_to_answers(metafit: Callable[..., Done], tmp_path: Path) -> None:
    """Photographs cut into tiles: sky and temple against flower, by the packaged image backbone."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        for part, columns in (("few", (0, 200)), ("new", (400,))):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for left in columns:
                Image.fromarray(photograph[100:300, left : left + 200]).save(folder / f"{left}.jpg")
    assert metafit("adapt", tmp_path / "few", "-o", tmp_path / "task").status == 0
    rows = json.loads(metafit("predict", tmp_path / "task", tmp_path / "new", "--json").out)
    assert [Path(row["file"]).parent.name for row in rows] == [row["prediction"] for row in rows] == ["china", "flower"]
    (tmp_path / "new" / "china" / "deep").mkdir()
    (tmp_path / "new" / "china" / "400.jpg").rename(tmp_path / "new" / "china" / "deep" / "400.jpg")
    assert "2 of 2 answers are as labelled" in metafit("predict", tmp_path / "task", tmp_path / "new").err
    assert metafit("update", tmp_path / "task", tmp_path / "new").status == 0
    (tmp_path / "new" / "flower").rename(tmp_path / "flower")
    assert metafit("update", tmp_path / "task", tmp_path / "new").status == 0  # of one class alone
    (tmp_path / "flower").rename(tmp_path / "new" / "unsorted")
    assert "1 of 1 answers are as labelled" in metafit("predict", tmp_path / "task", tmp_path / "new").err


def test_train_evaluate_adapt_with_the_model(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    told = json.loads(metafit("train", "--data", digits, "--way", 2, "--steps", 30, "--out", model, "--json").out)
    assert told["best_step"] > 0 and len(told["history"]) > 5
    where = ("--data", digits, "--model", model, "--way", 2, "--out", tmp_path / "e")
    done = metafit("evaluate", *where, "--episodes", 60, "--json")
    made = json.loads(done.out)
    assert made["learner"]["name"] == "protonet" and made["learner"]["meta_trained"]
    assert {row["learner"] for row in made["against"]} == {"centroid", "linear", "finetune"}
    assert (
        made == json.loads((tmp_path / "e" / "result.json").read_text()) and (tmp_path / "e" / "report.html").exists()
    )
    refused(metafit("evaluate", "--data", digits, "--model", model, "--way", 2, "--seed", 5), "seed")
    assert metafit("adapt", digits, "--model", model, "-o", tmp_path / "task").status == 0
    assert len(json.loads(metafit("predict", tmp_path / "task", digits, "--json").out)) == 300


def test_a_pretrained_backbone_is_taken_by_every_command(
    metafit: Callable[..., Done], digits: Path, tmp_path: Path
) -> None:
    backbone, model, short = tmp_path / "backbone", tmp_path / "model", ("--way", 2, "--steps", 3)
    command = ("pretrain", "--data", digits, "--method", "cosine", "--steps", 40, "--out", backbone, "--json")
    made = json.loads(metafit(*command, "--mixup", 0.2, "--option", "width=32").out)
    assert made["loss"][1] < made["loss"][0] and len(made["classes"]) == 6 and made["mixup"] == 0.2
    refused(metafit(*command, "--resume"), "cannot resume", "another protocol (mixup 0.0, was 0.2")
    use = ("--data", digits, "--backbone", backbone)
    told = json.loads(metafit("compare", *use, *short, "--episodes", 20, "--out", tmp_path / "c", "--json").out)
    assert told["backbone"] == f"folder:{backbone}" and len(told["against"]) == 3
    refused(metafit("compare", *use, *short, "--seed", 1), "held out here", "use --seed 0")
    assert metafit("train", *use, *short, "--train-backbone", "--out", model).status == 0
    where = ("--data", digits, "--way", 2, "--episodes", 20, "--out", tmp_path / "e", "--json")
    assert json.loads(metafit("evaluate", "--model", model, *where).out)["backbone"] == told["backbone"]
    for task, source in (("a", ("--model", model)), ("b", ("--backbone", backbone, "--learner", "linear"))):
        assert metafit("adapt", digits, *source, "-o", tmp_path / task).status == 0
        rows = json.loads(metafit("predict", tmp_path / task, digits, "--json").out)
        assert len(rows) == 300


def test_compare(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    protocol = ("--way", "2", "--shot", "1-2", "--steps", 10, "--episodes", 40)
    done = metafit("compare", "--data", digits, "--learner", "anil,protonet", *protocol, "--out", out, "--json")
    made = json.loads(done.out)
    assert made["learner"]["name"] == "anil" and made["against"][0]["learner"] == "protonet"
    assert made["protocol"]["shot"] == [1, 2] and made["protocol"]["episodes"] == 40
    assert made["against"][0]["paired_difference"]["mean"] == pytest.approx(
        made["metrics"]["accuracy"]["mean"] - made["against"][0]["metrics"]["accuracy"]["mean"], abs=1e-5
    )
    assert (out / "models" / "anil" / "model.json").exists()


def test_all_learners_are_ranked(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    from metafit.apps.budget import fitting

    quick = ("--way", "2", "--query", 3, "--steps", 1, "--episodes", 20)
    done = metafit("compare", "--data", digits, "--learner", "all", *quick, "--out", tmp_path, "--json")
    made = json.loads(done.out)
    rows = [(made["learner"]["name"], made["metrics"]), *((o["learner"], o["metrics"]) for o in made["against"])]
    accuracies = [metrics["accuracy"]["mean"] for _, metrics in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    learners, baselines = fitting(body=False)
    assert {name for name, _ in rows} == {*learners, *baselines} >= {"maml", "in-context", "soft-kmeans", "linear"}
    assert "dkt" not in learners and "scratch" not in baselines


def test_a_comparison_keeps_to_its_budget(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    """One that is too slow is left out, the others train until their share is over, and all answer the same tasks."""
    long = ("--learner", "protonet,matching,lstm", "--way", "2", "--steps", 100_000, "--patience", 1000)
    begin = time.monotonic()
    done = metafit(
        "compare", "--data", digits, *long, "--episodes", 2000, "--budget", "6s", "--out", tmp_path, "--json"
    )
    assert time.monotonic() - begin < 60
    made = json.loads(done.out)
    assert "lstm is left out" in done.err and made["protocol"]["episodes"] < 2000
    assert "lstm" in made["left_out"] and "lstm" not in {o["learner"] for o in made["against"]}
    assert made["gauge"]["gap"]["mean"] is not None
    assert made["history"][-1]["step"] < 100_000


def test_a_learner_that_fails_does_not_take_the_others_along(
    metafit: Callable[..., Done], digits: Path, tmp_path: Path
) -> None:
    where = ("--data", digits, "--way", 2, "--steps", 3, "--episodes", 20, "--out", tmp_path)
    done = metafit("compare", *where, "--learner", "maml,protonet", "--option", "rate=1e30", "--json")
    made = json.loads(done.out)
    assert made["learner"]["name"] == "protonet" and "diverged" in made["left_out"]["maml"]
    assert "maml is left out: meta-training diverged" in (tmp_path / "report.html").read_text()
    done = metafit("compare", *where, "--learner", "maml", "--option", "rate=1e30")
    assert done.status == 2 and "metafit: maml is left out: meta-training diverged" in done.err


def test_a_comparison_that_was_stopped_goes_on(digits: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from metafit.apps.comparing import compare_learners
    from metafit.apps.preparing import prepare
    from metafit.apps.protocol import Protocol
    from metafit.data import read
    from metafit.errors import BadInput

    prepared, protocol = prepare(read(str(digits))), Protocol(2, 1, 5, 20, steps=12)
    rows: list[tuple[str, int]] = []

    def run(folder: str, stop: int | None = None, resume: bool = False, seed: int = 0) -> dict[str, Any]:
        rows.clear()

        def watch(row: Any) -> None:
            rows.append((row["learner"], row["step"]))
            if (row["learner"], row["step"]) == ("matching", stop):
                raise KeyboardInterrupt

        quiet: dict[str, Any] = {"baselines": ["centroid"], "show_progress": False, "watch": [watch], "resume": resume}
        return compare_learners(
            prepared, ["protonet", "matching"], replace(protocol, seed=seed), tmp_path / folder, **quiet
        )

    whole, told = run("whole"), list(rows)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop=6)
    first = json.loads((tmp_path / "stopped" / "models" / "protonet" / "state.json").read_text())
    again = run("stopped", resume=True)
    assert rows == told  # each once
    with pytest.raises(BadInput, match="cannot resume"):
        run("stopped", resume=True, seed=1)
    assert again["history"] == first["history"]  # it was not trained again, not to the second
    for ours, theirs in zip(again["against"], whole["against"], strict=True):
        assert ours["metrics"]["accuracy"] == theirs["metrics"]["accuracy"]
    assert again["metrics"]["loss"] == whole["metrics"]["loss"]


def test_a_model_folder_that_is_not_one(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    refused(metafit("evaluate", "--data", digits, "--model", folder), "is not a metafit model")
    (folder / "model.json").write_text('{"schema": 99, "kind": "learner"}')
    refused(metafit("evaluate", "--data", digits, "--model", folder), "schema 99", "upgrade")
    refused(metafit("predict", folder, digits), "schema 99")


def test_ctrl_c_leaves_the_last_good_checkpoint(digits: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    command = [sys.executable, "-m", "metafit.cli.app", "train", "--data", digits, "--way", "2", "--out", model]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
    running = subprocess.Popen([*map(str, command), "--steps", "100000"], stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        until = time.monotonic() + 120
        while not (model / "state.json").exists() and time.monotonic() < until:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130 and "stopped" in err and "Traceback" not in err
    from metafit.training import load_model

    assert load_model(model).learner.way is not None
    assert not list(model.glob("*.part")) and not list(model.glob(".*"))


def test_an_option_goes_to_the_learners_that_have_it_or_to_the_one_that_it_names() -> None:
    from metafit.cli.given import options_of

    learners = ["maml", "imaml", "protonet"]
    made = options_of(learners, ["imaml:pull=0.1", "imaml:rate=0.2", "rate=0.5", "metric=cosine"])
    assert made == {"maml": {"rate": 0.5}, "imaml": {"rate": 0.2, "pull": 0.1}, "protonet": {"metric": "cosine"}}
    with pytest.raises(ValueError, match=r"unknown option 'imml:pull=1': learner 'imml': did you mean 'imaml'"):
        options_of(learners, ["imml:pull=1"])
    with pytest.raises(ValueError, match="unknown option of maml 'metric'") as told:
        options_of(learners, ["maml:metric=cosine"])
    assert "metric" not in str(told.value).partition("known:")[2]
    made = options_of(["maml"], ["steps=1", "finetune:steps=3"], ["finetune", "linear"])
    assert made == {"maml": {"steps": 1}, "finetune": {"steps": 3}, "linear": {}}


def test_evaluate_keeps_the_options_of_a_baseline(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    where = ("--data", digits, "--way", 2, "--episodes", 5, "--seed", 3, "--out", tmp_path / "e", "--json")
    made = json.loads(metafit("evaluate", "--learner", "linear", "--option", "strength=0.001", *where).out)
    assert made["learner"]["name"] == "linear" and made["learner"]["options"] == {"strength": 0.001}
    assert [row["learner"] for row in made["against"]] == ["centroid", "finetune"]
    assert made["protocol"]["seed"] == 3


def test_a_learner_that_diverged_is_told_of(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    where = ("--data", digits, "--way", 2, "--episodes", 5, "--out", tmp_path / "e")
    done = metafit("evaluate", "--learner", "finetune", "--option", "rate=1e300", *where)
    assert done.status == 0 and "loss –" in done.err


def test_how_the_outer_step_is_taken(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    given = ("--way", 2, "--steps", 2, "--accumulate", 2, "--ema", 0.9, "--schedule", "linear", "--json")
    command = ("train", "--data", digits, "--out", tmp_path, *given, "--resume")
    first, second = json.loads(metafit(*command, "--precision", "bf16").out)["history"][1:]
    assert first["rate"] == 2 * second["rate"] > 0
    about = json.loads((tmp_path / "state.json").read_text())
    assert about["how"] == {"precision": "bf16", "accumulate": 2, "ema": 0.9}
    refused(metafit(*command), "cannot resume", "another protocol (precision left out, was bf16)")


def test_a_model_of_other_columns_is_named(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    model = ("--model", tmp_path / "model")
    assert metafit("train", "--data", digits, "--way", 2, "--steps", 1, "--out", tmp_path / "model").status == 0
    for columns in ("p20", "p20,p21"):
        done = metafit("adapt", digits, *model, "--features", columns, "-o", tmp_path / "task")
        refused(done, "trained on 64", "pass the same ones")
        where = ("--features", columns, "--way", 2, "--out", tmp_path / "e")
        refused(metafit("evaluate", "--data", digits, *model, *where), "trained on 64")
    refused(metafit("evaluate", "--data", "home-intents", *model, "--way", 2, "--out", tmp_path / "e"), "plain vectors")


def test_nothing_that_was_learned_is_overwritten_by_something_else(
    metafit: Callable[..., Done], digits: Path, tmp_path: Path
) -> None:
    model, few = tmp_path / "model", tmp_path / "few"
    assert metafit("train", "--data", digits, "--way", 2, "--steps", 1, "--out", model).status == 0
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    refused(metafit("adapt", digits, "-o", model), "output folder", "it holds a learner", "name another")
    refused(metafit("compare", "--data", digits, "--way", 2, "--out", model), "it holds a learner")
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    refused(metafit("train", "--env", "bandit", "--steps", 1, "--out", model), "it holds a learner")
    refused(metafit("evaluate", "--data", digits, "--model", model, "--way", 2, "--out", model), "it holds a learner")
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    refused(metafit("pretrain", "--data", digits, "--steps", 1, "--out", model), "it holds a learner")
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before
    pretrained = tmp_path / "pretrained"
    assert metafit("pretrain", "--data", digits, "--steps", 1, "--out", pretrained).status == 0
    before = {file.name: file.read_bytes() for file in pretrained.iterdir()}
    done = metafit("train", "--data", digits, "--backbone", pretrained, "--way", 2, "--steps", 1, "--out", pretrained)
    refused(done, "it holds a pretraining state", "name another")
    assert {file.name: file.read_bytes() for file in pretrained.iterdir()} == before
    few.mkdir()
    refused(metafit("adapt", few, "-o", few), "it is the folder of the data")
    assert "classes" not in json.loads((model / "state.json").read_text())["work"], "states of before have none"
    assert (model / "tasks.json").exists()
    again = ("train", "--data", digits, "--steps", 1, "--out", model, "--unsupervised", "cactus")
    assert metafit(*again).status == 0 and not (model / "tasks.json").exists(), "of the model that was there"


def test_a_learner_that_has_seen_no_past_task_says_so(
    metafit: Callable[..., Done], digits: Path, tmp_path: Path
) -> None:
    done = metafit("adapt", digits, "--learner", "relation", "-o", tmp_path / "few")
    assert done.status == 0 and "relation learns from past tasks, and has seen none: train it first" in done.err
    assert "past tasks" not in metafit("adapt", digits, "--learner", "knn", "-o", tmp_path / "near").err


def test_a_model_knows_its_columns_by_name(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    """The same rows with their columns turned round, and with one more: the same answers; other names: refused."""
    import pandas as pd

    rows, model = pd.read_csv(digits), tmp_path / "model"
    few = rows.groupby("label").head(3)
    assert metafit("train", "--data", digits, "--way", 2, "--steps", 20, "--out", model).status == 0
    answers, scores = [], []
    for i, columns in enumerate((list(rows), list(rows)[::-1], ["extra", *rows])):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, part in (("few", few), (digits.stem, rows)):
            part.assign(extra=range(len(part)))[columns].to_csv(folder / f"{name}.csv", index=False)
        assert metafit("adapt", folder / "few.csv", "--model", model, "-o", folder / "task").status == 0
        told = json.loads(metafit("predict", folder / "task", folder / "digits.csv", "--json").out)
        answers.append([row["prediction"] for row in told])
        given = ("--model", model, "--way", 2, "--episodes", 20, "--out", folder / "e", "--json")
        made = json.loads(metafit("evaluate", "--data", folder / "digits.csv", *given).out)
        scores.append(made["metrics"]["accuracy"]["mean"])
    assert answers[0] == answers[1] == answers[2] and scores[0] == scores[1] == scores[2]
    few.rename(columns={"p3": "q3"}).to_csv(tmp_path / "other.csv", index=False)
    refused(
        metafit("adapt", tmp_path / "other.csv", "--model", model, "-o", tmp_path / "task"), "no feature column 'p3'"
    )
    where = ("--model", model, "--way", 2, "--out", tmp_path / "e")
    refused(metafit("evaluate", "--data", tmp_path / "other.csv", *where), "no 'p3' here", "rename")


def test_the_index_of_a_data_frame_is_no_feature(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    import pandas as pd

    shuffled = pd.read_csv(digits)[["p20", "p21", "label"]].sample(60, random_state=0)
    shuffled.to_parquet(tmp_path / "t.parquet")
    done = metafit("adapt", tmp_path / "t.parquet", "-o", tmp_path / "task")
    assert "no feature" in done.err and "__index_level_0__" in done.err
    assert json.loads((tmp_path / "task" / "model.json").read_text())["features"] == 2


def test_too_few_classes_to_split(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    rows = digits.read_text().splitlines()
    (tmp_path / "three.csv").write_text("\n".join(rows[:91]) + "\n")
    done = metafit("train", "--data", tmp_path / "three.csv", "--way", 2, "--out", tmp_path / "model")
    assert done.status == 2 and "each needs 2; add classes" in done.err and "validation=0" not in done.err


def test_ways_beyond_the_training_classes(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    given = ("train", "--data", digits, "--way", 8, "--steps", 1, "--out", tmp_path / "model")
    refused(metafit(*given, "--learner", "maml"), "way 8", "6 training classes", "6 ways or fewer")
    done = metafit(*given, "--learner", "protonet")
    assert done.status == 0 and "way 8: the training tasks have 6" in done.err


def test_classes_that_were_trained_on_are_not_called_unseen(
    metafit: Callable[..., Done], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some of the classes in a table of the same name, and the same table under another name and seed."""
    model, some, other = tmp_path / "model", tmp_path / "some" / digits.name, tmp_path / "other.csv"
    assert metafit("train", "--data", digits, "--way", 2, "--steps", 1, "--out", model).status == 0
    met = json.loads((model / "model.json").read_text())["recipe"]["classes"]
    rows = digits.read_text().splitlines()
    label = rows[0].split(",").index("label")
    some.parent.mkdir()
    some.write_text("\n".join([rows[0], *(row for row in rows[1:] if row.split(",")[label] in met)]))
    given = ("--model", model, "--way", 2, "--episodes", 5, "--out", tmp_path / "e")
    done = metafit("evaluate", "--data", some, *given)
    assert done.status == 2 and "has seen 3 classes that are held out here" in done.err
    other.write_bytes(digits.read_bytes())
    done = metafit("evaluate", "--data", other, *given, "--seed", 3)
    assert done.status == 0 and "where they are the same, the result is too good" in done.err


def test_a_learner_without_time_for_a_step_is_not_called_meta_trained(digits: Path) -> None:
    from metafit.apps.budget import Budget
    from metafit.apps.comparing import compare_learners
    from metafit.apps.preparing import prepare
    from metafit.apps.protocol import Protocol
    from metafit.data import read

    prepared, protocol = prepare(read(str(digits), None, "label", None), None), Protocol(2, 1, 5, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "training", lambda self: 0.0)
        with pytest.raises(ValueError, match=r"protonet is left out: .* before the first step"):
            compare_learners(prepared, ["protonet"], protocol, budget=60.0, show_progress=False)


def test_a_trained_backbone_of_other_sizes(tmp_path: Path) -> None:
    """A model reads data through its own network: what it was trained on, and how it is loaded, are in its folder."""
    import torch

    from metafit.apps.comparing import evaluate_one
    from metafit.apps.estimators import FewShotClassifier
    from metafit.apps.meta_training import train
    from metafit.apps.preparing import prepare
    from metafit.apps.protocol import Protocol
    from metafit.data import Source

    def shapes(size: int) -> Source:
        y = torch.arange(10).repeat_interleave(4)
        x = torch.randint(0, 256, (40, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return Source("shapes", x, y, tuple("abcdefghij"), "image")

    protocol = Protocol(2, 1, query=2, episodes=2, steps=1, seed=4)
    prepared, again, other = (prepare(shapes(16), "conv4", seed=seed) for seed in (4, 4, 5))
    assert prepared.body is not None and again.body is not None and other.body is not None
    first = next(prepared.body.parameters())
    assert torch.equal(first, next(again.body.parameters())), "the seed is that of the initialisation"
    assert not torch.equal(first, next(other.body.parameters()))
    train(prepared, "protonet", protocol, tmp_path)
    about = json.loads((tmp_path / "model.json").read_text())["recipe"]
    assert about["source"]["name"] == "shapes" and about["scaling"] is None
    made = evaluate_one(shapes(28), tmp_path, None, protocol)
    assert made["protocol"]["seed"] == 4 and made["learner"]["meta_trained"]
    assert made["random_weights"], "of the network before meta-training"
    with pytest.raises(ValueError, match="another seed"):
        evaluate_one(shapes(16), tmp_path, None, protocol, seed=5)
    images = list(shapes(16).x[:8].numpy())
    few = FewShotClassifier(model=tmp_path).fit(images, [0] * 4 + [1] * 4)
    assert few.predict(images).shape == (8,)


def test_columns_that_do_not_vary() -> None:
    import torch

    from metafit.apps.preparing import prepare
    from metafit.data import from_arrays

    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0.1  # not a whole number of halves: its mean and spread are rounded
    prepared = prepare(from_arrays(x, [f"{i % 10}" for i in range(400)]))
    assert prepared.splits.train.x[:, 1].abs().max() < 1e-6


def test_nothing_given_is_answered_by_the_help(metafit: Callable[..., Done]) -> None:
    done = metafit()
    assert done.status == 2 and "Usage" in done.out + done.err and "see metafit --help" not in done.err


def test_answers_for_what_python_saved(metafit: Callable[..., Done], tmp_path: Path) -> None:
    import pandas as pd

    from metafit import FewShotClassifier, FewShotRegressor

    few = FewShotClassifier().fit([[0.1, 0.0], [0.2, 0.0], [1.0, 0.0], [1.2, 0.0]], ["off", "off", "on", "on"])
    few.save(tmp_path / "task")
    (tmp_path / "new.csv").write_text("a,b\n0.1,0\n1.1,0\n")
    rows = json.loads(metafit("predict", tmp_path / "task", tmp_path / "new.csv", "--json").out)
    assert [(row["a"], row["prediction"]) for row in rows] == [(0.1, "off"), (1.1, "on")]
    rows = pd.DataFrame([[0.1, 0.0], [0.2, 0.0], [1.0, 0.0]], columns=["a", "b"])
    two = FewShotRegressor().fit(rows, [[1.0, 2.0], [1.1, 2.0], [2.0, 3.0]])
    two.save(tmp_path / "two")
    (tmp_path / "three.csv").write_text("a,b,label\n0.1,0,7\n")
    rows = json.loads(metafit("predict", tmp_path / "two", tmp_path / "three.csv", "--json").out)
    assert len(rows[0]["prediction"]) == 2
    (tmp_path / "new.csv").write_text("a\n0.1\n")
    refused(metafit("predict", tmp_path / "task", tmp_path / "new.csv"), "1 feature columns", "learned from 2")
    (tmp_path / "new.csv").write_text("a,b\n")
    refused(metafit("predict", tmp_path / "task", tmp_path / "new.csv"), "no rows")


def test_going_on_learning(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    """Rows to go on with, a new class, drift, a class to forget; what is refused leaves the folder as it was."""
    head, *rows = digits.read_text().splitlines()
    task, more = tmp_path / "task", tmp_path / "more.csv"

    def write(path: Path, chosen: list[str]) -> Path:
        path.write_text("\n".join([head.replace("label", "what"), *chosen]) + "\n")
        return path

    first = write(tmp_path / "first.csv", [row for i, row in enumerate(rows) if i % 30 < 8 and "digit 9" not in row])
    assert metafit("adapt", first, "--label", "what", "--learner", "linear", "-o", task).status == 0
    done = metafit("update", task, write(more, rows[8::30] + rows[9::30]), "--json")
    made = json.loads(done.out)
    assert "20 more examples, new classes 'digit 9'" in done.err and "drift" not in done.err
    assert made["seen"] == {f"digit {c}": 10 if c < 9 else 2 for c in range(10)}
    assert made["drift"]["tested"] == 18 and made["drift"]["alarms"] == []
    told = {row["prediction"] for row in json.loads(metafit("predict", task, write(more, rows[-9:]), "--json").out)}
    assert "digit 9" in told

    before = (task / "model.json").read_bytes()
    refused(metafit("update", task, "--forget", "digit 8", "--forget", "digit 88"), "digit 88", "did you mean")
    refused(metafit("update", task, tmp_path / "nowhere.csv"), "nowhere.csv")
    refused(metafit("update", task), "--forget")
    refused(metafit("update", tmp_path, more), "not a metafit model")
    assert (task / "model.json").read_bytes() == before
    assert metafit("update", task, "--forget", "digit 9", "--json").status == 0
    assert "digit 9" not in {row["prediction"] for row in json.loads(metafit("predict", task, more, "--json").out)}

    swapped = [row[:-1] + {"1": "2", "2": "1"}[row[-1]] for row in rows[40:90]]
    done = metafit("update", task, write(more, swapped), "--json")
    assert "drift: the new examples are not like those before" in done.err and json.loads(done.out)["drift"]["alarms"]
    write(first, [row.replace("digit ", "") for row in rows])
    assert metafit("adapt", first, "--label", "what", "--regression", "-o", task).status == 0
    refused(metafit("update", task, first), "FewShotRegressor", "remembers no examples")


def test_answers_that_depend_on_each_other_say_so(metafit: Callable[..., Done], tmp_path: Path) -> None:
    from PIL import Image

    for name, colour in (("dark", 20), ("light", 200)):
        (tmp_path / "few" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (84, 84), colour + 5 * i).save(tmp_path / "few" / name / f"{i}.png")
    assert metafit("adapt", tmp_path / "few", "--backbone", "conv4", "-o", tmp_path / "task").status == 0
    assert "depend on the other inputs" in metafit("predict", tmp_path / "task", tmp_path / "few").err


def test_few_classes_go_without_validation(metafit: Callable[..., Done], digits: Path, tmp_path: Path) -> None:
    rows = digits.read_text().splitlines()
    (tmp_path / "six.csv").write_text("\n".join([rows[0], *rows[1:181]]) + "\n")
    short = ("--steps", 5, "--episodes", 20, "--out", tmp_path / "out", "--json")
    done = metafit("compare", "--data", tmp_path / "six.csv", *short)
    made = json.loads(done.out)
    assert "too few" in done.err and made["protocol"]["way"] == 2
    assert made["source"]["classes"]["validation"] == [] and all(r["validation"] is None for r in made["history"])
