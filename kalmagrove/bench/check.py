"""Is an implementation right? Outcome and every gradient against the reference in fp64.

The error is ||a - b|| / ||b||; it may be twice that of the reference itself at the precision of the
inputs (of one that computes in fp32 whatever they are, with its products at that precision). Where
rounding decides between nearly equal edges, all keep those of the fp64 reference first, so that
gradients can be compared, and choose for themselves after that.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from kalmagrove.bench.spec import (
    Case,
    Function,
    Implementation,
    Inputs,
    Shape,
    UnavailableError,
    first,
    leaves,
)

FLIPPED = 2.0  # 16 rows whose luck differs from the reference's, each wrong by half its norm
SLACK = 1e-5  # what two correct sums of fp32 numbers in different orders may differ by


class Verdict(NamedTuple):
    """check: "ok", "failed: ..." or "unavailable: ...".

    errors: [found, allowed] by tensor; found is None where it is no number.
    """

    check: str
    errors: dict[str, list[float | None]]


class Expected(NamedTuple):
    """What the reference says of one set of inputs. `limits`: the errors allowed."""

    function: Function
    inputs: Inputs
    wide: Inputs  # the same in fp64; where there are pieces, the last one
    exact: dict[str, Tensor]  # where there are pieces, what all of them give, flat
    limits: dict[str, float]
    index_NK: Tensor | None  # that all have to keep for `exact`
    free_limit: float  # of the outcome, where each chooses for itself


def expected(case: Case, function: Function, inputs: Inputs) -> Expected:
    """Run the reference in fp64, and at the precision of the inputs."""
    parts = [inputs] if function.pieces is None else function.pieces(inputs, case.shape)
    exacts, owns = [], []
    index_NK = None
    for part in parts:
        wide = _wide(part)
        if function.selects is not None:
            with torch.no_grad():
                index_NK = function.selects(wide, case.shape)
        exacts.append(outcome(function, function.reference, _keeping(wide, index_NK), case.shape))
        own = function.rounded or function.reference
        owns.append(outcome(function, own, _keeping(part, index_NK), case.shape))
    exact, rounded = _joined(exacts), _joined(owns)
    limits = {name: 2 * relative(rounded[name], exact[name]) + SLACK for name in exact}
    free = 0.0
    if index_NK is not None:
        with torch.no_grad():
            error = relative(first(function.reference(inputs, case.shape)), exact["y"])
        free = math.hypot(2 * error, FLIPPED / math.sqrt(case.shape["N"])) + SLACK
    return Expected(function, inputs, wide, exact, limits, index_NK, free)


def _wide(inputs: Inputs) -> Inputs:
    return {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in inputs.items()
    }


def _joined(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(pieces) == 1:
        return pieces[0]
    return {name: torch.cat([piece[name].flatten() for piece in pieces]) for name in pieces[0]}


def check(case: Case, implementation: Implementation, truth: Expected) -> Verdict:
    """Compare, with outputs that begin as NaN; what is raised becomes the verdict."""
    reason = _out_of_place(implementation, truth)
    if reason:
        return Verdict(f"unavailable: {reason}", {})
    try:
        with poisoned():
            errors = CHECKS.get(case.op, _differentiable)(case, implementation, truth)
    except (UnavailableError, ImportError, NotImplementedError) as error:
        return Verdict(f"unavailable: {_line(error)}", {})
    except torch.OutOfMemoryError as error:
        return Verdict(f"failed: {_line(error)}", {})
    except Exception as error:  # a kernel may raise anything; the others are still measured
        missing = isinstance(error, RuntimeError | KeyError) and "backend" in str(error)
        missing = missing and "could not compile" not in str(error)
        return Verdict(f"{'unavailable' if missing else 'failed'}: {_line(error)}", {})
    wrong = [
        f"{name} is off by {found:.2g}, allowed {allowed:.2g}"
        for name, (found, allowed) in errors.items()
        if not found <= allowed
    ]
    shown = {  # JSON has no infinity
        name: [number if math.isfinite(number) else None for number in pair]
        for name, pair in errors.items()
    }
    return Verdict(f"failed: {', '.join(wrong)}" if wrong else "ok", shown)


def _out_of_place(implementation: Implementation, truth: Expected) -> str | None:
    device = next(iter(truth.inputs.values())).device.type
    if implementation.backend is None or device == "cuda":
        return None
    if implementation.backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "needs a GPU, or TRITON_INTERPRET=1"
    return "needs a GPU"


def outcome(
    function: Function, run: Callable[[Inputs, Shape], Any], inputs: Inputs, shape: Shape
) -> dict[str, Tensor]:
    """What comes out, by name, and gradients of the first by `dy`, named d and the input."""
    result = run(inputs, shape)
    results = (result,) if isinstance(result, Tensor) else tuple(result)
    names = function.outcomes
    found = dict(zip(names, results[: len(names)], strict=True))
    if wanted := leaves(inputs):
        grads = torch.autograd.grad(results[0], list(wanted.values()), inputs["dy"])
        found |= {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||; the norm of `found` where exact is zero."""
    if found.shape != exact.shape:
        return float("inf")
    if not exact.numel():
        return 0.0
    norm = torch.linalg.vector_norm(exact.double())
    apart = torch.linalg.vector_norm(found.double() - exact)
    return float(apart / norm) if norm > 0 else float(apart)


