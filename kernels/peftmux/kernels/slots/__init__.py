"""Device tables by adapter slot: what kernels look up for each token or tile."""

from peftmux.kernels.slots.table import CAPACITY, SlotTable

__all__ = ["CAPACITY", "SlotTable"]
