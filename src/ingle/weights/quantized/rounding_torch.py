"""`rounding` by PyTorch, on any device: of groups all at once what `csrc/rounding.cpp` does for one after the other."""

from __future__ import annotations

import torch

from ingle.weights.quantized.groups import MIDDLE
from ingle.weights.quantized.rounding import RATIOS, Rounded, ScaleType
from ingle.weights.quantized.scheme import Scheme

_MOST_HALF = 65504.0
_MOST_FP8 = 448.0
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@torch.inference_mode()
def round_by_torch(values: torch.Tensor, scheme: Scheme, scale_type: ScaleType) -> Rounded:
    """values [rows, columns] of any float type, on any device."""
    rows, columns = values.shape
    size = scheme.group_size or columns
    groups = -(-columns // size)
    padded = torch.nn.functional.pad(values.float(), (0, groups * size - columns)).view(rows, groups, size)
    trials = _Trials(padded, scheme, scale_type)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    magnitude = torch.maximum(-low, high)
    middle = 0 if scheme.is_float else MIDDLE[scheme.kind]
    for ratio in RATIOS[scheme.kind]:
        levels = _MOST_FP8 if scheme.is_float else middle - 1
        trials.scale(magnitude / levels * ratio, torch.full_like(magnitude, middle))
        if scheme.has_zeros:
            wide = (high - low) / trials.most * ratio
            at = torch.where(wide > 0, (-low * ratio / wide).round(), middle).clamp(0, trials.most)
            trials.scale(wide, at)
    codes = trials.codes().view(rows, -1)[:, :columns]
    error = torch.where(torch.isfinite(padded).all(-1), trials.error.double(), torch.nan)
    losses = torch.stack((error.sum(-1), padded.double().square().sum((1, 2))), -1)
    zeros = trials.best_zero.to(torch.uint8).cpu().numpy() if scheme.has_zeros else None
    return Rounded(codes.contiguous().cpu().numpy(), trials.best_scale.cpu().numpy(), zeros, losses.cpu().numpy())


class _Trials:
    """The best scale and zero of each group so far, [rows, groups]."""

    def __init__(self, values: torch.Tensor, scheme: Scheme, scale_type: ScaleType) -> None:
        self.values, self.scheme, self.stored = values, scheme, _STORED[scale_type]
        self.most = _MOST_FP8 if scheme.is_float else 2 * MIDDLE[scheme.kind] - 1
        shape = values.shape[:2]
        self.error = torch.full(shape, torch.inf, device=values.device)
        self.best_scale, self.best_zero = (torch.zeros(shape, device=values.device) for _ in range(2))

    def scale(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Tries a scale, and the one that its codes would like better."""
        scale = self._as_stored(scale)
        numbers = self._numbers(scale, zero)
        self._take(scale, zero, numbers)
        squares = numbers.square().sum(-1)
        better = torch.where(squares > 0, (self.values * numbers).sum(-1) / squares, scale)
        better = self._as_stored(better)
        better = torch.where(torch.isfinite(better), better, scale)
        self._take(better, zero, self._numbers(better, zero))

    def _take(self, scale: torch.Tensor, zero: torch.Tensor, numbers: torch.Tensor) -> None:
        error = (self.values - numbers * scale.unsqueeze(-1)).square().sum(-1)
        less = error < self.error
        self.error = torch.where(less, error, self.error)
        self.best_scale = torch.where(less, scale, self.best_scale)
        self.best_zero = torch.where(less, zero, self.best_zero)

    def _as_stored(self, scale: torch.Tensor) -> torch.Tensor:
        if self.stored == torch.float16:
            scale = scale.clamp(-_MOST_HALF, _MOST_HALF)
        return scale.to(self.stored).float()

    def _numbers(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes less the zero, or what FP8 holds."""
        per_unit = torch.where(scale != 0, 1 / scale, 0.0).unsqueeze(-1)
        units = self.values * per_unit
        if self.scheme.is_float:
            return units.clamp(-_MOST_FP8, _MOST_FP8).to(torch.float8_e4m3fn).float()
        zero = zero.unsqueeze(-1)
        return torch.clamp(units.round_(), -zero, self.most - zero)

    def codes(self) -> torch.Tensor:
        """uint8 [rows, groups, size]"""
        numbers = self._numbers(self.best_scale, self.best_zero)
        if self.scheme.is_float:
            return numbers.to(torch.float8_e4m3fn).view(torch.uint8)
        return (numbers + self.best_zero.unsqueeze(-1)).to(torch.uint8)
