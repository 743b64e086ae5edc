"""Launching Triton kernels again and again at little cost to the host.

`kernel[grid](...)` inspects every argument at every launch to find the compiled kernel: some 100 us
for a kernel of many arguments. `Launcher` finds it by what makes a difference here.
"""

from typing import Any

import torch
import triton
from torch import Tensor


class Launcher:
    """A kernel whose compile-time parameters stand behind all others.

    Triton compiles a kernel anew for other types of tensors, for addresses and integers that are
    multiples of 16 or not, for integers that are 1, and for other compile-time values: these, and
    the device, are the key here. Tensors must be on the current device.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Any, Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], *arguments: Any, num_warps: int = 4, **constants: Any
    ) -> None:
        if not isinstance(self.kernel, triton.runtime.JITFunction):  # interpreted
            self.kernel[grid](*arguments, **constants)
            return
        kinds = tuple(map(_kind, arguments))
        key = (torch.cuda.current_device(), num_warps, kinds, tuple(constants.items()))
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.kernel[grid](*arguments, **constants, num_warps=num_warps)
            return
        names = self.kernel.arg_names[len(arguments) :]
        compiled[grid](*arguments, *(constants[name] for name in names))


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument >= 2**31
    if argument is None or isinstance(argument, float):
        return type(argument)
    return argument.base.dtype, tuple(argument.block_shape)  # a descriptor of tiles


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own costs ten microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()
