"""Adapters on their way to the device: on the CPU there is none, and nothing may happen. tests/gpu has the rest."""

from __future__ import annotations

import torch

from peftmux.adapters.parts import LinearPart
from peftmux.runtime.model.upload import Upload


def test_on_the_cpu_parts_stay_what_they_are():
    part = LinearPart(torch.ones(2, 3), torch.ones(4, 2))
    with Upload(torch.device("cpu")) as upload:
        assert upload.move(part) is part
    upload.wait()
