"""Agents and families: the mathematics of acting, and that agents learn to adapt."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metafit.context import Context
from metafit.data.randomness import keys
from metafit.errors import BadInput
from metafit.over_tasks import meta_gradient
from metafit.rl import (
    Actions,
    Decisions,
    Experience,
    Player,
    act,
    advantages,
    build,
    drawn,
    evaluate_one,
    family,
    load_agent,
    train,
)
from metafit.rl.catalog import AGENTS, entry
from metafit.rl.families import Bernoulli, Changing, Grid, Navigation, Tabular
from metafit.rl.gradient import linear_baseline
from metafit.rl.objective import ClippedObjective, PolicyGradient
from metafit.rl.oracles import PSRL, UCB, AtRandom, Gittins, Thompson, bayes_optimal, best_policy, gittins_indices
from metafit.rl.trial import percept
from metafit.task import Examples, Task, count, take
from metafit.training import load_model, meta_train

BY_GRADIENT = ("maml", "multi-task", "scratch")
SMALL = {"rl2-transformer": {"width": 16, "heads": 2}} | {name: {"rounds": 3} for name in BY_GRADIENT}
IN_CONTEXT = [name for name in AGENTS if name.startswith("rl2") or name == "varibad"]
BATCHED = ("bandit", "gaussian-bandit", "tabular", "navigation", "grid")
ENVS = {name: {} for name in BATCHED} | {"navigation": {"horizon": 6}, "changing-grid": {"horizon": 4}}


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def small(name: str, env: str, **options: object):
    torch.manual_seed(0)
    given = {"width": 12} | SMALL.get(name, {}) | options
    return build(name, env, ENVS.get(env, {}), **given)


def experience_of(agent, of, n: int = 4, seed: int = 0) -> Task:
    params, generator = drawn(of, seed, 0, n)
    return agent.collect(of, params, generator)


# Families


@pytest.mark.parametrize("env", ENVS)
def test_an_environment_is_the_same_whoever_asks_for_it(env):
    of = family(env, **ENVS[env])
    together, alone = of.draw(keys(3, torch.arange(6))), of.draw(keys(3, torch.arange(4, 5)))
    for many, one in zip(tree_leaves(together), tree_leaves(alone), strict=True):
        assert torch.equal(many[4:5], one)
    assert not any(torch.equal(leaf[0], leaf[1]) for leaf in tree_leaves(together) if leaf.is_floating_point())


@pytest.mark.parametrize("env", ENVS)
def test_a_trial_is_what_the_family_says_and_repeats(env):
    agent, of = small("rl2", env)
    params, generator = drawn(of, 0, 0, 5)
    trial, _ = act(agent, of, params, agent.begin(5), of.episodes, generator)
    steps = of.episodes * of.horizon
    assert trial.reward.shape == (5, steps) and trial.x.shape == (5, steps, of.observations + of.actions.size + 2)
    assert all(bool(leaf.isfinite().all()) for leaf in tree_leaves(trial))
    again, _ = act(agent, of, params, agent.begin(5), of.episodes, drawn(of, 0, 0, 5)[1])
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(trial), tree_leaves(again), strict=True))
    # what an agent reads: the reward of its last action, and where an episode begins
    assert torch.equal(trial.x[:, 1:, -2], trial.reward[:, :-1])
    assert trial.x[0, :, -1].tolist() == [float(t % of.horizon == 0) for t in range(steps)]


def test_bandits_pay_as_often_as_they_say():
    of = Bernoulli(2, 1)
    probability = torch.tensor([[0.2, 0.9]]).expand(20_000, 2)
    generator = torch.Generator().manual_seed(0)
    for arm in (0, 1):
        _, _, reward = of.step(probability, (), torch.full((20_000,), arm), generator)
        assert abs(float(reward.mean()) - float(probability[0, arm])) < 4 * math.sqrt(0.25 / 20_000)


def test_random_mdps_move_and_pay_as_they_say():
    of = Tabular(3, 2)
    mdp = tree_map(lambda leaf: leaf.expand(40_000, *leaf.shape[1:]), of.draw(keys(0, torch.arange(1))))
    n = 40_000
    state = torch.full((n,), 1)
    after, seen, reward = of.step(mdp, state, torch.ones(n, dtype=torch.int64), torch.Generator().manual_seed(0))
    share = torch.bincount(after, minlength=3) / n
    assert torch.allclose(share, mdp.transition[0, 1, 1], atol=4 * 0.5 / math.sqrt(n))
    assert abs(float(reward.mean() - mdp.reward[0, 1, 1])) < 4 / math.sqrt(n) and abs(float(reward.std()) - 1) < 0.02
    assert torch.equal(seen.argmax(-1), after)
    many = of.draw(keys(0, torch.arange(20_000)))
    assert torch.allclose(many.transition.sum(-1), torch.ones(()))
    flat = many.transition[:, 0, 0, 0]  # of a flat Dirichlet over three: Beta(1, 2)
    assert abs(float(flat.mean()) - 1 / 3) < 0.01 and abs(float(flat.var()) - 1 / 18) < 0.005


def test_navigation_and_grid_step_as_written():
    goal = torch.tensor([[0.3, -0.4]])
    place, seen, reward = Navigation().step(
        goal, torch.tensor([[0.05, 0.0]]), torch.tensor([[5.0, -0.02]]), torch.Generator()
    )
    assert torch.allclose(place, torch.tensor([[0.15, -0.02]])) and torch.equal(seen, place)
    assert float(reward) == pytest.approx(-math.hypot(0.15, 0.38))
    of, goals = Grid(), Grid().draw(keys(0, torch.arange(2000)))
    assert not {(0, 0), (0, 1), (1, 0)} & set(map(tuple, goals.tolist())) and len(set(map(tuple, goals.tolist()))) == 22
    cell, _, reward = of.step(
        torch.tensor([[0, 1], [3, 3]]), torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0, 3]), torch.Generator()
    )
    assert cell.tolist() == [[0, 1], [0, 0]] and reward.tolist() == pytest.approx([1.0, -0.1])


def test_a_changing_environment_changes_once_and_at_the_start_of_an_episode():
    of = Changing(Grid(horizon=4), episodes=8)
    params = of.draw(keys(0, torch.arange(500)))
    episodes = params["step"] // 4
    assert torch.equal(episodes * 4, params["step"]) and {2, 3, 4, 5} == set(episodes.tolist())
    for clock in (0, 7, 8, 20, 31):
        now = of.at(params, clock)["now"]
        expected = torch.where((params["step"] <= clock)[:, None], params["after"], params["before"])
        assert torch.equal(now, expected)
    with pytest.raises(BadInput, match="window"):
        Changing(Grid(), episodes=4, window=(0, 5))


# Mathematics


def test_generalised_advantages_are_the_direct_sum(double):
    generator = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    found = advantages(reward, value, 0.9, 0.7)
    for n, t in itertools.product(range(3), range(7)):
        after = [*value[n, 1:].tolist(), 0.0]
        deltas = [float(reward[n, k]) + 0.9 * after[k] - float(value[n, k]) for k in range(7)]
        direct = sum((0.9 * 0.7) ** (k - t) * deltas[k] for k in range(t, 7))
        assert float(found[n, t]) == pytest.approx(direct, abs=1e-12)
    # with λ = 1 it is the return that follows, less the value
    assert float(advantages(reward, value, 1.0, 1.0)[0, 2]) == pytest.approx(float(reward[0, 2:].sum() - value[0, 2]))


@pytest.mark.parametrize("discrete", [True, False])
def test_actions_agree_with_torchs_distributions(double, discrete):
    actions, generator = Actions(3, discrete), torch.Generator().manual_seed(0)
    outputs = 0.4 * torch.randn(5, actions.outputs, generator=generator, dtype=torch.float64)
    action = actions.sample(outputs, generator)
    if discrete:
        theirs = torch.distributions.Categorical(logits=outputs)
        assert torch.allclose(actions.log_prob(outputs, action), theirs.log_prob(action))
        assert torch.allclose(actions.entropy(outputs), theirs.entropy())
        drawn_often = actions.sample(outputs[:1].expand(50_000, 3), generator)
        assert torch.allclose(torch.bincount(drawn_often) / 50_000, theirs.probs[0], atol=0.01)
    else:
        mean, log_deviation = outputs.chunk(2, -1)
        theirs = torch.distributions.Normal(mean, (2 * torch.tanh(log_deviation / 2)).exp())
        assert torch.allclose(actions.log_prob(outputs, action), theirs.log_prob(action).sum(-1))
        assert torch.allclose(actions.entropy(outputs), theirs.entropy().sum(-1))
    assert torch.equal(actions.best(outputs), outputs.argmax(-1) if discrete else outputs[:, :3])


def test_the_policy_gradient_is_the_gradient_of_the_expected_return(double):
    """Of a softmax over three arms of known worth, whose expectation can be differentiated exactly."""
    worth = torch.tensor([1.0, -0.5, 2.0])
    logits = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    p = logits.softmax(-1)
    (exact,) = torch.autograd.grad(p @ worth, logits)
    action = torch.arange(3)  # every action once, weighed by how often it is taken
    y = Decisions(action, p.log().detach(), worth, worth - (p @ worth).detach(), worth)
    for loss in (PolicyGradient(Actions(3)), ClippedObjective(Actions(3))):
        (found,) = torch.autograd.grad(loss(logits.expand(3, 3), y, p.detach(), Context()), logits)
        assert torch.allclose(-found, exact, atol=1e-12)


def test_the_clipped_objective_gains_nothing_beyond_its_clip():
    actions, outputs = Actions(2), torch.tensor([[2.0, 0.0]], requires_grad=True)
    old = torch.tensor([math.log(0.5)])
    one = torch.ones(1)
    far = Decisions(torch.tensor([0]), old, one, one, one)  # ratio 1.76, and better than average: no gradient left
    loss = ClippedObjective(actions)(outputs, far, one, Context())
    assert loss.item() == pytest.approx(-1.2)
    assert torch.autograd.grad(loss, outputs)[0].abs().max() == 0
    back = far._replace(advantage=-one)  # worse than average: it has to come back
    assert torch.autograd.grad(ClippedObjective(actions)(outputs, back, one, Context()), outputs)[0].abs().max() > 0.1


@pytest.mark.parametrize("env", ["navigation", "grid"])
def test_the_meta_gradient_is_that_of_finite_differences(double, env):
    """MAML's outer loss through a policy-gradient step, over fixed experience."""
    agent, of = small("maml", env, width=4, clip=10.0)  # a clip has a kink
    with torch.no_grad():
        for p in agent.parameters():
            p += 0.1 * torch.randn_like(p)
    tasks = experience_of(agent, of, 2)
    _, _, gradients = meta_gradient(agent, tasks, "vmap")

    def loss() -> float:
        return sum(agent.loss(take(tasks, i))[0].item() for i in range(2)) / 2

    for name, p in ((name, p) for name, p in agent.named_parameters() if p.requires_grad):
        for index in range(min(2, p.numel())):
            flat, step = p.data.view(-1), 1e-6
            flat[index] += step
            above = loss()
            flat[index] -= 2 * step
            below = loss()
            flat[index] += step
            assert float(gradients[name].view(-1)[index]) == pytest.approx((above - below) / (2 * step), abs=1e-7), name


