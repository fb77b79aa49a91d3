"""How the kernels take tensors: views where strides allow them, otherwise copies."""

from torch import Tensor

# Rows farther apart, of which a block has up to 256, are more than 32 bits of elements.
_FAR_ROWS = 1 << 23


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its last stride is 1 and its rows are near each other."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return tensor.contiguous()
    far = tensor.dim() > 1 and tensor.shape[-2] > 1 and tensor.stride(-2) >= _FAR_ROWS
    return tensor.contiguous() if far else tensor


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
