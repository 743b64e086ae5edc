"""What a suite of the benchmark is made of: cases, functions, implementations of them.

`Function` is the specification: what goes in, what must come out at any precision, what it costs at
least. `suites` joins the parts, `runner` measures them.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shape = dict[str, Any]
Inputs = dict[str, Tensor]  # those that require a gradient are the ones to differentiate by


class Case(NamedTuple):
    """An op at a shape."""

    op: str
    shape: Shape

    def __str__(self) -> str:
        shown = {k: v for k, v in self.shape.items() if k != "rows"}
        return f"{self.op} " + " ".join(f"{k}={v}" for k, v in shown.items())


class Cost(NamedTuple):
    """The least that a pass can do: operations, and bytes each read or written once."""

    flops: float
    moved: float


class Function(NamedTuple):
    """What an implementation computes.

    inputs: fresh random ones, with `dy`, the gradient of what comes out first.
    reference: the outcome in plain PyTorch, at the precision of the inputs; with `index_NK` among
        them it keeps these edges instead of choosing.
    costs: of "fwd" and "bwd", from the shape and the inputs.
    selects: the kept edges that the reference chooses, where rounding can change the choice.
    rounded: the reference with products at the precision of the inputs, where it computes in fp32
        whatever they are: the error of this one sets what others may be off by.
    pieces: independent problems that inputs, or outcomes and gradients by name, fall into; the
        reference takes them one by one, where it needs too much memory for all at once, and only
        those are checked.
    outcomes: names of what comes out and is checked.
    in_place: an implementation may write into the inputs.
    """

    inputs: Callable[[Shape, torch.Generator, torch.dtype], Inputs]
    reference: Callable[[Inputs, Shape], Any]
    costs: Callable[[Shape, Inputs], dict[str, Cost]]
    selects: Callable[[Inputs, Shape], Tensor] | None = None
    rounded: Callable[[Inputs, Shape], Any] | None = None
    pieces: Callable[[Inputs, Shape], list[Inputs]] | None = None
    outcomes: tuple[str, ...] = ("y",)
    in_place: bool = False


class UnavailableError(Exception):
    """The implementation is not there: not built, not installed, or not for this device."""


class Implementation(NamedTuple):
    """run: the outcome from inputs and shape; what comes out first is differentiable.

    function: what it computes, where that is not the op's. backend: ours, by name.
    """

    name: str
    run: Callable[[Inputs, Shape], Any]
    function: Function | None = None
    backend: str | None = None


class Suite(NamedTuple):
    """What one command measures.

    cases: all of them, cheap ops first; with `tiny=True` those for machines without a GPU.
    functions, ours, peers: by op.
    """

    name: str
    cases: Callable[..., list[Case]]
    functions: dict[str, Function]
    ours: dict[str, list[Implementation]]
    peers: dict[str, list[Implementation]]


class Draw:
    """Random tensors of one device and type, from one generator."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        self.generator, self.dtype = generator, dtype

    def normal(self, *shape: int, std: float = 1.0, grad: bool = True) -> Tensor:
        number = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return (number * std).to(self.dtype).requires_grad_(grad)

    def kept(self, shape: Shape, groups: Inputs) -> Tensor:
        """Different channels [N, K], int64; of the row's grove, where there are groves."""
        of_grove = shape.get("M") or shape["C"]
        score = torch.rand(
            (shape["N"], of_grove), generator=self.generator, device=self.generator.device
        )
        return score.topk(shape["K"], dim=1).indices + first_channel(groups, shape)


def first_channel(inputs: Inputs, shape: Shape) -> Tensor | int:
    """Of each row's grove, [N, 1]; 0 for the one layer."""
    return shape["M"] * inputs["group_N"].long().unsqueeze(1) if "group_N" in inputs else 0


def moved_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def leaves(inputs: Inputs) -> Inputs:
    return {name: t for name, t in inputs.items() if t.requires_grad}


def first(result: Any) -> Tensor:
    y: Tensor = result if isinstance(result, Tensor) else result[0]
    return y


def kernel(module: str, name: str) -> Any:
    """`kalmagrove_kernels.<module>.<name>`, looked up when it runs: a missing one is reported."""
    try:
        return getattr(importlib.import_module(f"kalmagrove_kernels.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"kalmagrove_kernels.{module}.{name} is not there") from error


def package(module: str, package: str) -> Any:
    """A module of another project's package that needs a GPU."""
    if not torch.cuda.is_available():
        raise UnavailableError(f"{package} needs a GPU")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{package} cannot be imported: {error}") from error
