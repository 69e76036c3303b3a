"""From symptoms to changes of structure or strategy, each with the evidence that it is proposed for.

A setting is the words of the command line, flat: ``learner``, ``backbone``, ``train_backbone``, ``steps``, ``rate``,
``train_way``, ``augment``, ``balance``, and ``option.NAME`` for the options of the learner. A change sets some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from metafit.feedback.diagnose import Figures
from metafit.learners import entry

Setting = Mapping[str, Any]

POINT = 0.01  # of accuracy: what a lead must exceed to be evidence
SLOW, STILL = 0.7, 0.98  # support loss after over before: adaptation has more to give; it hardly happens
RISES = 0.05  # share of tasks whose support loss rises, above which steps are too long
SPREAD = 10.0  # between how far the layers move, above which one rate does not fit all
MOST_STEPS = 10  # of adaptation
EASY = 0.95  # of right answers: from there on tasks have little left to teach
OUTER = ("steps", "rate", "train_way")  # words that are of the outer training


class Proposal(NamedTuple):
    """A change of the setting.

    Attributes:
        change: words and their new values.
        evidence: why, with the figures that say so.
        rule: which rule of thumb proposes it.
    """

    change: dict[str, Any]
    evidence: str
    rule: str

    def on(self, setting: Setting) -> dict[str, Any]:
        """The setting with the change made. Another learner keeps the options that it has, too, and is trained in
        its own way: steps and rate of the outer training were another's."""
        kept = dict(setting)
        if self.change.get("learner", setting["learner"]) != setting["learner"]:
            kept = {word: value for word, value in setting.items() if word not in OUTER}
        return of_its_learner({**kept, **self.change})


def of_its_learner(setting: Setting) -> dict[str, Any]:
    """The setting without what its learner does not have."""
    line = entry(setting["learner"])
    known = {f"option.{name}" for name in line.options()} | ({"train_way"} if line.wide else set())
    return {k: v for k, v in setting.items() if k in known or not (k.startswith("option.") or k == "train_way")}


Rule = Callable[[Figures, Setting], Iterator[Proposal]]


def propose(figures: Figures, setting: Setting) -> list[Proposal]:
    """What the symptoms speak for, the surest first; each change once.

    Args:
        figures: of ``diagnose``, and under ``in_force`` what the training took where the setting names nothing:
            ``way``, ``steps``, ``rate`` (of the outer loop), ``inner_steps``, ``inner_rate``, ``frozen``, ``modality``,
            and of a ``wide`` learner ``train_way`` and ``most_train_way``.
        setting: that they were measured with.
    """
    found: dict[str, Proposal] = {}
    for rule in RULES:
        for proposal in rule(figures, setting):
            made = proposal.on(setting)
            if made != dict(setting):
                found.setdefault(repr(sorted(made.items())), proposal)
    return list(found.values())


def steps_too_long(f: Figures, s: Setting) -> Iterator[Proposal]:
    if _gradient(s) and (f["inner"]["rises"] > RISES or f["inner"]["falls"]["mean"] is None):
        why = f"the support loss ends higher than it began in {_percent(f['inner']['rises'])} of the tasks"
        for by in (4, 16):
            yield Proposal({"option.rate": _digits(f["in_force"]["inner_rate"] / by)}, why, "inner steps too long")


def steps_too_short(f: Figures, s: Setting) -> Iterator[Proposal]:
    falls = _gradient(s) and f["inner"]["falls"]["mean"]
    if falls and falls > SLOW and f["inner"]["rises"] <= RISES:
        after = f"after {f['in_force']['inner_steps']} inner step(s) the support loss is still {_percent(falls)} of"
        for by in (100, 10) if falls > STILL else (4,):
            rate = _digits(f["in_force"]["inner_rate"] * by)
            yield Proposal({"option.rate": rate}, f"{after} what it was before adaptation", "inner steps too short")


def steps_too_few(f: Figures, s: Setting) -> Iterator[Proposal]:
    if not _gradient(s):
        return
    taken, last = f["in_force"]["inner_steps"], f["inner"]["last_step"]
    if taken < MOST_STEPS and below(last):
        why = f"the last inner step still lowers the query loss, by {_figure(last, -1)}"
        yield Proposal({"option.steps": min(MOST_STEPS, max(5, 2 * taken))}, why, "too few inner steps")


def steps_too_many(f: Figures, s: Setting) -> Iterator[Proposal]:
    if not _gradient(s) or not above(f["inner"]["overshoot"]):
        return
    best, over = f["inner"]["best_step"], f["inner"]["overshoot"]
    why = f"the query loss is lowest after {best} inner step(s), and {_figure(over)} higher after the last"
    if best:
        yield Proposal({"option.steps": best}, why, "too many inner steps")
    if _option(s, "outer") != "implicit":  # it has a pull
        yield Proposal({"option.proximal": 0.1}, why, "pull to the start")


