"""What torch must know of an operator besides its numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def written(operator: Any, arguments: tuple[Any, ...]) -> set[str]:
    """The arguments that a run changes, by name. Raises torch's OpCheckError where the schema does not say so, or where
    the shapes that are known without a run are not those of one."""
    found = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    assert set(found.values()) == {"SUCCESS"}, found
    given = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    operator(*given)
    names = [argument.name for argument in operator._opoverload._schema.arguments]
    return {
        name
        for name, before, after in zip(names, arguments, given, strict=False)
        if isinstance(before, Tensor) and not torch.equal(before.nan_to_num(), after.nan_to_num())
    }
