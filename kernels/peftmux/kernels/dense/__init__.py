"""The base model's own linear layers."""

from peftmux.kernels.dense.columns import Columns
from peftmux.kernels.dense.launch import Dense, DenseForm, choose_dense
from peftmux.kernels.dense.reference import dense

__all__ = ["Columns", "Dense", "DenseForm", "choose_dense", "dense"]
