"""Reinforcement learning: the same mapping, where the support set is experience."""

from metafit.rl.actions import Actions
from metafit.rl.agent import Agent, Outcome
from metafit.rl.attentive import AttentiveAgent
from metafit.rl.catalog import build, family
from metafit.rl.evaluate import evaluate, evaluate_one
from metafit.rl.experience import Experience, drawn
from metafit.rl.family import Family
from metafit.rl.gradient import GradientAgent
from metafit.rl.hyper import HyperAgent
from metafit.rl.recurrent import RecurrentAgent
from metafit.rl.report import verdict, write_report
from metafit.rl.store import Player, load_agent
from metafit.rl.train import train
from metafit.rl.trial import Decisions, Trial, act, advantages
from metafit.rl.varibad import VariBADAgent

__all__ = [
    "Actions",
    "Agent",
    "AttentiveAgent",
    "Decisions",
    "Experience",
    "Family",
    "GradientAgent",
    "HyperAgent",
    "Outcome",
    "Player",
    "RecurrentAgent",
    "Trial",
    "VariBADAgent",
    "act",
    "advantages",
    "build",
    "drawn",
    "evaluate",
    "evaluate_one",
    "family",
    "load_agent",
    "train",
    "verdict",
    "write_report",
]
