"""Layer norm and RMS norm (the modules) under torch.nn's interface, and the residual add before."""

import torch
from torch import Tensor, nn

from fastattn.nn.hooks import hooked
from fastattn.ops import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `fastattn.layer_norm`.

    Parameters may be float32 where the input is a half precision. An input of the wrong shape or
    dtype raises ValueError or TypeError. `torch.jit.script` does not take it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The norm over the last dims, those of `normalized_shape`; in the input's dtype."""
        if input.is_nested:
            return super().forward(input)
        x, weight, bias = _rows(self.normalized_shape, input, self.weight, self.bias)
        y: Tensor = layer_norm(x, weight, bias, eps=self.eps)  # type: ignore[assignment]
        return y if x is input else y.view(input.shape)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on `fastattn.rms_norm`.

    What differs is what differs in `LayerNorm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dims, those of `normalized_shape`; in the input's dtype."""
        if x.is_nested:
            return super().forward(x)
        rows, weight, _ = _rows(self.normalized_shape, x, self.weight, None)
        y: Tensor = rms_norm(rows, weight, eps=_eps(self, x))  # type: ignore[assignment]
        return y if rows is x else y.view(x.shape)


def _eps(norm: torch.nn.RMSNorm, x: Tensor) -> float:
    if norm.eps is not None:
        return norm.eps
    return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps


def _rows(
    normalized_shape: tuple[int, ...], x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Input and parameters with the dims of `normalized_shape` as one."""
    dims = len(normalized_shape)
    if x.shape[-dims:] != normalized_shape:
        shape = ", ".join(str(size) for size in normalized_shape)
        raise ValueError(f"input: expected shape (..., {shape}), got {tuple(x.shape)}")
    if dims == 1:
        return x, weight, bias
    weight = None if weight is None else weight.flatten()
    bias = None if bias is None else bias.flatten()
    return x.flatten(-dims), weight, bias


def add_norm(x: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``(norm(s), s)`` of ``s = x + residual``, in one op where it is the same.

    It is where `norm` is torch's LayerNorm or RMSNorm or one of the above, over one dim, not
    subclassed, parametrized or hooked; otherwise it is called.
    """
    if (
        type(norm) in (torch.nn.LayerNorm, LayerNorm, torch.nn.RMSNorm, RMSNorm)
        and not x.is_nested
        and norm.normalized_shape == x.shape[-1:]
        and x.shape == residual.shape
        and x.dtype == residual.dtype
        and not hooked(norm)
    ):
        if isinstance(norm, torch.nn.RMSNorm):
            return rms_norm(x, norm.weight, eps=_eps(norm, x), residual=residual)  # type: ignore
        return layer_norm(x, norm.weight, norm.bias, eps=norm.eps, residual=residual)  # type: ignore
    s = x + residual
    return norm(s), s
