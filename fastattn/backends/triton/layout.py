"""How the kernels take tensors: views where strides allow them, otherwise copies."""

from torch import Tensor


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its last stride is 1."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def four_dims(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors of one shape, or None, as (., ., ., columns)."""
    four = []
    for tensor in tensors:
        if tensor is not None:
            if tensor.dim() > 4:
                tensor = tensor.reshape(-1, *tensor.shape[-3:])
            tensor = tensor[(None,) * (4 - tensor.dim())]
        four.append(tensor)
    return four
