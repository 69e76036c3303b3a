"""SetFit 1.2: ``Trainer`` with its default arguments on the MiniLM weights that metafit uses."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from metafit import disk, wheels
from metafit.backbones.minilm import FOLDER, WHEEL

Classify = Callable[[Sequence[str], Sequence[int], Sequence[str]], list[int]]


def classifier(folder: Path) -> Classify:
    """A function from labelled texts and new texts to the labels of the new ones.

    Args:
        folder: where the model is unpacked, and where training may write.
    """
    os.environ.setdefault("WANDB_DISABLED", "true")
    from datasets import Dataset, disable_progress_bars
    from setfit import SetFitModel, Trainer, TrainingArguments

    disable_progress_bars()
    logging.getLogger("setfit").setLevel(logging.WARNING)
    weights = SetFitModel.from_pretrained(str(_unpacked(folder)), local_files_only=True)
    arguments = TrainingArguments(output_dir=str(folder / "out"), show_progress_bar=False, report_to="none")

    def classify(texts: Sequence[str], labels: Sequence[int], new: Sequence[str]) -> list[int]:
        model = copy.deepcopy(weights)  # training changes it
        data = Dataset.from_dict({"text": list(texts), "label": list(labels)})
        Trainer(model=model, args=arguments, train_dataset=data).train()
        return [int(label) for label in model.predict(list(new), show_progress_bar=False)]

    return classify


def _unpacked(folder: Path) -> Path:
    for path in wheels.members(WHEEL, f"{FOLDER}/*"):
        disk.write_bytes(folder / path, wheels.member(WHEEL, path))
    return folder / FOLDER
