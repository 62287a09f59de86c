"""Which tokens run in the next step, and in which cache blocks. Plain Python: no torch."""

from peftmux.runtime.scheduler.blocks import BlockPool, IntegrityError
from peftmux.runtime.scheduler.history import History
from peftmux.runtime.scheduler.plan import RowPlan, RowResult, StepPlan, StepResult
from peftmux.runtime.scheduler.row import NewRow, PrefixBlocks
from peftmux.runtime.scheduler.scheduler import Scheduler

__all__ = [
    "BlockPool",
    "History",
    "IntegrityError",
    "NewRow",
    "PrefixBlocks",
    "RowPlan",
    "RowResult",
    "Scheduler",
    "StepPlan",
    "StepResult",
]
