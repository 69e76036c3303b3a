"""Speed beside the peers, on the user's machine: ``metafit bench speed``."""

from metafit.bench.race import QUICK, Settings
from metafit.bench.speed import COLUMNS, WORKLOADS, run, table

__all__ = ["COLUMNS", "QUICK", "WORKLOADS", "Settings", "run", "table"]