@contextmanager
def poisoned() -> Iterator[None]:
    """New floating-point memory begins as NaN: what a kernel forgets to write shows."""

    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            with torch.no_grad():
                return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    with (
        mock.patch.object(torch, "empty", filling(torch.empty)),
        mock.patch.object(torch, "empty_like", filling(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", filling(Tensor.new_empty)),
    ):
        yield


def _differentiable(
    case: Case, implementation: Implementation, truth: Expected
) -> dict[str, list[float]]:
    function, inputs = truth.function, _keeping(truth.inputs, truth.index_NK)
    if function.in_place:
        inputs = {name: t.clone() for name, t in inputs.items()}
    found = outcome(function, implementation.run, inputs, case.shape)
    if function.pieces is not None:
        found = _joined(function.pieces(found, case.shape))
    errors = {
        name: [relative(found[name], truth.exact[name]), truth.limits[name]] for name in truth.exact
    }
    if truth.index_NK is not None:
        with torch.no_grad():
            y = first(implementation.run(truth.inputs, case.shape))
        errors["y, free choice"] = [relative(y, truth.exact["y"]), truth.free_limit]
    return errors


def _edge_topk(
    case: Case, implementation: Implementation, truth: Expected
) -> dict[str, list[float]]:
    """Also that the k largest are kept, in order, and the sums that come with them."""
    errors = _differentiable(case, implementation, truth)
    if implementation.function is not None:
        return errors
    with torch.no_grad():
        value_NK, index_NK, *sums = implementation.run(truth.inputs, case.shape)
        again_NK = truth.function.reference(_keeping(truth.wide, index_NK), case.shape)[0]
        exact_sums = truth.function.reference(truth.wide, case.shape)[2:]
    pairs = {
        "magnitude": (value_NK.abs(), truth.exact["y"].abs()),  # of equal edges, any
        "index": (value_NK, again_NK),
        "energy": (sums[0], exact_sums[0]),
        "outside": (sums[1], exact_sums[1]),
    }
    return errors | {name: [relative(*pair), SLACK] for name, pair in pairs.items()}


def _permute(case: Case, implementation: Implementation, truth: Expected) -> dict[str, list[float]]:
    exact = truth.function.reference(truth.inputs, case.shape)
    found = implementation.run(truth.inputs, case.shape)
    names = ("order", "place", "start")
    return {
        name: [float(not torch.equal(f, e)), 0.0]
        for name, f, e in zip(names, found, exact, strict=True)
    }


CHECKS = {"edge_topk": _edge_topk, "permute": _permute}


def _keeping(inputs: Inputs, index_NK: Tensor | None) -> Inputs:
    return inputs if index_NK is None else inputs | {"index_NK": index_NK}


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
