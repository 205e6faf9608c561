"""Where Triton's interpreter does not compute what a GPU does."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch


def exact_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 becomes FP8 as on a GPU: rounded to even, too large numbers to the largest. The interpreter's own
    conversion loses what rounding carries into the exponent, and cuts off numbers without one."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(numbers: npt.NDArray[Any], of: Any, to: Any, mode: Any) -> npt.NDArray[Any]:
        if (of.name, to.name) != ("fp32", "fp8e4nv"):
            return np.asarray(convert(numbers, of, to, mode))
        wide = torch.from_numpy(np.ascontiguousarray(numbers).view(np.float32)).clamp(-448, 448)
        return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(numbers.shape)

    monkeypatch.setattr(interpreter, "_convert_float", converted)
