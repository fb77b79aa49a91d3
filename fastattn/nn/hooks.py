"""Whether a module may be bypassed."""

from torch import nn
from torch.nn.modules import module as torch_module


def hooked(*modules: nn.Module) -> bool:
    """Whether calling one of `modules` does more than run its forward."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
