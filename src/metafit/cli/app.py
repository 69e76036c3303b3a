"""The ``metafit`` command. Heavy libraries are imported when a command runs, so that help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from metafit import processes
from metafit._version import __version__
from metafit.cli.given import (
    backbone_or_none,
    by_commas,
    number_or_range,
    only_these,
    options_of,
    pairs,
    source_of,
    training_choices,
    ways_of,
)
from metafit.cli.options import (
    LEAST_RATE,
    MOST_SEEDS,
    AsJson,
    Augment,
    Backbone,
    Balance,
    Config,
    Data,
    DataOrNone,
    Domain,
    Env,
    EnvOptions,
    Episodes,
    Features,
    Label,
    Options,
    OptionsOfEach,
    Out,
    Patience,
    Query,
    Rate,
    Seed,
    Shot,
    Steps,
    Text,
    Track,
    TrainBackbone,
    TrainWay,
    Way,
    WithoutLabels,
    over_file,
)
from metafit.cli.shown import (
    first_sentence,
    in_words,
    print_json,
    show_result,
    show_table,
    show_trained,
    tell_run,
    tracked,
)
from metafit.errors import BadInput

app = typer.Typer(
    help="Meta-learning on pretrained models: does it beat the frozen model on your tasks, and by how much?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _begin(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if processes.together() != (1, 1) and context.invoked_subcommand != "train":
        raise BadInput(f"{context.invoked_subcommand}: it runs in one process; torchrun is for metafit train")


@app.command()
def demo(out: Out = Path("demo-out"), seed: Seed = 0, as_json: AsJson = False) -> None:
    """Meta-train, evaluate, compare and report on packaged real data: a few minutes."""
    from metafit.apps.demo import run

    results = run(out, seed)
    if as_json:
        print_json(results)


@app.command()
def compare(
    context: typer.Context,
    data: Data,
    learner: Annotated[str, typer.Option(help="Learners, by commas, or all; the first one's result.")] = "protonet",
    out: Out = Path("out"),
    text: Text = None,
    label: Label = "label",
    features: Features = None,
    domain: Domain = None,
    backbone: Backbone = "auto",
    train_backbone: TrainBackbone = False,
    way: Way = None,
    shot: Shot = "1",
    query: Query = 15,
    episodes: Episodes = 600,
    steps: Steps = None,
    rate: Rate = None,
    train_way: TrainWay = None,
    patience: Patience = 8,
    augment: Augment = None,
    balance: Balance = None,
    unsupervised: WithoutLabels = None,
    seed: Seed = 0,
    option: OptionsOfEach = None,
    budget: Annotated[str | None, typer.Option(help="Time for all of it, as 90s, 10m or 1.5h.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from where a comparison in --out was stopped.")
    ] = False,
    config: Config = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Meta-train on some classes, compare on others: learners against the frozen baselines, on the same tasks."""
    from metafit.apps.budget import seconds
    from metafit.apps.comparing import BASELINES, compare_learners
    from metafit.apps.preparing import prepare
    from metafit.apps.protocol import Protocol
    from metafit.learners import ENTRIES, entry

    names = by_commas(learner)
    if not names:
        raise BadInput("--learner is empty: name one or more; see metafit learners")
    every = names == ["all"]
    options = options_of([*ENTRIES] if every else names, option, BASELINES)
    for name in [] if every else names:
        entry(name)
    limit = None if budget is None else seconds(budget)
    protocol = Protocol(
        ways_of(way),
        number_or_range("shot", shot),
        query,
        episodes,
        steps,
        seed,
        patience,
        *training_choices(augment, balance, unsupervised),
        rate=rate,
        train_way=train_way,
    )
    source = source_of(data, text, label, features, domain)
    with tracked(context) as run:
        prepared = prepare(source, backbone_or_none(backbone), train_backbone, seed)
        made = compare_learners(
            prepared, names, protocol, out, options=options, budget=limit, watch=[run], resume=resume
        )
        tell_run(run, made)
    show_result(made, out, as_json)