def scope_too_narrow(f: Figures, s: Setting) -> Iterator[Proposal]:
    if not _gradient(s):
        return
    scope, gain = _option(s, "scope"), f["inner"]["gain"]
    why = f"adapting {scope!r} gains {_points(gain, f)} over no adaptation"
    if scope not in ("all", "lora"):
        yield Proposal({"option.scope": "all"}, why, "wider scope")
    if scope not in ("head", "lora") and _option(s, "outer") != "reptile":  # it trains no body that does not adapt
        names = f["layers"] or {}
        against = [n for n, layer in names.items() if n.startswith("body.") and not above(layer["aligned"])]
        if against:
            why = (
                f"in {len(against)} of the {len(names)} parameters that adapt, {against[0]} say, the gradients of "
                "support and query loss do not point the same way beyond chance"
            )
            yield Proposal({"option.scope": "head"}, why, "narrower scope")


def one_rate_for_all(f: Figures, s: Setting) -> Iterator[Proposal]:
    moved = {n: layer["moved"]["mean"] for n, layer in (f["layers"] or {}).items() if layer["moved"]["mean"]}
    trains_rules = _option(s, "rule") == "sgd" and _option(s, "outer") in ("unrolled", "first_order")
    if len(moved) > 1 and trains_rules and max(moved.values()) > SPREAD * min(moved.values()):
        least, most = min(moved, key=moved.__getitem__), max(moved, key=moved.__getitem__)
        why = (
            f"at one rate, {most} moves by {_percent(moved[most])} of its length in adaptation and {least} by "
            f"{_percent(moved[least])}"
        )
        for name in ("alfa", "meta-sgd"):
            yield Proposal({"option.rule": name}, why, "a learned rate for each layer")


def support_loss_misleads(f: Figures, s: Setting) -> Iterator[Proposal]:
    if not _gradient(s) or f["metric"] != "accuracy" or _option(s, "loss") != "plain":
        return
    if _option(s, "outer") != "unrolled":
        return  # the others train no loss that has parameters for each step
    support, query = f["inner"]["support_loss"][-1]["mean"], f["inner"]["query_loss"][-1]["mean"]
    if support is not None and query and support < 0.5 * query:
        why = f"after adaptation the support loss is {support:.3f} and the query loss {query:.3f}"
        yield Proposal({"option.loss": "metal"}, why, "a learned inner loss")


def head_from_prototypes(f: Figures, s: Setting) -> Iterator[Proposal]:
    if not _gradient(s) or f["metric"] != "accuracy" or _option(s, "head") == "prototype":
        return
    start, chance = f["inner"]["score"][0], 1 / f["in_force"]["way"]
    if start["mean"] is not None and start["mean"] < 2 * chance:
        why = f"adaptation starts from {_percent(start['mean'])} right answers, where guessing has {_percent(chance)}"
        scope = _option(s, "scope")
        wider = {"option.scope": "all"} if scope in ("body", "norm") else {}  # such a head is a start to adapt from
        yield Proposal({"option.head": "prototype", **wider}, why, "a head that starts from the prototypes")


def learns_less_than_nothing(f: Figures, s: Setting) -> Iterator[Proposal]:
    """A learner that does not lead what nothing was trained for has the wrong structure."""
    if f["metric"] != "accuracy":
        return
    behind = {name: lead for name, lead in f["rivals"].items() if lead["mean"] is None or lead["mean"] < 2 * POINT}
    if not behind or entry(s["learner"]).family == "metric":
        return
    name = min(behind, key=lambda rival: behind[rival]["mean"] or 0.0)
    why = f"its lead over {name}, which nothing was trained for, is {_points(behind[name], f)}"
    for other in ("protonet", "r2d2"):
        if other != s["learner"]:
            yield Proposal({"learner": other}, why, "compare with examples, without inner steps")


def compares_in_the_worse_way(f: Figures, s: Setting) -> Iterator[Proposal]:
    """Whether classes are told better by their means or by a regression shows where nothing is trained, too."""
    leads = [f["rivals"].get(name, {}).get("mean") for name in ("centroid", "linear")]
    if f["metric"] != "accuracy" or entry(s["learner"]).family != "metric" or None in leads:
        return
    ahead = leads[0] - leads[1]
    other, words = ("r2d2", "above") if ahead > 0 else ("protonet", "below")
    if abs(ahead) > POINT and other != s["learner"]:
        why = f"without training, a regression on the features is {100 * abs(ahead):.1f} points {words} class means"
        yield Proposal({"learner": other}, why, "compare with examples in another way")