def test_linear_baseline_is_the_ridge_regression_of_returns(double):
    generator = torch.Generator().manual_seed(0)
    seen, reward = (torch.randn(2, 3, 5, *rest, generator=generator, dtype=torch.float64) for rest in ((2,), ()))
    found = linear_baseline(seen, reward, 0.9)
    n = 1
    to_go = torch.stack([sum(0.9 ** (k - t) * reward[n, :, k] for k in range(t, 5)) for t in range(5)], -1)
    clock = (torch.arange(5.0) / 100).expand(3, 5)[..., None]
    x = torch.cat([seen[n], seen[n] ** 2, clock**0, clock, clock**2, clock**3], -1).view(15, -1)
    weights = torch.linalg.solve(x.T @ x + 1e-5 * 8 * torch.eye(8), x.T @ to_go.view(15))
    assert torch.allclose(found[n].view(15), x @ weights, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in IN_CONTEXT), ("rl2", {"recall": True}), ("rl2-hyper", {"recall": True})],
)
@pytest.mark.parametrize("env", ["tabular", "navigation"])
def test_reading_step_by_step_is_reading_at_once(double, name, options, env):
    agent, of = small(name, env, **options)
    trial = experience_of(agent, of).query
    memory, outputs = agent.begin(4), []
    for t in range(9):
        out, _, memory = agent.read(memory, trial.x[:, t])
        outputs.append(out)
    for i in range(4):
        start = take(agent.begin(1), 0)
        mind, after = agent.unroll(trial.x[i, :9], start)
        assert torch.allclose(agent.decide(mind, trial.x[i, :9]), torch.stack(outputs, 1)[i], atol=1e-9)
        for a, b in zip(tree_leaves(after), tree_leaves(take(memory, i)), strict=True):
            assert torch.allclose(a, b, atol=1e-9)
        adapted = agent.adapt(take(trial, i)._replace(x=trial.x[i, :8]))
        assert torch.allclose(agent.predict(adapted, trial.x[i, 8:9])[0], outputs[8][i], atol=1e-9)


