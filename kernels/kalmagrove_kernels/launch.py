"""Launching Triton kernels again and again at little cost to the host.

`kernel[grid](...)` inspects every argument at every launch to find the compiled kernel: some 100 us
for a kernel of many arguments. `Launcher` finds it by what makes a difference here.

Numbers that differ from step to step, such as the rows that expert parallelism brings, belong into
a kernel's `do_not_specialize`: a kernel that is compiled in the middle of a training holds up all
ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Launcher:
    """A Triton kernel, called with its grid and then its parameters and options.

    Triton compiles a kernel anew for other types of tensors, for addresses and integers that are
    multiples of 16 or not, for integers that are 1, and for other compile-time values and options:
    these, and the device, are the key here. Of integers in `do_not_specialize` only the type
    counts. Tensors must be on the current device.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.interpreted = not isinstance(kernel, triton.runtime.JITFunction)
        self.compiled: dict[Any, Any] = {}
        if not self.interpreted:
            self.names = tuple(parameter.name for parameter in kernel.params)
            self.kinds = tuple(map(_kind_of, kernel.params))

    def __call__(self, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        if self.interpreted:
            self.kernel[grid](*arguments, **named)
            return
        values = (*arguments, *[named[name] for name in self.names[len(arguments) :]])
        key = (
            torch.cuda.current_device(),
            *[named.get(option) for option in OPTIONS],
            *[kind(value) for kind, value in zip(self.kinds, values, strict=True)],
        )
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.kernel[grid](*arguments, **named)
            return
        compiled[(*grid, 1, 1)[:3]](*values)


def _kind_of(parameter: Any) -> Callable[[Any], Any]:
    """What of an argument makes a difference."""
    if parameter.is_constexpr:
        return lambda value: value
    return _type if parameter.do_not_specialize else _kind


def _type(argument: int) -> bool:
    return argument >= 2**31


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