def training_does_nothing(f: Figures, s: Setting) -> Iterator[Proposal]:
    if f["training"] is not None and _still(f):
        ran = f["training"]
        why = (
            f"{ran['steps']} steps of training moved the validation figure from {ran['start']:.3f} to {ran['best']:.3f}"
        )
        for by in (100, 10):
            yield Proposal({"rate": _digits(f["in_force"]["rate"] * by)}, why, "much faster outer steps")


def trained_too_little(f: Figures, s: Setting) -> Iterator[Proposal]:
    ran = f["training"]
    if ran is None or _still(f):
        return
    if _late(f):
        yield from _longer(f, _until_the_end(f))
        yield Proposal({"rate": _digits(3 * f["in_force"]["rate"])}, _until_the_end(f), "faster outer steps")
    elif ran["best_step"] < 0.4 * ran["steps"]:
        why = f"{_best(f)} and fell to {ran['last']:.3f}"
        yield Proposal({"rate": _digits(f["in_force"]["rate"] / 3)}, why, "slower outer steps")


def tasks_too_easy(f: Figures, s: Setting) -> Iterator[Proposal]:
    taken, seen = f["in_force"].get("train_way"), f["seen"]
    if f["metric"] != "accuracy" or taken is None or seen is None or s.get("balance"):
        return
    more = min(3 * taken, f["in_force"]["most_train_way"])
    if more > taken and (seen["mean"] or 0.0) >= EASY:
        right = _percent(seen["mean"])
        why = f"in tasks of {f['in_force']['way']} classes that it was trained on, {right} are right already"
        if _late(f):
            both = {"train_way": more, "steps": 4 * f["in_force"]["steps"]}
            yield Proposal(both, f"{why}; {_until_the_end(f)}", "harder training tasks, for longer")
        yield Proposal({"train_way": more}, why, "harder training tasks")


def first_order(f: Figures, s: Setting) -> Iterator[Proposal]:
    known = entry(s["learner"]).options()
    if s.get("option.outer", known.get("outer")) == "first_order" and f["training"] is not None:
        grown = f["training"]["best"] - f["training"]["start"]
        why = f"with first-order gradients, training moved the validation figure by {grown:+.3f}"
        yield Proposal({"option.outer": "unrolled"}, why, "second order")


def learned_by_heart(f: Figures, s: Setting) -> Iterator[Proposal]:
    apart = f["gap"]
    if f["metric"] != "accuracy" or apart is None or not above(apart) or apart["mean"] < 2 * POINT:
        return
    why = f"tasks of the classes that it was trained on are answered better by {_points(apart, f)}"
    known = entry(s["learner"]).options()
    if "dropout" in known and f["in_force"]["frozen"]:  # it is of the map over frozen features
        more = _digits(1 - (1 - s.get("option.dropout", known["dropout"])) / 2)
        yield Proposal({"option.dropout": more}, why, "more dropout")
    if "drop_grad" in known:
        yield Proposal({"option.drop_grad": 0.2}, why, "noisy inner gradients")
    if not s.get("augment"):
        if f["in_force"]["modality"] == "image" and not f["in_force"]["frozen"]:
            yield Proposal({"augment": ["mirror"]}, why, "mirrored images")
        yield Proposal({"augment": ["mlti"]}, why, "tasks between the tasks")


def not_learned_by_heart(f: Figures, s: Setting) -> Iterator[Proposal]:
    """Without a gap there is room: for fewer defences, for a network that can tell more."""
    apart, seen = f["gap"], f["seen"]
    if f["metric"] != "accuracy" or apart is None or apart["mean"] is None or apart["mean"] > 2 * POINT:
        return
    known = entry(s["learner"]).options()
    why = f"seen classes are answered {_points(apart, f)} better than unseen ones: little is learned by heart"
    if s.get("option.dropout", known.get("dropout")) and f["in_force"]["frozen"]:
        less = _digits(s.get("option.dropout", known["dropout"]) / 2)
        yield Proposal({"option.dropout": less}, why, "less dropout")
    if not f["in_force"]["frozen"] and f["training"] is not None and not _still(f):
        yield from _longer(f, why)
    ahead = all(above(lead) for lead in f["rivals"].values())  # else it is the map that is wanting, not the features
    if f["in_force"]["frozen"] and ahead and seen["mean"] < EASY:
        why = f"even on seen classes a map over frozen features answers {_percent(seen['mean'])}"
        if f["in_force"]["modality"] == "text" and "scope" in known:
            lora = {"train_backbone": True, "option.scope": "lora", "option.rank": 8}
            yield Proposal(lora, why, "adapters in the backbone")
        if f["in_force"]["modality"] == "image":
            yield Proposal({"backbone": "conv4", "train_backbone": True}, why, "a network of these images' own")


