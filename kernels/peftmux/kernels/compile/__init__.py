"""Ahead-of-time compilation of the Triton kernels that serving launches, and what the machine code must not contain.

What is compiled is what the operators' `triton_variants` list: every kernel, in every kind of launch, over chosen
widths, head counts, ranks and dtypes. A form is made from a model's own widths when it is first launched, so others
than these can be: attention of other head counts and widths (of float32 wider than 256, which fits the same shared
memory, some registers spill on sm_90 and sm_100), and low-rank products in float16 and float32 of other numbers of
tokens, ranks and slices than some of each kind.

`python -m peftmux.kernels.compile` needs triton and no GPU.
"""

from peftmux.kernels.compile.variant import Budget, Variant

__all__ = ["Budget", "Variant"]
