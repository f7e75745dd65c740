"""Training steps of pockjax and of its peers, timed in turn: ``python -m experiments.speed``."""
