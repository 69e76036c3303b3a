"""Task families that come with metafit, simulated in batches."""

from metafit.rl.families.bandit import Bernoulli, Gaussian
from metafit.rl.families.changing import Changing
from metafit.rl.families.grid import Grid
from metafit.rl.families.navigation import Navigation
from metafit.rl.families.tabular import Tabular

__all__ = ["Bernoulli", "Changing", "Gaussian", "Grid", "Navigation", "Tabular"]
