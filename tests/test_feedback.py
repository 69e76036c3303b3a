"""The feedback loop: symptoms against direct computation, rules, trials kept once, decisions, resuming."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from metafit import backbones
from metafit.apps.improving import Improvement
from metafit.apps.preparing import prepare
from metafit.apps.protocol import Protocol
from metafit.apps.verdicts import Verdicts, read_verdicts
from metafit.data import TaskSampler, packaged
from metafit.errors import BadInput
from metafit.evaluation import evaluate
from metafit.feedback import Attempt, Proposal, Trials, diagnose, improve, propose, write_chain
from metafit.feedback.at_random import AtRandom
from metafit.feedback.diagnose import layers
from metafit.feedback.report import symptoms, verdict
from metafit.feedback.trials import ABANDONED, key
from metafit.learners import GradientLearner, build
from metafit.training import Model, Recipe

START = {"learner": "maml", "backbone": None}


@pytest.fixture(scope="module")
def digits():
    source = packaged.load("digits")
    return source.with_x(source.x.flatten(1) / 255.0 * 8, "vector")


def texture(backbone, train_backbone):
    return prepare(packaged.load("keel:texture"), backbone, train_backbone)


def tasks(source, seed=0, way=3, query=5, batch=20):
    return TaskSampler(source, way, 1, query, batch, seed)


# --- symptoms ---------------------------------------------------------------------------------------------------


def test_layers_against_autograd_by_hand(digits):
    torch.manual_seed(0)
    learner = build("maml", 8, 3, nn.Linear(64, 8), steps=2, rate=0.05).double()
    drawn = tasks(digits.with_x(digits.x.double())).tasks(0, 3)
    found = layers(learner, drawn)
    moved, aligned = [], []
    weight, bias = learner.model.body.weight.detach(), learner.model.body.bias.detach()
    head = learner.model.head
    for i in range(3):
        grads = []
        for part in drawn:
            w = weight.clone().requires_grad_()
            logits = nn.functional.linear(nn.functional.linear(part.x[i], w, bias), head.weight, head.bias)
            grads.append(torch.autograd.grad(nn.functional.cross_entropy(logits, part.y[i]), w)[0].flatten())
        aligned.append(grads[0] @ grads[1] / grads[0].norm() / grads[1].norm())
        values = [p.detach().clone() for p in (weight, bias, head.weight, head.bias)]
        for _ in range(2):
            leaves = [v.requires_grad_() for v in values]
            logits = nn.functional.linear(nn.functional.linear(drawn.support.x[i], *leaves[:2]), *leaves[2:])
            step = torch.autograd.grad(nn.functional.cross_entropy(logits, drawn.support.y[i]), leaves)
            values = [(v - 0.05 * g).detach() for v, g in zip(leaves, step, strict=True)]
        moved.append((values[0] - weight).norm() / weight.norm())
    assert found["body.weight"]["aligned"]["mean"] == pytest.approx(float(torch.stack(aligned).mean()), abs=1e-6)
    assert found["body.weight"]["moved"]["mean"] == pytest.approx(float(torch.stack(moved).mean()), abs=1e-6)
    assert set(found) == {"body.weight", "body.bias", "head.weight", "head.bias"}


def test_symptoms_of_inner_steps_that_are_too_long_and_too_short(digits):
    torch.manual_seed(0)
    drawn = tasks(digits)
    for rate, rises, falls in ((1e-6, (0.0, 0.5), (0.99, 1.01)), (50.0, (0.3, 1.0), None)):
        learner = build("maml", 16, 3, nn.Linear(64, 16), rate=rate, steps=3)
        found = diagnose(learner, evaluate(learner, drawn, 40, show_progress=False), drawn)
        assert rises[0] <= found["inner"]["rises"] <= rises[1]
        if falls is not None:
            assert falls[0] < found["inner"]["falls"]["mean"] < falls[1]
        assert symptoms(found)
        assert json.loads(json.dumps(found, allow_nan=False)) == found  # strict JSON: it goes into a database


def test_gap_rivals_and_calibration_are_those_of_the_evaluations(digits):
    drawn = tasks(digits)
    learner, other = build("protonet", 64, 3), build("knn", 64, 3)
    unseen, rival = (evaluate(one, drawn, 60, show_progress=False) for one in (learner, other))
    found = diagnose(learner, unseen, drawn, seen=rival, rivals={"knn": rival}, families={"all": drawn})
    difference = (unseen.score - rival.score)[:, -1].double().mean()
    assert found["rivals"]["knn"]["mean"] == pytest.approx(float(difference), abs=1e-6)
    assert found["gap"]["mean"] == pytest.approx(-float(difference), abs=1e-6)
    sure = float(unseen.confidence.double().mean() - unseen.right.double().mean())
    assert found["calibration"]["too_sure"] == pytest.approx(sure, abs=1e-6)
    assert found["families"]["all"]["mean"] == pytest.approx(found["score"]["mean"], abs=1e-6)
    assert found["inner"] is None and found["layers"] is None


# --- rules ------------------------------------------------------------------------------------------------------


def healthy(**changes):
    """The figures of a gradient-based learner with nothing wrong."""
    near = {"mean": 0.0, "ci95": 0.01}
    found = {
        "metric": "accuracy",
        "score": {"mean": 0.9, "ci95": 0.01},
        "seen": {"mean": 0.96, "ci95": 0.01},
        "gap": {"mean": 0.03, "ci95": 0.05},
        "rivals": {"centroid": {"mean": 0.1, "ci95": 0.01}},
        "training": {
            "steps": 300, "seconds": 9.0, "start": 0.5, "best": 0.9, "last": 0.9, "best_step": 200,
            "first_loss": 1.0, "last_loss": 0.1, "clipped": None,
        },
        "calibration": {"ece": 0.02, "too_sure": 0.01},
        "families": {},
        "layers": {"body.w": {"moved": {"mean": 0.1, "ci95": 0.01}, "aligned": {"mean": 0.5, "ci95": 0.1}, "size": 9}},
        "inner": {
            "steps": [0, 5], "score": [{"mean": 0.6, "ci95": 0.01}] * 2, "query_loss": [{"mean": 0.3, "ci95": 0.1}] * 2,
            "support_loss": [{"mean": 0.2, "ci95": 0.1}] * 2, "gain": {"mean": 0.3, "ci95": 0.01}, "last_step": near,
            "best_step": 5, "overshoot": near, "falls": {"mean": 0.1, "ci95": 0.01}, "rises": 0.0,
        },
        "in_force": {
            "way": 5, "steps": 300, "rate": 1e-3, "inner_steps": 5, "inner_rate": 0.4, "frozen": False,
            "modality": "text",
        },
    }  # fmt: skip
    for path, value in changes.items():
        part, _, name = path.rpartition("__")
        (found[part] if part else found)[name] = value
    return found


SURE, WORSE = {"mean": 0.2, "ci95": 0.05}, {"mean": -0.2, "ci95": 0.05}


@pytest.mark.parametrize(
    ("symptom", "change"),
    [
        ({"inner__rises": 0.5}, {"option.rate": 0.1}),
        ({"inner__falls": {"mean": None, "ci95": None}}, {"option.rate": 0.1}),
        ({"inner__falls": {"mean": 0.999, "ci95": 0.001}}, {"option.rate": 40.0}),
        ({"inner__falls": {"mean": 0.8, "ci95": 0.001}}, {"option.rate": 1.6}),
        ({"inner__last_step": WORSE}, {"option.steps": 10}),
        ({"inner__overshoot": SURE, "inner__best_step": 2}, {"option.steps": 2}),
        ({"inner__overshoot": SURE}, {"option.proximal": 0.1}),
        ({"rivals": {"centroid": WORSE}}, {"learner": "protonet"}),
        ({"training__best": 0.505}, {"rate": 0.1}),
        ({"gap": SURE}, {"augment": ["mlti"]}),
        ({"gap": SURE, "in_force__modality": "image"}, {"augment": ["mirror"]}),
        ({"gap": SURE}, {"option.drop_grad": 0.2}),
        ({"families": {"a": {"mean": 0.9, "ci95": 0.01}, "b": {"mean": 0.5, "ci95": 0.01}}}, {"balance": "loss"}),
    ],
)
def test_a_symptom_brings_its_change_with_the_figure_as_evidence(symptom, change):
    before = [p.change for p in propose(healthy(), START)]
    proposals = [p for p in propose(healthy(**symptom), START) if p.change == change]
    assert change not in before
    assert len(proposals) == 1
    assert any(letter.isdigit() for letter in proposals[0].evidence), proposals[0].evidence


def test_scope_head_rates_loss_and_training():
    narrow = {**START, "option.scope": "norm"}
    assert {"option.scope": "all"} in [p.change for p in propose(healthy(), narrow)]
    figures = healthy()
    figures["layers"]["body.w"]["aligned"] = {"mean": 0.0, "ci95": 0.1}
    assert {"option.scope": "head"} in [p.change for p in propose(figures, START)]
    figures = healthy()
    figures["layers"]["head.w"] = {"moved": {"mean": 3.0, "ci95": 0.1}, "aligned": SURE, "size": 2}
    assert {"option.rule": "alfa"} in [p.change for p in propose(figures, START)]
    figures["inner"]["support_loss"] = [{"mean": 0.1, "ci95": 0.01}] * 2
    assert {"option.loss": "metal"} in [p.change for p in propose(figures, START)]
    learned = [p.change for p in propose(figures, {**START, "learner": "alfa+metal"})]
    assert not {"option.rule", "option.loss"} & {name for change in learned for name in change}  # it has both
    figures["layers"]["body.w"]["aligned"] = {"mean": 0.0, "ci95": 0.1}
    figures["inner"]["overshoot"] = SURE
    refused = {"fomaml": {"option.loss"}, "imaml": {"option.loss", "option.proximal", "option.rule"}}
    refused["reptile"] = {"option.loss", "option.rule", "option.scope"}
    for name, words in refused.items():
        changes = [p.change for p in propose(figures, {**START, "learner": name})]
        assert changes and not words & {word for change in changes for word in change}, name
    assert {"option.proximal": 0.1} in [p.change for p in propose(figures, START)]
    figures = healthy()
    for last in (300, 250):  # the last look of six, and the one before
        figures["training"]["best_step"] = last
        changes = [p.change for p in propose(figures, START)]
        assert {"steps": 1200} in changes and {"steps": 600} in changes and {"rate": 0.003} in changes
    figures["training"]["best_step"] = 10
    assert {"rate": 0.00033} in [p.change for p in propose(figures, START)]
    assert {"option.outer": "unrolled"} in [p.change for p in propose(figures, {**START, "learner": "fomaml"})]


def test_a_network_without_a_gap_is_trained_for_longer_and_dropout_is_of_the_map_over_frozen_features():
    no_gap = {"gap": {"mean": 0.0, "ci95": 0.01}, "seen": {"mean": 0.9, "ci95": 0.01}}
    prototypes = {"learner": "protonet", "backbone": "conv4"}

    def changes(**figures):
        return [p.change for p in propose(healthy(**figures) | no_gap, prototypes)]

    assert changes() == [{"steps": 1200}, {"steps": 600}]
    assert changes(training__best=0.505) == [{"rate": 0.1}, {"rate": 0.01}]  # longer is no cure for standing still
    assert changes(in_force__frozen=True) == [{"option.dropout": 0.25}]


def test_tasks_that_are_nearly_all_right_are_made_harder():
    def changes(learner="protonet", seen=0.97, balance=None, best_step=200, **in_force):
        figures = healthy(seen={"mean": seen, "ci95": 0.01}, training__best_step=best_step)
        figures["in_force"] |= {"train_way": 20, "most_train_way": 50, **in_force}
        return [
            p.change
            for p in propose(figures, {**START, "learner": learner, "balance": balance})
            if "train_way" in p.change
        ]

    assert changes() == [{"train_way": 50}]
    assert changes(most_train_way=1000) == [{"train_way": 60}]
    assert changes(best_step=300) == [{"train_way": 50, "steps": 1200}, {"train_way": 50}]
    assert changes(seen=0.9) == changes(most_train_way=20) == changes(balance="loss") == []
    harder = {"learner": "protonet", "train_way": 60, "rate": 0.1}
    assert Proposal({"learner": "maml"}, "", "").on(harder) == {"learner": "maml"}
    assert Proposal({"option.metric": "cosine"}, "", "").on(harder) == {**harder, "option.metric": "cosine"}


def test_a_metric_learner_is_changed_for_the_kind_that_is_better_without_training():
    regression, means = {"mean": 0.02, "ci95": 0.01}, {"mean": 0.08, "ci95": 0.01}
    found = propose(healthy(rivals={"centroid": means, "linear": regression}), {**START, "learner": "protonet"})
    assert {"learner": "r2d2"} in [p.change for p in found]
    assert any("6.0 points above class means" in p.evidence for p in found)
    found = propose(healthy(rivals={"centroid": regression, "linear": means}), {**START, "learner": "mahalanobis"})
    assert {"learner": "protonet"} in [p.change for p in found]
    near = {"centroid": regression, "linear": {"mean": 0.025, "ci95": 0.01}}
    assert not any("learner" in p.change for p in propose(healthy(rivals=near), {**START, "learner": "protonet"}))


def test_features_are_blamed_only_by_a_map_that_leads_them():
    def structures(modality, lead):
        weak = healthy(in_force__frozen=True, in_force__modality=modality, rivals={"centroid": lead})
        weak |= {"gap": {"mean": 0.0, "ci95": 0.01}, "seen": {"mean": 0.8, "ci95": 0.01}}
        return [p.change for p in propose(weak, START) if "train_backbone" in p.change]

    assert structures("text", SURE) == [{"train_backbone": True, "option.scope": "lora", "option.rank": 8}]
    assert structures("image", SURE) == [{"backbone": "conv4", "train_backbone": True}]
    assert structures("text", WORSE) == structures("image", WORSE) == structures("vector", SURE) == []


def test_another_learner_keeps_the_options_that_it_has_and_failed_training_proposes_nothing_but_structure():
    setting = {**START, "option.rate": 0.1, "option.temperature": 0.2, "steps": 9}
    made = Proposal({"learner": "protonet"}, "", "").on(setting)
    assert made == {"learner": "protonet", "backbone": None, "option.temperature": 0.2}  # steps of 9 were MAML's
    assert Proposal({"learner": "protonet", "steps": 7}, "", "").on(setting)["steps"] == 7
    assert Proposal({"option.rate": 0.2}, "", "").on(setting)["steps"] == 9


# --- the loop ---------------------------------------------------------------------------------------------------


def landscape(optimum, noise=0.02, length=200):
    """Attempts whose reward falls with the distance of the rate from the optimum, on a logarithmic scale."""

    def attempt(setting, share, seconds):
        rate = setting["option.rate"]
        generator = torch.Generator().manual_seed(7)  # of the tasks: the same for all, so that leads are paired
        value = 1 - 0.1 * abs(math.log10(rate / optimum)) - 0.1 * (1 - share)
        own = torch.Generator().manual_seed(int(rate * 1e6) % 1000)
        rewards = [
            value + noise * (torch.randn(length, generator=generator) + torch.randn(length, generator=own))
            for _ in range(2)
        ]
        return Attempt(*(r.double() for r in rewards), {"rate": rate}, 1.0)

    return attempt


def by_tens(figures, setting):
    return [Proposal({"option.rate": setting["option.rate"] * by}, f"by {by}", "test") for by in (10.0, 0.1)]


def test_it_climbs_to_the_optimum_and_stops_there(tmp_path):
    trials = Trials(landscape(1.0), f"sqlite:///{tmp_path / 'a.db'}", "s")
    chain = improve({"learner": "maml", "option.rate": 0.001}, trials, proposer=by_tens)
    assert chain.setting["option.rate"] == pytest.approx(1.0)
    assert [turn.accepted for turn in chain.rounds] == [True, True, True, False, False]
    assert chain.ended == "nothing was left to propose"
    assert chain.rounds[0].judged["mean"] == pytest.approx(0.1, abs=0.02)


def test_what_is_no_better_is_refused(tmp_path):
    """Loops over a flat landscape: an interval is above zero by luck alone in one of forty, whoever won the race."""

    def flat(setting, share, seconds):
        own = torch.Generator().manual_seed(int(setting["option.rate"] * 1000))
        return Attempt(torch.randn(50, generator=own).double(), torch.randn(50, generator=own).double(), {}, 1.0)

    accepted = 0
    for seed in range(10):

        def four(figures, setting, seed=seed):
            return [Proposal({"option.rate": 1 + 5 * seed + i}, "", "") for i in range(1, 5)]

        trials = Trials(flat, f"journal:{tmp_path / 'flat'}", str(seed))
        accepted += improve({"learner": "maml", "option.rate": 1 + 5.0 * seed}, trials, 1e9, 1, four).rounds[0].accepted
    assert accepted <= 1


def test_the_best_of_a_race_may_fail_before_its_judges(tmp_path):
    """A reward that only the choosing tasks see: the winner is refused."""

    def lucky(setting, share, seconds):
        lead = setting["option.rate"]
        return Attempt(torch.full((20,), lead).double(), torch.arange(20).double(), {}, 1.0)

    trials = Trials(lucky, f"sqlite:///{tmp_path / 'a.db'}", "s")
    chain = improve({"learner": "maml", "option.rate": 1.0}, trials, proposer=by_tens, most_rounds=1)
    assert chain.rounds[0].chosen == 0 and not chain.rounds[0].accepted
    assert chain.setting["option.rate"] == 1.0


def test_a_setting_that_diverges_loses(tmp_path):
    def attempt(setting, share, seconds):
        if setting["option.rate"] > 1:
            return Attempt(torch.tensor([math.nan]), torch.tensor([math.nan]), {"failed": "diverged"}, 1.0)
        return landscape(0.1)(setting, share, seconds)

    trials = Trials(attempt, f"sqlite:///{tmp_path / 'a.db'}", "s")
    chain = improve({"learner": "maml", "option.rate": 1.0}, trials, proposer=by_tens)
    assert chain.setting["option.rate"] == pytest.approx(0.1)
    assert chain.rounds[0].candidates[0]["lead"] is None and chain.rounds[0].candidates[0]["failed"] == "diverged"


def test_where_none_of_a_round_can_be_judged_none_is_chosen(tmp_path):
    def attempt(setting, share, seconds):
        if setting["option.rate"] != 1.0:
            return Attempt(torch.tensor([math.nan]), torch.tensor([math.nan]), {"failed": "diverged"}, 1.0)
        return landscape(1.0)(setting, share, seconds)

    trials = Trials(attempt, f"sqlite:///{tmp_path / 'a.db'}", "s")
    chain = improve({"learner": "maml", "option.rate": 1.0}, trials, proposer=by_tens)
    assert [turn.chosen for turn in chain.rounds] == [None, None] and chain.setting["option.rate"] == 1.0
    assert [len(turn.candidates) for turn in chain.rounds] == [2, 0]


def test_what_starts_from_zero_has_no_length_to_move_by(digits):
    learner = build("maml", 16, 3, nn.Linear(64, 16), rate=0.05, steps=2)
    nn.init.zeros_(learner.model.body.bias)
    found = layers(learner, tasks(digits).tasks(0, 3))
    assert found["body.bias"]["moved"]["mean"] is None and found["body.weight"]["moved"]["mean"] > 0


@pytest.mark.parametrize("storage", ["sqlite:///{}/a.db", "journal:{}/a"])
def test_each_trial_is_made_once_and_a_resumed_loop_comes_to_the_same_chain(tmp_path, storage):
    made, url = [], storage.format(tmp_path)

    def counted(setting, share, seconds):
        made.append(key(setting, share))
        return landscape(1.0)(setting, share, seconds)

    start = {"learner": "maml", "option.rate": 0.001}
    whole = improve(start, Trials(counted, url, "whole"), proposer=by_tens)
    assert len(made) == len(set(made))
    once = list(made)
    made.clear()
    assert asdict(improve(start, Trials(counted, url, "whole"), proposer=by_tens)) == asdict(whole)
    assert made == []

    def stopped(setting, share, seconds):
        if len(made) == 4:
            raise KeyboardInterrupt
        return counted(setting, share, seconds)

    with pytest.raises(KeyboardInterrupt):
        improve(start, Trials(stopped, url, "broken"), proposer=by_tens)
    assert asdict(improve(start, Trials(counted, url, "broken"), proposer=by_tens)) == asdict(whole)
    assert sorted(made) == sorted(once)


def test_the_time_limit_counts_what_was_spent_before(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    start = {"learner": "maml", "option.rate": 0.001}
    chain = improve(start, Trials(landscape(1.0), url, "s"), seconds=4.0, proposer=by_tens)
    assert chain.ended == "the time was up" and chain.seconds <= 4.0
    again = improve(start, Trials(landscape(1.0), url, "s"), seconds=4.0, proposer=by_tens)
    assert asdict(again) == asdict(chain)
    longer = improve(start, Trials(landscape(1.0), url, "s"), proposer=by_tens)
    assert longer.setting["option.rate"] == pytest.approx(1.0)


def test_no_trial_may_take_the_time_of_all_the_others(tmp_path):
    granted = []

    def watched(setting, share, seconds):
        granted.append((share, seconds))
        return landscape(1.0)(setting, share, seconds)

    trials = Trials(watched, f"sqlite:///{tmp_path / 'a.db'}", "s")
    improve({"learner": "maml", "option.rate": 0.001}, trials, seconds=10.0, proposer=by_tens, most_rounds=3)
    assert granted[0] == (1.0, math.inf)  # there is nothing to go on with before the start is measured
    for i, (share, seconds) in enumerate(granted[1:], 1):
        assert seconds == max(min(1.0, 2 * share), share * (10.0 - i) / 2)  # an attempt takes 1.0


def test_what_one_finalist_took_the_next_may_take_too(tmp_path):
    granted = []

    def watched(setting, share, seconds):
        granted.append((share, seconds))
        whole = share == 1.0 and len(granted) > 1
        reward = torch.full((20,), 0.0 if len(granted) == 1 else share)
        return Attempt(reward, reward, {}, 4.0 if whole else 1.0 if share == 1.0 else 0.1)

    def four(figures, setting):
        return [Proposal({"option.rate": rate}, "1", "a rule") for rate in (1.0, 2.0, 3.0, 4.0)]

    trials = Trials(watched, f"sqlite:///{tmp_path / 'a.db'}", "s")
    improve({"learner": "maml"}, trials, seconds=12.0, proposer=four, most_rounds=1)
    first, second = (seconds for share, seconds in granted[1:] if share == 1.0)
    assert first == pytest.approx((12 - 1.4) / 2)
    assert second == 4.0 > (12 - 5.4) / 2


def test_the_last_of_a_race_that_is_given_up_is_judged_as_it_was(tmp_path):
    def dear(setting, share, seconds):
        if share == 1.0 and setting["option.rate"] > 0.001:
            return Attempt(torch.tensor([math.nan]), torch.tensor([math.nan]), {"failed": "given up"}, 1.0)
        return landscape(1.0)(setting, share, seconds)

    trials = Trials(dear, f"sqlite:///{tmp_path / 'a.db'}", "s")
    chain = improve({"learner": "maml", "option.rate": 0.001}, trials, proposer=by_tens)
    first = chain.rounds[0]
    assert [c["failed"] for c in first.candidates] == ["given up", None]
    assert first.candidates[0]["share"] == pytest.approx(1 / 3) and first.accepted
    assert chain.setting["option.rate"] == pytest.approx(0.01)  # by its lead after a third of its training
    assert chain.ended == "the time was up"


WORKER = """
import sys, time
sys.path.insert(0, {tests!r})
from test_feedback import by_tens, landscape
from metafit.feedback import Trials, improve