@pytest.mark.parametrize("name", IN_CONTEXT)
def test_what_comes_later_changes_nothing_before(double, name):
    agent, of = small(name, "tabular")
    x = experience_of(agent, of).query.x[0]
    changed = x.clone()
    changed[20:] += 1
    start = take(agent.begin(1), 0)
    before, after = (agent.unroll(rows, start)[0] for rows in (x, changed))
    assert torch.equal(before[:20], after[:20]) and not torch.allclose(before[20:], after[20:])


def test_an_associative_memory_sums_the_transitions_made_here(double):
    """Against a loop over the transitions before each step: keys of one-hot states are orthogonal, so that what was
    made elsewhere has no part in the first sum."""
    agent, of = small("rl2-associative", "tabular", keys=16, values=4)
    x = experience_of(agent, of).query.x[0]
    seen: list[tuple[Tensor, Tensor]] = []
    agent._decide = lambda x, near, overall: seen.append((near, overall)) or x
    agent.unroll(x, take(agent.begin(1), 0))
    ((near, overall),) = seen
    states = x[:, :10].argmax(-1)
    value = [agent._value(torch.zeros(10) if t == 0 else x[t - 1, :10], x[t]) for t in range(len(x))]
    for t in (0, 1, 17, len(x) - 1):
        here = [value[s] for s in range(1, t + 1) if states[s - 1] == states[t]]
        assert torch.allclose(near[t], sum(here, torch.zeros(4)), atol=1e-9)
        assert torch.allclose(overall[t], sum(value[: t + 1]), atol=1e-9)


