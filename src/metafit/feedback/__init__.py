"""What to change in a training, from what was measured: diagnosis, proposals, trials, decisions."""