def wider_adapters(f: Figures, s: Setting) -> Iterator[Proposal]:
    if s.get("option.scope") == "lora" and f["gap"] is not None and not above(f["gap"]):
        why = "seen classes are answered no better than unseen ones beyond chance: the adapters are not too wide"
        yield Proposal({"option.rank": 2 * s.get("option.rank", 4)}, why, "wider adapters")


def confidence_misleads(f: Figures, s: Setting) -> Iterator[Proposal]:
    sure, known = f["calibration"], entry(s["learner"]).options()
    if sure is None or sure["ece"] is None or sure["ece"] < 0.1 or known.get("temperature", 0) is None:
        return
    if "temperature" in known:
        now = s.get("option.temperature", known["temperature"])
        by = 2 if sure["too_sure"] > 0 else 0.5
        why = f"its confidence is {_percent(abs(sure['too_sure']))} too {'high' if by > 1 else 'low'} on average"
        yield Proposal({"option.temperature": _digits(now * by)}, why, "another temperature")


def families_lag(f: Figures, s: Setting) -> Iterator[Proposal]:
    named = {n: score for n, score in f["families"].items() if score["mean"] is not None}
    if len(named) < 2 or s.get("balance"):
        return
    worst, best = min(named, key=lambda n: named[n]["mean"]), max(named, key=lambda n: named[n]["mean"])
    apart = named[best]["mean"] - named[worst]["mean"]
    if apart > 5 * POINT and apart > named[best]["ci95"] + named[worst]["ci95"]:
        low, high = (_percent(named[name]["mean"]) for name in (worst, best))
        why = f"of the queries in tasks of {worst!r} {low} are right, of {best!r} {high}"
        yield Proposal({"balance": "loss"}, why, "draw the families that lag more often")


RULES: tuple[Rule, ...] = (
    learns_less_than_nothing,
    compares_in_the_worse_way,
    steps_too_long,
    steps_too_short,
    training_does_nothing,
    scope_too_narrow,
    steps_too_few,
    steps_too_many,
    head_from_prototypes,
    first_order,
    tasks_too_easy,
    trained_too_little,
    learned_by_heart,
    not_learned_by_heart,
    one_rate_for_all,
    support_loss_misleads,
    confidence_misleads,
    families_lag,
    wider_adapters,
)


def above(entry: Mapping[str, Any]) -> bool:
    """Whether the whole 95 % interval is above zero."""
    return entry["mean"] is not None and entry["ci95"] is not None and entry["mean"] - entry["ci95"] > 0


def below(entry: Mapping[str, Any]) -> bool:
    return entry["mean"] is not None and entry["ci95"] is not None and entry["mean"] + entry["ci95"] < 0


def _still(f: Figures) -> bool:
    """Whether the outer training hardly moved the validation figure: by a point, or a hundredth of an error."""
    start, best = (f["training"][name] for name in ("start", "best"))
    return abs(best - start) < POINT * (1.0 if f["metric"] == "accuracy" else abs(start))


def _late(f: Figures) -> bool:
    """Whether the outer training was still getting better when it ended."""
    ran = f["training"]
    return ran is not None and not _still(f) and ran["best_step"] >= 0.8 * ran["steps"]


def _until_the_end(f: Figures) -> str:
    return f"{_best(f)} ({f['training']['start']:.3f} at the start, {f['training']['best']:.3f} then)"


def _best(f: Figures) -> str:
    return f"the validation figure was best at step {f['training']['best_step']} of {f['training']['steps']}"


def _longer(f: Figures, why: str) -> Iterator[Proposal]:
    for by in (4, 2):
        yield Proposal({"steps": by * f["in_force"]["steps"]}, why, "train for longer")


def _option(s: Setting, name: str) -> Any:
    """The value that is in force: the setting's, or else the learner's default."""
    return s.get(f"option.{name}", entry(s["learner"]).options().get(name))


def _gradient(s: Setting) -> bool:
    return entry(s["learner"]).family == "gradient"


def _digits(value: float) -> float:
    """Two significant digits: a setting is read by people.

    >>> _digits(0.12345)
    0.12
    """
    return float(f"{value:.2g}")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _figure(entry: Mapping[str, Any], sign: int = 1) -> str:
    half = "" if entry["ci95"] is None else f" ± {entry['ci95']:.2g}"
    return f"{sign * entry['mean']:.3g}{half}"


def _points(entry: Mapping[str, Any], f: Figures) -> str:
    if entry["mean"] is None:
        return "no number"
    scale, unit = (100, " points") if f["metric"] == "accuracy" else (1, "")
    half = "" if entry["ci95"] is None else f" ± {scale * entry['ci95']:.2f}"
    return f"{scale * entry['mean']:+.2f}{half}{unit}"