def test_a_transformer_forgets_what_is_beyond_its_context(double):
    agent, of = small("rl2-transformer", "tabular", layers=1, context=5)
    x = experience_of(agent, of).query.x[0]
    changed = x.clone()
    changed[:10] += 1
    start = take(agent.begin(1), 0)
    before, after = (agent.unroll(rows, start)[0] for rows in (x, changed))
    assert torch.allclose(before[14:], after[14:]) and not torch.allclose(before[13], after[13])


@pytest.mark.parametrize("name", [name for name in AGENTS if entry(name).usual])
def test_vmap_and_the_loop_agree(double, name):
    agent, of = small(name, "grid", **({"bounds": 0} if name == "varibad" else {}))
    if name == "varibad":
        agent.bound = lambda x: x.sum() * 0  # what it draws differs from run to run
    tasks = experience_of(agent, of)
    loop, vmap = (meta_gradient(agent, tasks, backend) for backend in ("loop", "vmap"))
    assert torch.allclose(loop[0], vmap[0]) and loop[1].keys() == vmap[1].keys()
    for key, gradient in loop[2].items():
        assert torch.allclose(gradient, vmap[2][key], atol=1e-9), key


def test_the_belief_is_what_the_bound_says(double):
    """The divergence of Gaussians against torch's; and the policy's gradient does not reach the encoder."""
    agent, of = small("varibad", "grid")
    mean, log_variance = torch.randn(4, 5), torch.randn(4, 5)
    normals = [torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in zip(mean, log_variance, strict=True)]
    first = torch.distributions.Normal(torch.zeros(5), torch.ones(5))
    expected = [torch.distributions.kl_divergence(a, b).sum() for a, b in zip(normals, [first, *normals], strict=False)]
    assert torch.allclose(agent._divergence(mean, log_variance), torch.stack(expected))
    mind, _ = agent.unroll(experience_of(agent, of).query.x[0], take(agent.begin(1), 0))
    gradients = torch.autograd.grad(mind.sum(), list(agent.parameters()), allow_unused=True)
    reached = {name for (name, _), g in zip(agent.named_parameters(), gradients, strict=True) if g is not None}
    assert reached == {"policy.0.weight", "policy.0.bias"}


