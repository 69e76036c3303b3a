"""SetFit 1.2: ``Trainer`` with its default arguments, but for files and logs, on the MiniLM that metafit uses."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from metafit import disk, wheels
from metafit.backbones.minilm import FOLDER, WHEEL

Classify = Callable[[Sequence[str], Sequence[int], Sequence[str]], list[int]]


def classifier(folder: Path) -> Classify:
    """A function from labelled texts and new texts to the labels of the new ones.

    Args:
        folder: where the model is unpacked, and where training may write.
    """
    from datasets import Dataset, disable_progress_bars
    from setfit import SetFitModel, Trainer, TrainingArguments

    disable_progress_bars()
    logging.getLogger("setfit").setLevel(logging.WARNING)
    with _silence():
        weights = SetFitModel.from_pretrained(str(_unpacked(folder)), local_files_only=True)
    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "show_progress_bar": False}
    arguments = TrainingArguments(output_dir=str(folder / "out"), **quiet)

    def classify(texts: Sequence[str], labels: Sequence[int], new: Sequence[str]) -> list[int]:
        model = copy.deepcopy(weights)  # training changes it
        data = Dataset.from_dict({"text": list(texts), "label": list(labels)})
        with _silence():
            Trainer(model=model, args=arguments, train_dataset=data).train()
            return [int(label) for label in model.predict(list(new), show_progress_bar=False)]

    return classify


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The library prints progress, some of it where results belong."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _unpacked(folder: Path) -> Path:
    for path in wheels.members(WHEEL, f"{FOLDER}/*"):
        disk.write_bytes(folder / path, wheels.member(WHEEL, path))
    return folder / FOLDER