@app.command()
def train(
    context: typer.Context,
    data: DataOrNone = None,
    env: Env = None,
    learner: Annotated[
        str | None, typer.Option(help="See `metafit learners`; protonet, or with --env rl2, where left out.")
    ] = None,
    out: Out = Path("model"),
    text: Text = None,
    label: Label = "label",
    features: Features = None,
    domain: Domain = None,
    backbone: Backbone = "auto",
    train_backbone: TrainBackbone = False,
    way: Way = None,
    shot: Shot = "1",
    query: Query = 15,
    steps: Steps = None,
    rate: Rate = None,
    train_way: TrainWay = None,
    patience: Patience = 8,
    augment: Augment = None,
    balance: Balance = None,
    unsupervised: WithoutLabels = None,
    seed: Seed = 0,
    option: Options = None,
    env_option: EnvOptions = None,
    precision: Annotated[str | None, typer.Option(help="fp32 (where left out), bf16, or on a GPU fp16.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Tasks a batch; the learner's default where left out.")
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Batches of tasks to an outer step.")] = 1,
    ema: Annotated[float | None, typer.Option(help="Keep an average of the parameters, of this decay: 0.99.")] = None,
    schedule: Annotated[str, typer.Option(help="Of the outer rate: cosine, linear, constant.")] = "cosine",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where a run in --out was stopped.")] = False,
    config: Config = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Meta-train a learner and leave a model folder; with torchrun, in several processes."""
    learner = learner or ("protonet" if env is None else "rl2")
    context.params["learner"] = learner  # the run's record names it, whoever chose it
    if env is not None:
        from metafit import rl

        if processes.together() != (1, 1):
            raise BadInput("train --env: it runs in one process; torchrun is for labelled data")
        only_these(context, "learner", "out", "steps", "rate", "seed", "option", "env_option", "resume", "track")
        with tracked(context) as run:
            _, _, trained = rl.train(
                learner, env, pairs(env_option), options=pairs(option), steps=steps, rate=rate, seed=seed,
                out=out, resume=resume, watch=[run],
            )  # fmt: skip
        show_trained(trained, out, as_json)
        return
    if data is None:
        raise BadInput("train: name labelled data with --data, or environments with --env")

    from metafit.apps import meta_training
    from metafit.apps.preparing import prepare
    from metafit.apps.protocol import Protocol
    from metafit.learners import entry
    from metafit.training import of_torchrun

    if not entry(learner).meta_trained:
        raise BadInput(
            f"learner {learner!r} has nothing to meta-train: use it with `metafit evaluate --learner {learner}`"
        )
    tasks = (ways_of(way), number_or_range("shot", shot), query, 600, steps, seed, patience)
    outer: Any = {"precision": precision, "accumulate": accumulate, "ema": ema, "schedule": schedule}
    outer |= {"rate": rate, "train_way": train_way, "batch": batch}
    protocol = Protocol(*tasks, *training_choices(augment, balance, unsupervised), **outer)
    options = options_of([learner], option)
    source = source_of(data, text, label, features, domain)
    with tracked(context) as run:
        prepared = prepare(source, backbone_or_none(backbone), train_backbone, seed)
        fabric, own = of_torchrun(protocol.precision), options.get(learner)
        _, trained = meta_training.train(prepared, learner, protocol, out, resume, own, watch=[run], fabric=fabric)
    show_trained(trained, out, as_json)


@app.command()
def improve(
    context: typer.Context,
    data: Data,
    learner: Annotated[str, typer.Option(help="A learner to start from; see `metafit learners`.")] = "protonet",
    out: Out = Path("out"),
    text: Text = None,
    label: Label = "label",
    features: Features = None,
    domain: Domain = None,
    backbone: Backbone = "auto",
    train_backbone: TrainBackbone = False,
    way: Way = None,
    shot: Shot = "1",
    query: Query = 15,
    episodes: Episodes = 600,
    steps: Steps = None,
    rate: Rate = None,
    train_way: TrainWay = None,
    augment: Augment = None,
    balance: Balance = None,
    seed: Seed = 0,
    option: Options = None,
    budget: Annotated[str, typer.Option(help="Time for trials, as 90s, 10m or 1.5h.")] = "10m",
    tasks: Annotated[int, typer.Option(min=20, help="Validation tasks that choose; as many others judge.")] = 300,
    storage: Annotated[
        str | None, typer.Option(help="Of the trials, for several machines: postgresql://..., journal:FILE, ...")
    ] = None,
    task: Annotated[str | None, typer.Option(help="With --verdicts: the labelled table they are about.")] = None,
    verdicts: Annotated[
        str | None, typer.Option(help="Predictions with a column `right`, in place of validation accuracy.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the loop in --out.")] = False,
    config: Config = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Diagnose, propose changes, try them, keep what is better beyond chance; then look at the test tasks, once."""
    from functools import partial

    from metafit.apps.budget import seconds
    from metafit.apps.improving import Improvement
    from metafit.apps.preparing import prepare
    from metafit.apps.protocol import Protocol
    from metafit.feedback.report import verdict
    from metafit.progress import say
    from metafit.weights import free_for

    if (task is None) != (verdicts is None):
        raise BadInput("improve: --task and --verdicts go together: the labelled table, and what was said of answers")
    limit = seconds(budget)
    augments, balanced, _ = training_choices(augment, balance, None)
    start: dict[str, Any] = {"learner": learner, "backbone": backbone_or_none(backbone)}
    given = {
        "steps": steps,
        "rate": rate,
        "train_way": train_way,
        "balance": balanced,
        "augment": list(augments),
        "train_backbone": train_backbone,
    }
    start |= {word: value for word, value in given.items() if value}
    start |= {f"option.{name}": value for name, value in options_of([learner], option)[learner].items()}
    reward = None
    if task is not None and verdicts is not None:
        from metafit.apps.verdicts import read_verdicts

        reward = read_verdicts(task, verdicts, text, label, None if features is None else by_commas(features))
    if storage is None and not resume and (out / "trials.db").exists():
        raise BadInput(f"{out}: a loop was begun there; go on with --resume, or name another folder")
    source = source_of(data, text, label, features, domain)
    protocol = Protocol(ways_of(way), number_or_range("shot", shot), query, episodes, seed=seed)
    free_for(out, None)  # said before the data are prepared; and what is refused leaves the folder's record as it was
    loop = Improvement(partial(prepare, source, seed=seed), start, protocol, out, storage, reward, tasks)
    if resume and storage is None and (out / "trials.db").exists():
        loop.check_begun()
    with tracked(context) as run:
        chain, made = loop.run(limit)
        tell_run(run, made)
    say(verdict(chain, made))
    say(f"{out / 'report.html'}")
    if as_json:
        print_json(made)


@app.command()
def pretrain(
    context: typer.Context,
    data: Data,
    method: Annotated[
        str, typer.Option(help="supervised, cosine, simclr, vicreg, denoise (rows), or distil from a larger backbone.")
    ] = "supervised",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the backbone.")] = Path("backbone"),
    text: Text = None,
    label: Label = "label",
    features: Features = None,
    backbone: Annotated[str, typer.Option(help="What is pretrained: see `metafit backbones`, or a folder.")] = "auto",
    teacher: Annotated[str | None, typer.Option(help="Of distil; the usual one by kind where left out.")] = None,
    mixup: Annotated[float, typer.Option(min=0.0, help="Mix examples in shares drawn from Beta(a, a): this a.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the training.")] = 1000,
    batch: Annotated[int, typer.Option(min=2, help="Examples a step.")] = 128,
    rate: Annotated[
        float | None, typer.Option(min=LEAST_RATE, help="Learning rate at first; by the backbone where left out.")
    ] = None,
    seed: Seed = 0,
    option: Annotated[
        list[str] | None, typer.Option("--option", callback=over_file, help="Of the backbone, as name=value.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where a run in --out was stopped.")] = False,
    config: Config = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Pretrain a backbone on the training classes and leave a folder that --backbone takes, with the same --seed."""
    from metafit.apps.pretraining import pretrain_backbone

    source, chosen = source_of(data, text, label, features), pairs(option)
    with tracked(context):
        made = pretrain_backbone(
            source, method, out, backbone, mixup, teacher, steps, batch, rate, seed, chosen, resume
        )
    if as_json:
        print_json({"backbone": str(out), **made})


@app.command()
def evaluate(
    context: typer.Context,
    data: DataOrNone = None,
    env: Env = None,
    model: Annotated[Path | None, typer.Option(help="A model folder.")] = None,
    learner: Annotated[str | None, typer.Option(help="Without a model: a learner, untrained.")] = None,
    out: Out = Path("out"),
    text: Text = None,
    label: Label = "label",
    features: Features = None,
    backbone: Backbone = "auto",
    way: Way = None,
    shot: Shot = "1",
    query: Query = 15,
    episodes: Episodes = 600,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_SEEDS, help="Of the class split and tasks; the model's where left out."),
    ] = None,
    option: Options = None,
    env_option: EnvOptions = None,
    against: Annotated[list[Path] | None, typer.Option(help="With --env: another model folder, side by side.")] = None,
    moments: Annotated[
        int | None, typer.Option(min=1, help="With --env: episodes of a trial, or updates of MAML and one more.")
    ] = None,
    config: Config = None,
    track: Track = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model folder, or an untrained learner, on test classes, against the frozen baselines."""
    if (model is None) == (learner is None):
        raise BadInput("evaluate: name a model folder with --model, or an untrained learner with --learner")
    if env is not None:
        from metafit import rl
        from metafit.progress import say

        words = ("model", "learner", "out", "episodes", "seed", "option", "env_option", "against", "moments", "track")
        only_these(context, *words)
        with tracked(context) as run:
            made = rl.evaluate_one(
                env,
                model,
                learner,
                pairs(env_option),
                pairs(option),
                against or [],
                episodes,
                moments,
                seed or 0,
                out,
            )
            tell_run(run, made)
        say(rl.verdict(made))
        say(f"{out / 'report.html'}")
        if as_json:
            print_json(made)
        return
    if data is None:
        raise BadInput("evaluate: name labelled data with --data, or environments with --env")

    from metafit.apps.comparing import evaluate_one
    from metafit.apps.protocol import Protocol

    if model is not None and (option or backbone != "auto"):
        raise BadInput("evaluate: --model has its backbone and options; leave --backbone and --option out")
    source = source_of(data, text, label, features)
    protocol = Protocol(ways_of(way), number_or_range("shot", shot), query, episodes, None, seed or 0)
    options = options_of([learner], option).get(learner, {}) if learner else {}
    with tracked(context) as run:
        made = evaluate_one(source, model, learner, protocol, backbone_or_none(backbone), seed, out, options)
        tell_run(run, made)
    show_result(made, out, as_json)


@app.command()
def adapt(
    data: Annotated[str, typer.Argument(help="Labelled examples: a table, or a folder of images by class.")],
    out: Out,
    model: Annotated[Path | None, typer.Option(help="A model folder of `metafit train`.")] = None,
    text: Text = None,
    label: Label = "label",
    features: Features = None,
    learner: Annotated[str, typer.Option(help="Without a model: a learner.")] = "auto",
    backbone: Backbone = "auto",
    regression: Annotated[bool, typer.Option("--regression", help="The labels are numbers to predict.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn a new task from a few labelled examples; then `metafit predict`."""
    from metafit.apps.folders import adapt_folder

    names = None if features is None else by_commas(features)
    learned = adapt_folder(data, out, model, text, label, names, learner, backbone_or_none(backbone), regression)
    if as_json:
        classes = None if regression else learned.classes_.tolist()
        about = {"learner": learned.learner_.recipe["name"], "transductive": learned.transductive_}
        about["usual"] = getattr(learned, "usual_", None)
        print_json({"folder": str(out), **about, "classes": classes})


@app.command()
def update(
    folder: Annotated[Path, typer.Argument(help="What `metafit adapt` left.")],
    data: Annotated[str | None, typer.Argument(help="More labelled examples, of the same kind.")] = None,
    forget: Annotated[list[str] | None, typer.Option(help="A class to forget; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Go on learning: more labelled examples, new classes, classes to forget; tells when the data has changed."""
    from metafit.apps.folders import update_folder

    if data is None and not forget:
        raise BadInput("nothing to update: give labelled examples, or --forget CLASS")
    learned = update_folder(folder, data, forget or ())
    if as_json:
        seen = {str(label): learned.memory_[label].seen for label in learned.memory_}
        drift = {"strength": learned.drift_.strength, "alarms": learned.drift_.alarms, "tested": learned.drift_.tested}
        print_json({"folder": str(folder), "seen": seen, "drift": drift})


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(help="What `metafit adapt` left.")],
    data: Annotated[str, typer.Argument(help="New inputs: a table with the same columns, or a folder of images.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a CSV file, not to standard output.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer for new inputs: CSV with the prediction and its confidence."""
    from metafit.apps.folders import as_csv, predict_folder
    from metafit.disk import write_bytes

    rows = predict_folder(folder, data)
    if out is not None:
        write_bytes(out, as_csv(rows).encode())
    if as_json:
        print_json(rows)
    elif out is None:
        sys.stdout.write(as_csv(rows))


@app.command()
def learners(
    name: Annotated[str | None, typer.Argument(help="One of them: its options and their defaults.")] = None,
    as_json: AsJson = False,
) -> None:
    """The catalogue of learners: name, family, paper, our measured row."""
    from metafit.learners import ENTRIES, entry
    from metafit.learners.choices import NAMES

    if name is not None:
        one = entry(name)
        kinds, named = one.kinds(), NAMES if one.family == "gradient" else {}
        rows = [(o, usual, ", ".join(named.get(o, ())) or in_words(kinds.get(o))) for o, usual in one.options().items()]
        show_table(("option", "default", "takes"), rows, as_json)
        return
    show_table(
        ("name", "family", "title", "paper", "measured"),
        [
            (e.name, e.family, e.title + " (transductive)" * e.transductive, e.paper, e.measured())
            for e in ENTRIES.values()
        ],
        as_json,
    )


@app.command()
def environments(as_json: AsJson = False) -> None:
    """The environments to act in, and the agents that learn to adapt to them."""
    from metafit.rl.catalog import AGENTS, FAMILIES

    rows = [(name, "environments", first_sentence(made), "") for name, made in FAMILIES.items()]
    rows += [(e.name, "agent", e.title, e.paper) for e in AGENTS.values()]
    show_table(("name", "kind", "about", "paper"), rows, as_json)


@app.command()
def backbones(as_json: AsJson = False) -> None:
    """The catalogue of backbones."""
    from metafit.backbones import catalog

    show_table(
        ("name", "modality", "features", "pretrained", "about"),
        [
            (e.name, e.modality, e.out_dim, "yes" if e.pretrained else "no", f"{e.summary}; {e.source}")
            for e in catalog()
        ],
        as_json,
    )


@app.command()
def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="One: list the runs below it. More: compare them.")
    ] = None,
    sort: Annotated[str, typer.Option(help="started, the newest first, or best.")] = "started",
    as_json: AsJson = False,
) -> None:
    """List the runs below a folder, or tell how some differ in configuration and figures."""
    from metafit.cli.runs import SHOWN, compared, differences, listed, listing

    folders = folders or [Path()]
    found: Any = listing(folders[0], sort) if len(folders) == 1 else differences(folders)
    if as_json:
        print_json(found)
    elif len(folders) == 1:
        show_table(SHOWN, listed(found), False)
    else:
        show_table(("", *map(str, folders)), compared(found), False)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="The benchmark: speed.")],
    only: Annotated[str | None, typer.Option(help="Workloads, by commas; all of them where left out.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.")] = None,
    device: Annotated[str, typer.Option(help="Where gradient-based workloads run: cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for speed.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Speed and memory beside the peers that are installed, on this machine; see the extra `bench`."""
    from metafit.errors import unknown

    if name != "speed":
        raise unknown("benchmark", name, ["speed"])
    from metafit.bench import COLUMNS, Settings, run, table
    from metafit.disk import writable_folder

    if out is not None:
        writable_folder(out)
    made = run(by_commas(only or ""), threads, Settings(device=device), out)
    if as_json:
        print_json(made)
    else:
        show_table(COLUMNS, table(made), False)


def main() -> None:
    """Runs the command: 0 where it worked, 2 for bad input (one line says what), 130 for Ctrl-C."""
    try:
        status = app(standalone_mode=False)
        if status == 130:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
        sys.exit(status)
    except BadInput as error:
        print(f"metafit: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("metafit: stopped; what was saved is whole", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except PermissionError as error:
        if error.filename is None:
            raise
        print(
            f"metafit: {error.filename}: not permitted for this user; change its permissions, or name another "
            "(METAFIT_CACHE names the cache)",
            file=sys.stderr,
        )
        sys.exit(2)
    except Exception as error:  # a usage error: typer may bring click's classes or its own copies of them
        if not hasattr(error, "show"):
            raise
        message = error.format_message()  # type: ignore[attr-defined]
        if message:  # none where help was asked for by giving nothing
            command = getattr(getattr(error, "ctx", None), "command_path", "metafit")
            print(f"metafit: {message.rstrip('.')}; see {command} --help", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