# Oracles


def test_the_dynamic_programme_is_the_best_of_all_policies():
    """Brute force: all deterministic policies of a two-armed bandit with three pulls, by enumeration."""
    histories = [h for n in range(3) for h in itertools.product(*[[(a, r) for a in (0, 1) for r in (0, 1)]] * n)]

    def worth(policy: dict, history: tuple) -> float:
        if len(history) == 3:
            return 0.0
        arm = policy[history]
        ones = sum(r for a, r in history if a == arm)
        p = (1 + ones) / (2 + sum(a == arm for a, _ in history))
        won, lost = ((*history, (arm, r)) for r in (1, 0))
        return p * (1 + worth(policy, won)) + (1 - p) * worth(policy, lost)

    best = 0.0
    for first in (0, 1):  # what is asked at a history depends on nothing else, so that each is settled by itself
        policy = dict.fromkeys(histories, 0)
        policy[()] = first
        for h in sorted(histories[1:], key=len, reverse=True):
            values = []
            for arm in (0, 1):
                policy[h] = arm
                values.append(worth(policy, h))
            policy[h] = int(values[1] > values[0])
        best = max(best, worth(policy, ()))
    assert bayes_optimal(2, 3) == pytest.approx(best, abs=1e-12)


def test_the_best_of_five_arms_in_ten_pulls_is_known():
    assert bayes_optimal(5, 10) == pytest.approx(6.660, abs=5e-4)


def test_gittins_indices_are_those_published():
    """Gittins (1989), of Bernoulli arms with uniform prior at discount 0.9: 0.7029 before any pull."""
    index = gittins_indices(20, 0.9, rewards=2000)
    assert index[0, 0] == pytest.approx(0.7029, abs=2e-3) and index[1, 0] == pytest.approx(0.8001, abs=2e-3)
    assert (index[1:, 0] > index[:-1, 0]).all() and (index[0, 1:] < index[0, :-1]).all()


def test_oracles_rank_as_they_should():
    of = Bernoulli(5, 10)
    params, _ = drawn(of, 1, 0, 4000)
    score = {}
    for oracle in (AtRandom, Thompson, UCB, Gittins):
        actor = oracle(of)
        trial, _ = act(actor, of, params, actor.begin(4000), 10, torch.Generator().manual_seed(0))
        score[oracle] = float(trial.reward.sum(1).mean())
    assert score[AtRandom] < 5.2 < 5.7 < score[Thompson] < 6.5 < score[Gittins] < 6.660 + 0.12


def test_planning_is_best_over_all_policies(double):
    of = Tabular(2, 2, horizon=2)
    mdp = of.draw(keys(0, torch.arange(3)))
    _, value = best_policy(mdp.transition, mdp.reward, 2)
    for n in range(3):
        worths = []
        for a, b, c in itertools.product((0, 1), repeat=3):  # the first action; the second in either state
            then = torch.stack([mdp.reward[n, 0, b], mdp.reward[n, 1, c]])
            worths.append(float(mdp.reward[n, 0, a] + mdp.transition[n, 0, a] @ then))
        assert float(value[n, 0]) == pytest.approx(max(worths))


def test_posterior_sampling_learns_a_tabular_mdp():
    of = Tabular()
    params, generator = drawn(of, 1, 0, 200)
    actor = PSRL(of)
    returns = act(actor, of, params, actor.begin(200), 10, generator)[0].returns(10)
    assert 125 < float(returns.sum(1).mean()) < 142  # 138.1 in Duan et al.
    assert float(returns[:, -1].mean() - returns[:, 0].mean()) > 4


# Training and use


