"""Replaced weight rows: retrained output projections and single tokens of them."""

from peftmux.kernels.rows.launch import rows_site
from peftmux.kernels.rows.reference import ReplacedRows, apply_replaced_rows
from peftmux.kernels.rows.site import PreparedRows, RowsSite

__all__ = ["PreparedRows", "ReplacedRows", "RowsSite", "apply_replaced_rows", "rows_site"]
