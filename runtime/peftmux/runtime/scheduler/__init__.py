"""Which tokens run in the next step, and in which cache blocks. Plain Python: no torch."""
