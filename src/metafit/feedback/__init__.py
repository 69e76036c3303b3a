"""What to change in a training, from what was measured: diagnosis, proposals, trials, decisions."""

from metafit.feedback.diagnose import diagnose
from metafit.feedback.loop import Chain, Round, improve
from metafit.feedback.propose import Proposal, Setting, propose
from metafit.feedback.report import write_chain
from metafit.feedback.trials import Attempt, Trials

__all__ = [
    "Attempt",
    "Chain",
    "Proposal",
    "Round",
    "Setting",
    "Trials",
    "diagnose",
    "improve",
    "propose",
    "write_chain",
]
