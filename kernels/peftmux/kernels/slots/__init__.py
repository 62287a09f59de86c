"""Device tables by adapter slot: what kernels look up for each token."""

from peftmux.kernels.slots.table import CAPACITY, SlotTable, layout_version

__all__ = ["CAPACITY", "SlotTable", "layout_version"]
