"""The operators' C++ form for CPUs: found or compiled at first use, never required.

`load()` returns the library or None; `status()` says which and why. PEFTMUX_NATIVE=0 turns it off.
"""

from peftmux.kernels.native.library import Library, Status, load, status

__all__ = ["Library", "Status", "load", "status"]
