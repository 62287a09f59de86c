"""What a run will hold in memory and how long it will take, from a few steps of it."""

from peftmux.trainer.estimate.estimate import Estimate, estimate_run

__all__ = ["Estimate", "estimate_run"]
