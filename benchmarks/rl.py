"""Agents in environments that they were not trained in: `python benchmarks/rl.py grid rl2 --against multi-task`.

Trains the agent, and those it is held against, with as many environment steps each as asked for, and keeps the returns
by episode in the same 600 environments, beside those of the ways of acting that are known for the family.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import keep, option

from metafit.evaluation.statistics import interval
from metafit.rl import act, build, drawn, family, train
from metafit.rl.evaluate import Contender, evaluate, result
from metafit.rl.families import Changing
from metafit.rl.oracles import PSRL, UCB, AtRandom, Gittins, Thompson, bayes_optimal, best_policy
from metafit.rl.train import TEST, usual_training

ORACLES = {"bandit": (AtRandom, Thompson, UCB, Gittins), "tabular": (AtRandom, PSRL)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("agent")
    parser.add_argument("--against", default="", help="agents that are trained as the first one is, by commas")
    parser.add_argument("--env-option", action="append", default=[], help="of the environments, as name=value")
    parser.add_argument("--option", action="append", default=[], help="of the first agent, as name=value")
    for name in ("steps", "batch", "epochs", "moments"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--episodes", type=int, default=600, help="test environments")
    parser.add_argument("--name", help="of the row (as the agent)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    env_options, options = dict(map(option, args.env_option)), dict(map(option, args.option))
    of = family(args.env, **env_options)
    moments = args.moments or of.episodes
    contenders, speed = [], {}
    for name in [args.agent, *filter(None, args.against.split(","))]:
        own = options if name == args.agent else {}
        history: list[dict[str, object]] = []
        usual = usual_training(name, args.env)
        if usual is None:
            torch.manual_seed(args.seed)
            agent, _ = build(name, args.env, env_options, **own)
        else:
            asked = {"steps": args.steps, "rate": args.rate, "batch": args.batch, "epochs": args.epochs}
            how = {**vars(usual), **{k: v for k, v in asked.items() if v is not None and name == args.agent}}
            started, cpu = time.perf_counter(), time.process_time()
            agent, _, training = train(name, args.env, env_options, options=own, seed=args.seed, **how)
            history = training.history
            speed[name] = {
                "seconds": round(time.perf_counter() - started),
                "processor_seconds": round(time.process_time() - cpu),
                "environment_steps": agent_steps(agent, of, how, history[-1]["step"]),
            }
        outcome = evaluate(agent, of, args.episodes, moments, args.seed + TEST, f"evaluate {name}")
        contenders.append(Contender(name, agent, outcome, history))
    row = result(contenders, of, args.seed, args.env)
    row["known"] = known(args.env, of, args.episodes, args.seed + TEST)
    if isinstance(of, Changing):
        row["switch"] = around_the_switch(contenders[0].agent, of, args.episodes, args.seed + TEST)
    keep(f"rl-{args.env}-{args.name or args.agent}", row, training=speed)


def agent_steps(agent, of, training, steps: int) -> int:
    """Environment steps that its training saw, without the looks at validation environments."""
    rounds = steps // training["epochs"] * training["batch"]
    if agent.in_context:
        return rounds * of.episodes * of.horizon
    return rounds * agent.rounds * of.horizon * (2 if agent.meta_trains else 1)


def known(env: str, of, tasks: int, seed: int) -> dict[str, object]:
    """The return of a trial by ways of acting that know the family, in the test environments, or exactly."""
    found: dict[str, object] = {}
    for oracle in ORACLES.get(env, (AtRandom,)):
        params, generator = drawn(of, seed, 0, tasks)
        actor = oracle(of)
        trial, _ = act(actor, of, params, actor.begin(tasks), of.episodes, generator)
        found[oracle.__name__] = interval(trial.reward.sum(1))
    if env == "bandit" and of.actions.size**of.episodes < 10**8:
        found["Bayes-optimal, exactly"] = bayes_optimal(of.actions.size, of.episodes)
    if env == "tabular":
        params, _ = drawn(of, seed, 0, tasks)
        best = best_policy(params.transition, params.reward, of.horizon)[1][:, 0]
        found["knows the MDP"] = interval(of.episodes * best)
    return found


def around_the_switch(agent, of: Changing, tasks: int, seed: int) -> dict[str, list[object]]:
    """The return by episode from two before the environment changes to three after it, as the agent goes on adapting,
    and as it acts by what it had in mind when the environment changed."""
    params, generator = drawn(of, seed, 0, tasks)
    went: dict[str, list[object]] = {}
    for name, actor in (("adapting", agent), ("frozen", Frozen(agent, params["step"]))):
        trial, _ = act(actor, of, params, actor.begin(tasks), of.episodes, generator)
        returns, episode = trial.returns(of.episodes), params["step"] // of.horizon
        around = episode[:, None] + torch.arange(-2, 4)
        known = (around >= 0) & (around < of.episodes)
        returns = returns.gather(1, around.clamp(0, of.episodes - 1))
        went[name] = [interval(returns[known[:, i], i]) for i in range(around.shape[1])]
    return went


class Frozen:
    """An agent that reads nothing more from a step of the trial on: it acts by what it has in mind then."""

    def __init__(self, agent, when: torch.Tensor):
        self.agent, self.when = agent, when

    def begin(self, n: int):
        return self.agent.begin(n), torch.zeros(n, self.agent.width), 0

    def read(self, memory, x):
        inner, before, clock = memory
        mind, inner = self.agent.remember(inner, x)
        mind = torch.where((self.when <= clock)[:, None], before, mind)
        return self.agent.decide(mind, x), x.new_zeros(len(x)), (inner, mind, clock + 1)


if __name__ == "__main__":
    main()