def slow(setting, share, seconds):
    print("begun", flush=True)
    time.sleep({nap})
    return landscape(1.0)(setting, share, seconds)

improve({{"learner": "maml", "option.rate": 0.1}}, Trials(slow, {url!r}, "s"), proposer=by_tens)
"""


def test_what_a_killed_process_was_at_is_tried_again_by_the_next(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    code = WORKER.format(tests=str(Path(__file__).parent), nap=60, url=url)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    chain = improve({"learner": "maml", "option.rate": 0.1}, Trials(landscape(1.0), url, "s"), proposer=by_tens)
    assert chain.setting["option.rate"] == pytest.approx(1.0)


@pytest.mark.parametrize("url", ["sqlite:///{}", "journal:{}"])
def test_a_long_trial_of_another_machine_is_waited_for_while_it_gives_signs_of_life(url, tmp_path, monkeypatch):
    made, url, looks = [], url.format(tmp_path / "trials"), 0
    over, later = threading.Event(), 0.0

    def sleep(seconds):
        nonlocal looks
        looks += 1
        over.wait(seconds)

    clock = SimpleNamespace(time=lambda: time.time() + later, sleep=sleep)
    for name, value in (("BEAT", 0.1), ("WAIT", 0.05), ("time", clock)):
        monkeypatch.setattr(f"metafit.feedback.trials.{name}", value)

    def slow(setting, share, seconds):
        made.append("far")
        over.wait(120)
        return landscape(1.0)(setting, share, seconds)

    def quick(setting, share, seconds):
        made.append("here")
        return landscape(1.0)(setting, share, seconds)

    def until(true):
        while not true():
            assert worker.is_alive()
            time.sleep(0.01)

    here, far = Trials(quick, url, "s"), Trials(slow, url, "s")
    far.me = "another machine:1"
    settings = [{"learner": "maml", "option.rate": 0.1}]
    worker = threading.Thread(target=far.run, args=(settings, 1.0))
    worker.start()
    until(lambda: made)
    later = 2 * ABANDONED  # the claim is older than any that is waited for, but for the signs
    until(lambda: here.study.user_attrs.get("sign of another machine:1", 0.0) > time.time() + ABANDONED)
    waiting = threading.Thread(target=lambda: made.append(here.run(settings, 1.0)))
    waiting.start()
    until(lambda: looks > 3)
    over.set()
    for thread in (worker, waiting):
        thread.join()
    assert made[0] == "far" and len(made) == 2 and made[1] != "here"


@pytest.mark.parametrize("url", ["sqlite:///{}", "journal:{}"])
def test_what_another_machine_left_is_tried_again(url, tmp_path, monkeypatch):
    made = []

    def attempt(setting, share, seconds):
        made.append(setting)
        return landscape(1.0)(setting, share, seconds)

    setting = {"learner": "maml", "option.rate": 0.1}
    here, far = (Trials(attempt, url.format(tmp_path / "trials"), "s") for _ in range(2))
    far.me = "another machine:1"
    assert far._claim(key(setting, 1.0)) is not None
    assert here.run([setting], 1.0, grant=iter([1.0, 0.0]).__next__) == [None] and not made
    monkeypatch.setattr("metafit.feedback.trials.ABANDONED", 2.0)
    here.run([setting], 1.0)
    assert made == [setting]


def test_a_claim_that_was_written_too_slowly_is_none(tmp_path, monkeypatch):
    """Whoever looks, itself among them, takes it for abandoned; it is made again, and is no error."""
    trials = Trials(landscape(1.0), f"sqlite:///{tmp_path / 'trials'}", "s")
    setting = {"learner": "maml", "option.rate": 0.1}
    with monkeypatch.context() as slow:
        slow.setattr("metafit.feedback.trials.ABANDONED", -1.0)
        assert trials._claim(key(setting, 1.0)) is None
    assert trials.run([setting], 1.0) != [None]


def test_two_processes_share_the_trials_and_agree(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    made = []

    def counted(setting, share, seconds):
        made.append(key(setting, share))
        time.sleep(0.05)
        return landscape(1.0)(setting, share, seconds)

    code = WORKER.format(tests=str(Path(__file__).parent), nap=0.05, url=url)
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "begun\n"
    chain = improve({"learner": "maml", "option.rate": 0.1}, Trials(counted, url, "s"), proposer=by_tens)
    theirs = 1 + other.stdout.read().count("begun")
    assert other.wait() == 0
    assert chain.setting["option.rate"] == pytest.approx(1.0)
    done = {t.user_attrs["key"] for t in Trials(counted, url, "s").study.trials if t.state.name == "COMPLETE"}
    assert len(made) + theirs == len(done)  # none was made twice


@pytest.mark.parametrize("url", ["sqlite:///{}", "journal:{}"])
def test_many_at_once_make_every_trial_once(url, tmp_path):
    """Four that ask for the same twelve at the same moments: one that finds a trial waiting must not be believed."""
    made, settings = [], [{"learner": "maml", "option.rate": 10.0**-i} for i in range(12)]
    together = threading.Barrier(4)
    Trials(landscape(1.0), url.format(tmp_path / "trials"), "s")

    def counted(setting, share, seconds):
        made.append(setting["option.rate"])
        return landscape(1.0)(setting, share, seconds)

    def work():
        trials = Trials(counted, url.format(tmp_path / "trials"), "s")
        together.wait(60)
        trials.run(settings, 1.0)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(made) == sorted(s["option.rate"] for s in settings)


def test_a_storage_that_cannot_be_opened_is_told():
    with pytest.raises(BadInput, match=r"storage 'sqlite:////nowhere/at/all/x\.db': cannot be opened"):
        Trials(landscape(1.0), "sqlite:////nowhere/at/all/x.db", "s")
    with pytest.raises(BadInput, match=r"driver is not installed.*pip install 'psycopg\[binary\]'"):
        Trials(landscape(1.0), "postgresql+pg8000://nobody@localhost/nothing", "s")


# --- on data ----------------------------------------------------------------------------------------------------


BAD = {**START, "option.rate": 1e-4, "option.steps": 1, "option.scope": "head", "steps": 30}


@pytest.fixture(scope="module")
def improved(tmp_path_factory):
    out = tmp_path_factory.mktemp("improved")
    loop = Improvement(texture, BAD, Protocol(2, 1, 10, 100), out, tasks=40)
    return out, *loop.run(600.0, most_rounds=1)


def test_a_bad_start_is_mended_on_real_data(improved):
    out, chain, made = improved
    assert chain.rounds[0].accepted
    start = made["against"][0]
    assert start["learner"] == "start"
    assert start["paired_difference"]["mean"] - start["paired_difference"]["ci95"] > 0.1  # on the test classes
    saved = json.loads((out / "improve.json").read_text())
    assert saved["setting"] == chain.setting and len(saved["rounds"]) == len(chain.rounds)
    assert (out / "model" / "model.json").exists()
    page = (out / "report.html").read_text()
    assert verdict(chain, made).split(":")[0] in page
    for turn in chain.rounds:
        for candidate in turn.candidates:
            assert candidate["evidence"]


def test_changes_that_did_not_carry_over_are_no_lead(improved):
    _, chain, made = improved
    lead = {"metric": "accuracy", "mean": -0.105, "ci95": 0.077}
    against = [{**row, "paired_difference": lead} if row["learner"] == "start" else row for row in made["against"]]
    told = verdict(chain, {**made, "against": against})
    few = len(made["source"]["classes"]["validation"])
    assert "worse by 10.5 ± 7.7 points" in told and "lead" not in told
    assert f"on the {few} validation classes did not carry over: keep the start" in told


def test_few_validation_classes_are_told_before_the_trials(tmp_path, capsys):
    Improvement(texture, BAD, Protocol(2, 1, 5), tmp_path)
    few = len(texture(None, False).splits.validation.classes)
    assert few < 4 and f"the validation part has {few} classes, for tasks of 2" in capsys.readouterr().err


def test_what_starts_at_nothing_has_no_length_to_move_by():
    made = build("maml", 8, 3, steps=2).eval()
    tasks = TaskSampler(packaged.load("digits"), 3, 2, 5, 4, 0)
    first = tasks.source.x.flatten(1)[:, 20:28].float() / 16
    drawn = TaskSampler(replace(tasks.source, x=first, modality="vector"), 3, 2, 5, 4, 0).draw(0)
    with torch.no_grad():
        made.model.body.change.weight.fill_(1e-6)
    told = layers(made, drawn)
    assert told["body.change.weight"]["moved"]["mean"] is None and told["head.weight"]["moved"]["mean"] > 0


def test_a_loop_of_other_words_or_verdicts_is_not_gone_on_with(tmp_path):
    """Its results would be replaced, and rewards of two kinds compared."""
    loop = Improvement(texture, BAD, Protocol(2, 1, 10), tmp_path, tasks=40)
    Trials(loop.attempt, loop.storage, loop._name())
    loop.check_begun()
    x, y = torch.zeros(4, 40).numpy(), ["a", "b", "a", "b"]
    rewards = [Verdicts(x, y, x, y, right) for right in ([True] * 4, [True, True, True, False])]
    others = [{"tasks": 50}, *({"tasks": 40, "reward": reward} for reward in rewards)]
    for other in others:
        with pytest.raises(BadInput, match=r"cannot resume from .* other words, data or verdicts"):
            Improvement(texture, BAD, Protocol(2, 1, 10), tmp_path, **other).check_begun()
    Improvement(texture, BAD, Protocol(2, 1, 10), tmp_path / "new", tasks=50).check_begun()
    assert rewards[0].about != rewards[1].about


@pytest.mark.parametrize("name", ["maml", "anil", "imaml"])
def test_the_inner_rate_that_is_told_is_the_one_in_force(name, tmp_path):
    loop, setting = Improvement(texture, BAD, Protocol(2, 1, 5), tmp_path), {"learner": name, "backbone": None}
    prepared = loop._prepared(setting)
    learner = loop._learner(prepared, setting)
    assert loop._in_force(prepared, setting, learner)["inner_rate"] == pytest.approx(float(learner.optimizer.rate))


def test_a_share_of_the_training_is_measured_on_a_share_of_the_tasks(tmp_path):
    loop = Improvement(texture, BAD, Protocol(2, 1, 10, 100), tmp_path, tasks=60)
    whole, third, ninth = (loop.attempt(loop.start, share) for share in (1.0, 0.6, 1 / 9))
    assert [len(made.rewards) for made in (whole, third, ninth)] == [60, 36, 30]
    assert [len(made.judged) for made in (whole, third, ninth)] == [60, 36, 30]
    still = loop.attempt({**loop.start, "rate": 1e-30}, 1 / 9)  # untrained, but the same tasks
    again = loop.attempt({**loop.start, "rate": 1e-30}, 1.0)
    assert torch.equal(still.rewards, again.rewards[:30]) and torch.equal(still.judged, again.judged[:30])


def test_leads_are_over_the_tasks_of_both(tmp_path):
    whole = landscape(1.0)

    def fewer(setting, share, seconds):
        made = whole(setting, share, seconds)
        count = math.ceil(share * len(made.rewards))
        return Attempt(made.rewards[:count], made.judged[:count], made.figures, made.seconds)

    def by_many(figures, setting):
        return [Proposal({"option.rate": setting["option.rate"] * by}, f"by {by}", "test") for by in (10, 20, 30, 0.1)]

    trials = Trials(fewer, f"sqlite:///{tmp_path / 'a.db'}", "s")
    turn = improve({"learner": "maml", "option.rate": 0.001}, trials, proposer=by_many, most_rounds=1).rounds[0]
    now, last = (whole({"option.rate": 0.001 * by}, share, 0.0) for by, share in ((1, 1.0), (0.1, 1 / 3)))
    lead = turn.candidates[3]["lead"]
    assert lead["mean"] == pytest.approx(float((last.rewards - now.rewards)[:67].mean()), abs=1e-5)


def test_a_trial_that_finds_no_memory_has_failed(tmp_path, monkeypatch):
    loop = Improvement(texture, BAD, Protocol(2, 1, 5), tmp_path)

    def train(*given, **named):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("metafit.apps.improving.train", train)
    with pytest.raises(torch.OutOfMemoryError):  # the start: there is nothing to compare with, nothing is written down
        loop.run(10.0)
    attempt = loop.attempt({**BAD, "steps": 31}, 1.0)
    assert attempt.figures == {"failed": "OutOfMemoryError: out of memory"} and attempt.rewards.isnan().all()


def test_training_that_takes_too_long_is_given_up_and_the_page_says_so(tmp_path):
    loop = Improvement(texture, BAD, Protocol(2, 1, 10, 100), tmp_path, tasks=40)
    made = loop.attempt({**loop.start, "steps": 1000}, 1.0, seconds=1e-3)
    assert made.rewards.isnan().all() and made.figures["failed"].startswith("given up after 0.001 s of training")
    assert not list((tmp_path / "trials").iterdir())  # nothing of it is left, for it will not go on
    start = loop.attempt(loop.start, 1.0)

    def offered(setting, share, seconds):
        return start if setting["steps"] < 1000 else made

    chain = improve(
        loop.start,
        Trials(offered, f"sqlite:///{tmp_path / 'a.db'}", "s"),
        proposer=lambda figures, setting: [Proposal({"steps": 1000}, "more is more", "test")],
    )
    assert chain.rounds[0].candidates[0]["failed"] == made.figures["failed"] and not chain.rounds[0].accepted


def test_the_improved_model_answers_for_a_new_task(improved):
    from metafit.apps import FewShotClassifier

    out, _, _ = improved
    test = packaged.load("keel:texture")
    rows = test.y < 2
    x, y = test.x[rows].numpy(), test.y[rows].numpy()
    few = FewShotClassifier(model=out / "model").fit(x[::10], y[::10])
    assert few.score(x, y) > 0.7


def test_random_search_is_a_proposer_too(digits):
    first, second = (AtRandom(seed=3)({}, START) for _ in range(2))
    assert first == second and len({repr(p.change) for p in first}) == 9
    for proposal in first:
        made = proposal.on(START)
        options = {k.removeprefix("option."): v for k, v in made.items() if k.startswith("option.")}
        built = build(made["learner"], 64, 3, backbones.load("conv4"), **options)
        assert isinstance(built, GradientLearner) == (made["learner"] == "maml") == ("train_way" not in made)


def test_bad_starts_are_told_before_any_work(tmp_path):
    for start, protocol, message in (
        ({"learner": "centroid"}, Protocol(2), "has nothing to improve by training"),
        ({"learner": "maml", "ratte": 1.0}, Protocol(2), "did you mean 'rate'"),
        ({"learner": "maml", "backbone": None, "option.ratte": 1.0}, Protocol(2), "did you mean 'rate'"),
        ({"learner": "maml", "backbone": None}, Protocol(9), "ask for"),
        ({"learner": "maml", "backbone": None, "train_way": 60}, Protocol(2), "train_way 60"),
    ):
        with pytest.raises(BadInput, match=message):
            Improvement(texture, start, protocol, tmp_path)
    few = packaged.load("keel:segment")
    with pytest.raises(BadInput, match="too few classes to keep some for validation"):
        Improvement(partial(prepare, few), {"learner": "maml", "backbone": None}, Protocol(2), tmp_path)


# --- reward from outside ----------------------------------------------------------------------------------------


def test_a_reward_of_ones_own_takes_the_place_of_accuracy(tmp_path):
    asked = []

    def stubborn(model, tasks, count):
        """Likes a low temperature, whatever the answers."""
        assert isinstance(model, Model)
        asked.append(model.learner.recipe["options"].get("temperature", 1.0))
        return torch.full((count,), -asked[-1]) + 1e-3 * torch.arange(count)

    def colder(figures, setting):
        return [Proposal({"option.temperature": 0.5}, "1", "test")]

    start = {"learner": "protonet", "backbone": None, "steps": 5}
    loop = Improvement(texture, start, Protocol(2, 1, 5, 30), tmp_path, reward=stubborn, tasks=20)
    chain, _ = loop.run(600.0, colder, most_rounds=1)
    assert chain.setting["option.temperature"] == 0.5 and chain.rounds[0].accepted
    assert chain.rounds[0].judged["mean"] == pytest.approx(0.5)


def test_verdicts_reward_agreement_and_are_not_shared_between_choosing_and_judging(digits):
    rows = digits.y < 3
    x, y = digits.x[rows].numpy(), digits.y[rows].numpy()
    said = [str((c + (i % 4 == 0)) % 3) for i, c in enumerate(y[30:130])]  # every fourth prediction is wrong
    right = [s == str(c) for s, c in zip(said, y[30:130], strict=True)]
    verdicts = Verdicts(x[:30], y[:30].astype(str), x[30:130], said, right)
    model = Model(build("protonet", 64, 3).eval(), Recipe())
    chosen, judged = (verdicts(model, tasks(digits, seed), 9) for seed in (3, 4))
    assert len(chosen) == len(judged) == 50
    from metafit.apps import FewShotClassifier

    truth = FewShotClassifier(model=model).fit(x[:30], y[:30].astype(str)).predict(x[30:130]) == y[30:130].astype(str)
    agree = torch.stack([chosen, judged])
    assert float(agree.mean()) >= float(truth.mean()) - 1e-9  # a true answer always agrees
    assert float(agree.mean()) > 0.8


def test_verdicts_from_files(tmp_path):
    labelled, judged = tmp_path / "labelled.csv", tmp_path / "judged.csv"
    labelled.write_text("a,b,label\n0,0,x\n0,1,x\n1,0,y\n1,1,y\n")
    judged.write_text(
        "a,b,prediction,confidence,right\n0,0.5,x,0.9,yes\n1,0.5,x,0.6,no\n0,0.2,x,0.7,True\n1,0.1,y,0.7,1\n"
    )
    verdicts = read_verdicts(labelled, judged, None, "label")
    model = Model(build("protonet", 2, 2).eval(), Recipe())
    assert verdicts(model, tasks_of_seed(0), 2).tolist() == [1.0, 1.0]
    judged.write_text("a,b,prediction,right\n0,0.5,x,maybe\n")
    with pytest.raises(BadInput, match="row 1: the verdict 'maybe' is none of"):
        read_verdicts(labelled, judged, None, "label")
    judged.write_text("a,b,prediction,right\n" + "0,0.5,z,yes\n" * 4)
    with pytest.raises(BadInput, match="the prediction 'z' is no class"):
        read_verdicts(labelled, judged, None, "label")
    judged.write_text("a,b,prediction,right\n0,0.5,x,yes\n")
    with pytest.raises(BadInput, match="1 are too few"):
        read_verdicts(labelled, judged, None, "label")


def tasks_of_seed(seed):
    source = packaged.load("digits")
    return TaskSampler(source, 2, 1, 1, 1, seed)


def test_the_page_escapes_what_data_says(improved, tmp_path):
    _, chain, made = improved
    made = {**made, "source": {**made["source"], "name": "<script>alert(1)</script>"}}
    page = write_chain(chain, made, tmp_path / "page.html").read_text()
    assert "<script>" not in page


def test_the_command_improves_resumes_and_refuses_to_begin_anew(tmp_path, monkeypatch, capsys):
    from metafit.cli.app import main

    def metafit(*words):
        monkeypatch.setattr(sys, "argv", ["metafit", "improve", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    x, y = packaged.load("keel:texture").x[::9], packaged.load("keel:texture").y[::9]
    data = tmp_path / "past.csv"
    rows = [",".join(map(str, [*row.tolist(), f"class {c}"])) for row, c in zip(x[:, :6], y, strict=True)]
    data.write_text("\n".join(["a,b,c,d,e,f,label", *rows]) + "\n")
    words = ["--data", data, "--learner", "protonet", "--way", 2, "--query", 5, "--episodes", 40, "--tasks", 20]
    words += ["--steps", 4, "--out", tmp_path / "out", "--budget", "1s"]
    code, shown = metafit(*words, "--json")
    assert not code, shown.err
    assert json.loads(shown.out)["learner"]["name"] == "improved"
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"improve.json", "model", "report.html", "result.json"}
    code, shown = metafit(*words)
    assert code == 2 and "a loop was begun there; go on with --resume" in shown.err
    assert not metafit(*words, "--resume")[0]
    record = (tmp_path / "out" / "run.json").read_bytes()
    code, shown = metafit(*words, "--resume", "--shot", 2)
    assert code == 2 and "cannot resume" in shown.err
    assert (tmp_path / "out" / "run.json").read_bytes() == record  # what ran, not what was refused
    code, shown = metafit(*words, "--verdicts", data)
    assert code == 2 and "--task and --verdicts go together" in shown.err
