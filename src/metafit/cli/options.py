"""The options that commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _configured(context: typer.Context, path: Path | None) -> Path | None:
    """The words of the file become defaults, so that those on the command line win."""
    if path is not None:
        from metafit.cli.config import read

        context.default_map = read(path, context)
    return path


def over_file(context: typer.Context, parameter: typer.CallbackParam, given: list[str] | None) -> list[str]:
    """Each option of the file stays, but for those that the command line gives anew: the last of a name counts."""
    return [*(context.default_map or {}).get(str(parameter.name), []), *(given or [])]


MOST_SEEDS, LEAST_RATE = 2**32 - 1, 1e-12
DATA = "A .csv, .tsv or .parquet file, a folder of images by class, or a packaged source."
Data = Annotated[str, typer.Option("--data", help=DATA)]
DataOrNone = Annotated[str | None, typer.Option("--data", help=DATA)]
Env = Annotated[str | None, typer.Option(help="In place of data, environments to act in: see `metafit environments`.")]
EnvOptions = Annotated[
    list[str] | None,
    typer.Option("--env-option", callback=over_file, help="An option of the environments, as name=value."),
]
Text = Annotated[str | None, typer.Option(help="The column of texts, where the data is a table.")]
Label = Annotated[str, typer.Option(help="The column of labels, where the data is a table.")]
Features = Annotated[str | None, typer.Option(help="Numeric columns, by commas (all of them where left out).")]
Domain = Annotated[str | None, typer.Option(help="The column of a class's domain, where the data is a table.")]
Augment = Annotated[
    str | None,
    typer.Option(
        help="Of the training tasks, by commas: affine, jitter, metamix, mirror, mlti, noise, permute-labels."
    ),
]
Balance = Annotated[
    str | None, typer.Option(help="Tasks within a domain, these drawn: uniform, loss, diversity, uncertainty.")
]
WithoutLabels = Annotated[
    str | None, typer.Option(help="Train without labels, on tasks made by this: cactus, umtra, mixture.")
]
Backbone = Annotated[str, typer.Option(help="See `metafit backbones`; auto chooses by the kind of data.")]
TrainBackbone = Annotated[bool, typer.Option(help="Train the backbone itself, not a map over it.")]
Way = Annotated[str | None, typer.Option(help="Classes a task; a range as 3-5. [5, or as many as there are]")]
Shot = Annotated[str, typer.Option(help="Support examples a class; a range as 1-5.")]
Query = Annotated[int, typer.Option(min=1, help="Query examples a class, where the data has them.")]
Episodes = Annotated[int, typer.Option(min=1, help="Test tasks.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Outer steps of meta-training.")]
Rate = Annotated[
    float | None, typer.Option(min=LEAST_RATE, help="Of the outer steps; the learner's default where left out.")
]
TrainWay = Annotated[
    int | None, typer.Option(min=2, help="Classes of a training task, for metric learners: more than in the test.")
]
Patience = Annotated[int, typer.Option(min=1, help="Looks at the validation tasks without a better one (of 20).")]
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEEDS, help="Of the class split, the tasks and the initialisation.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", callback=over_file, help="An option of the learner, as name=value.")
]
OptionsOfEach = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        callback=over_file,
        help="Of all that have it, as name=value, or of one, as LEARNER:name=value, which outweighs it.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", callback=_configured, is_eager=True, help="A YAML file of these options; see docs."),
]
Track = Annotated[str | None, typer.Option(help="Also log the run to: mlflow.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
