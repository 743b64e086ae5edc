"""Buffers that stay fp32 when a module is cast to a narrower type, as DeepSpeed does for bf16.

A mixin for modules with routing biases, load counts or grid ranges.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Fp32Buffers(nn.Module):
    """Keeps the module's own fp32 buffers fp32 through `.bfloat16()`, `.half()`, `.to(dtype)`, ...

    Moves between devices work as usual. Buffers of submodules are theirs to keep.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or old.dtype != torch.float32:
                continue
            if new.dtype != torch.float32:
                # From the old value: the cast has already rounded the new one.
                self._buffers[name] = old.to(device=new.device)
        return self