@pytest.mark.parametrize("name", [name for name in AGENTS if entry(name).usual])
def test_every_agent_trains_saves_and_loads(tmp_path, name):
    options = {"width": 16} | SMALL.get(name, {})
    agent, of, trained = train(
        name,
        "grid",
        {"horizon": 5, "episodes": 2},
        options=options,
        steps=6,
        batch=8,
        out=tmp_path,
        show_progress=False,
    )
    assert trained.history[-1]["step"] == entry(name).usual.epochs * (6 // entry(name).usual.epochs)
    loaded, its, history = load_agent(tmp_path)
    assert its.horizon == 5 and history == trained.history[: len(history)] and not loaded.training
    with pytest.raises(BadInput, match="holds an agent"):
        load_model(tmp_path)
    params, _ = drawn(of, 5, 0, 6)
    one, other = (a.live(of, params, 2, torch.Generator().manual_seed(0)) for a in (agent, loaded))
    assert torch.equal(one.returns, other.returns) and one.returns.shape == (6, 2)


def test_training_resumes_to_the_same_bits(tmp_path):
    how = {"options": {"width": 8}, "batch": 16, "epochs": 2, "show_progress": False}
    whole, _, _ = train("rl2", "bandit", steps=40, out=tmp_path / "whole", **how)

    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 20:
            raise Stop

    with pytest.raises(Stop):
        train("rl2", "bandit", steps=40, out=tmp_path / "parts", watch=[stop], **how)
    parts, _, _ = train("rl2", "bandit", steps=40, out=tmp_path / "parts", resume=True, **how)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(BadInput, match="resume"):
        train("rl2", "grid", steps=40, out=tmp_path / "parts", resume=True, **how)


def test_a_recurrent_agent_learns_to_try_arms():
    """From chance, 2.5 of 5 on two arms; the best is 2.95."""
    torch.manual_seed(0)
    agent, of = build("rl2", "bandit", {"arms": 2, "pulls": 5}, width=16, entropy=0.003, mixing=0.5)
    meta_train(
        agent, Experience(agent, of, 500, 4), steps=240, rate=3e-2, clip=1.0, backend="vmap", show_progress=False
    )
    params, generator = drawn(of, 9, 0, 4000)
    total = float(agent.live(of, params, 5, generator).returns.sum(1).mean())
    assert bayes_optimal(2, 5) + 0.1 > total > 2.75


def test_a_player_acts_as_the_agent_does():
    agent, of = small("rl2", "tabular")
    params, _ = drawn(of, 0, 0, 1)
    trial, _ = act(agent.eval(), of, params, agent.begin(1), 2, torch.Generator().manual_seed(1), explore=False)
    player = Player(agent, explore=False)
    for t in range(20):
        x = trial.x[0, t]
        player.observe(x[:10].tolist(), float(x[-2]), first=bool(x[-1]))
        assert player.act() == int(trial.action[0, t])
    with pytest.raises(BadInput, match="observe first"):
        player.act()
    with pytest.raises(BadInput, match="3 numbers; the agent sees 10"):
        player.observe([0, 1, 2])
    with pytest.raises(BadInput, match="finite"):
        player.observe([float("nan")] * 10)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_player_learns_by_rounds_as_the_agent_does(double, rule):
    """Two rounds of episodes of unlike lengths, told step by step, against the experience written down by hand."""
    agent, _ = small("maml", "navigation", rounds=3, steps=2, rule=rule)
    player, memory, reward = Player(agent), agent.begin(1), 0.0
    chance = torch.Generator().manual_seed(0)
    for played, lengths in enumerate([(6, 6, 6), (4, 6, 1)]):
        seen, log_prob, actions, rewards = [], [], [], []
        for length in lengths:
            for t in range(length):
                player.observe(torch.randn(2, generator=chance).tolist(), reward, first=t == 0)
                seen.append(player._seen)
                outputs = player._outputs
                actions.append(torch.tensor([player.act()]))
                log_prob.append(agent.actions.log_prob(outputs, actions[-1]))
                reward = float(torch.randn((), generator=chance))
                rewards.append(reward)
        clock = torch.cat([torch.arange(n) for n in lengths]).double()[:, None] / 100
        x, gained = torch.cat(seen), torch.tensor(rewards)
        ends = [sum(lengths[: i + 1]) for i in range(3) for _ in range(lengths[i])]
        follows = torch.stack([sum(0.99 ** (k - t) * gained[k] for k in range(t, end)) for t, end in enumerate(ends)])
        features = torch.cat([x[:, :2], x[:, :2] ** 2, clock**0, clock, clock**2, clock**3], -1)
        value = features @ torch.linalg.solve(features.T @ features + 8e-5 * torch.eye(8), features.T @ follows)
        better = follows - value  # with mixing 1
        better = (better - better.mean()) / better.std()
        decided = Decisions(torch.cat(actions), torch.cat(log_prob), gained, better, follows)
        support = Examples(x, decided, torch.ones(len(x)))
        memory = tree_map(lambda leaf: leaf[None], agent.onward(played, (take(memory, 0), support)))
        player.observe([0.0, 0.0], reward, first=True)
        player._outputs, player._acted = None, None  # nothing was done at this one: it is seen again
        for name, p in memory["parameters"].items():
            assert torch.allclose(player._memory["parameters"][name], p, atol=1e-8), name
            assert not torch.allclose(p, agent.begin(1)["parameters"][name])


def test_a_player_who_does_not_explore_stays_as_it_is():
    agent, _ = small("maml", "navigation", rounds=1)
    player = Player(agent, explore=False)
    for t in range(12):
        player.observe([0.0, 1.0], 1.0, first=t % 4 == 0)
        player.act()
    assert all(torch.equal(p[0], agent.initial()[name]) for name, p in player._memory["parameters"].items())


def test_an_adapted_agent_goes_on_from_where_it_was():
    """MAML's second update starts from the first one's parameters; the first is what ``adapt`` says."""
    agent, of = small("maml", "navigation", later=1.0)
    agent.eval()
    params, generator = drawn(of, 0, 0, 2)
    before = agent._round(of, params, agent.begin(2), generator)
    first = agent.adapt(take(before, 0))["parameters"]
    memory = take(agent.begin(2), 0)
    onward = agent.onward(0, (memory, take(before, 0)))["parameters"]
    again = agent.onward(1, ({**memory, "parameters": first}, take(before, 0)))["parameters"]
    for name, p in first.items():
        assert torch.allclose(p, onward[name])
    assert any(not torch.allclose(again[name], p) for name, p in first.items())


def test_evaluation_writes_result_report_and_pictures(tmp_path):
    train(
        "rl2",
        "navigation",
        {"horizon": 8},
        options={"width": 8},
        steps=8,
        batch=8,
        out=tmp_path / "a",
        show_progress=False,
    )
    train(
        "multi-task", "navigation", {"horizon": 8}, options={"width": 8, "rounds": 2}, steps=6, batch=4,
        out=tmp_path / "b", show_progress=False,
    )  # fmt: skip
    made = evaluate_one(
        "navigation", tmp_path / "a", None, {"horizon": 8}, None, [tmp_path / "b"], 12, 3, out=tmp_path / "out"
    )
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == made
    assert [row["learner"] for row in made["against"]] == ["multi-task", "rl2, untrained"]
    assert [point["step"] for point in made["curve"]] == [0, 1, 2] and made["metrics"]["return"]["ci95"] > 0
    assert len(made["gallery"]) == 4 and len(made["gallery"][0]["ways"]["rl2"]["last"]) == 8
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "RL² with a recurrent network returns" in page
        and page.count("<svg") > 4
        and "http" not in page.replace("http://www.w3.org", "")
    )
    with pytest.raises(BadInput, match="sees 2 numbers"):
        evaluate_one("grid", tmp_path / "a", None)


def test_bad_names_and_options_are_told():
    with pytest.raises(BadInput, match="did you mean 'rl2'"):
        build("rl3", "grid")
    with pytest.raises(BadInput, match="did you mean 'grid'"):
        build("rl2", "gird")
    with pytest.raises(BadInput, match="did you mean 'width'"):
        build("rl2", "grid", widht=3)
    with pytest.raises(BadInput, match="heads 3"):
        build("rl2-transformer", "grid", heads=3)
    with pytest.raises(BadInput, match="did you mean 'size'"):
        family("grid", sise=4)
    with pytest.raises(BadInput, match="not trained beforehand"):
        train("scratch", "grid")
    with pytest.raises(BadInput, match="at least 2 environments"):
        evaluate_one("grid", None, "rl2", tasks=1)


def test_a_percept_is_what_its_docstring_says():
    x: Tensor = percept(torch.ones(2, 3), torch.eye(2), torch.tensor([0.5, -1.0]), True)
    assert x.tolist() == [[1, 1, 1, 1, 0, 0.5, 1], [1, 1, 1, 0, 1, -1, 1]] and count(x) == 2
