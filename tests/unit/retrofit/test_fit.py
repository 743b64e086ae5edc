"""The warm start by least squares: exact inside the family, useful outside, loud on bad data."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.config import ConfigError, DataError
from kalmagrove.config.retrofit import feedforward_of
from kalmagrove.retrofit.feedforward import FeedForward, build_feedforward
from kalmagrove.retrofit.fit import RowBatches, calibrate, fit

pytestmark = pytest.mark.unit

D = 8
ONE = {"layers": "one", "degree": 2}


def built(tree: dict[str, Any], seed: int, out_std: float = 1.0) -> FeedForward:
    torch.manual_seed(seed)
    return build_feedforward(feedforward_of(tree), D, out_std=out_std)


def rows(count: int = 1500, seed: int = 7) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def swiglu(x: Tensor) -> Tensor:
    torch.manual_seed(3)
    gate, up, down = torch.randn(3, 24, D) / D**0.5
    return (F.silu(x @ gate.t()) * (x @ up.t())) @ down


def group(kind: str, *members: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"kind": kind, "members": list(members), **keys}


RBF = {"layers": "one", "basis": "rbf", "grid": 4}
FREE = {"form": "redundancy_free"}
INSIDE = {
    "one": ONE,
    "free": ONE | FREE,
    "spline": {"layers": "one", "basis": "bspline", "grid": 4, "squash": "affine"},
    "spline_free": {"layers": "one", "basis": "bspline", "grid": 4} | FREE,
    "fourier": ONE | FREE | {"basis": "fourier"},
    "rbf": RBF,
    "two": {"layers": "two", "hidden": 12},
    "gated": {"layers": "gated", "hidden": 12, "basis": "legendre"} | FREE,
    "rational": ONE | {"basis": "rational"},
    "sum": group("parallel", ONE | FREE, RBF | FREE),
    "split": group("parallel", ONE | FREE, RBF, ONE | FREE, combine="split"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_function_of_the_family_is_recovered(name: str) -> None:
    """Where there are parameters that are not solved for, the target shares them."""
    target, module = built(INSIDE[name], 0), built(INSIDE[name], 0)
    with torch.no_grad():
        for part in target.modules():
            if getattr(part, "bias", None) is not None:
                part.bias.add_(torch.randn_like(part.bias))
    first = {k: v for k, v in target.state_dict().items() if "last" not in k or "coef" not in k}
    module.load_state_dict(first, strict=False)
    with torch.no_grad():
        for k, p in module.named_parameters():
            if k.endswith(("last.coef", "last.bias")):
                p.normal_()
    report = fit(module, RowBatches(rows(), target(rows()).detach(), rows=400))
    assert report.r2_before < 0.9
    assert report.r2_after > 0.999
    assert (report.rows, report.held_out_rows) == (1350, 150)
    other = rows(seed=8)
    error = (module(other) - target(other)).square().mean() / target(other).var()
    assert error < 1e-3


@pytest.mark.parametrize(
    "tree",
    [
        *INSIDE.values(),
        group("sequence", ONE, ONE),
        group("parallel", group("sequence", ONE, {"basis": "fourier"} | ONE), RBF),
    ],
)
def test_it_learns_most_of_what_it_can_of_an_mlp(tree: dict[str, Any]) -> None:
    module = built(tree, 0, out_std=0.02)
    report = fit(module, RowBatches(rows(4000), swiglu(rows(4000))))
    assert abs(report.r2_before) < 0.2
    assert report.r2_after > 0.1


def test_wider_random_features_fit_better_and_corrections_never_hurt() -> None:
    x = rows(6000)
    y = swiglu(x)
    scores = [
        fit(built({"layers": "two", "hidden": hidden}, 0), RowBatches(x, y)).r2_after
        for hidden in (16, 256)
    ]
    assert scores[0] + 0.1 < scores[1]
    alone = fit(built(ONE, 0), RowBatches(x, y)).r2_after
    correct = {"layers": "two", "hidden": 200}
    together = fit(built(group("sequence", ONE, correct), 0), RowBatches(x, y)).r2_after
    assert alone < together


def test_a_sequence_is_fitted_in_turn() -> None:
    """The first member is what it would be alone."""
    data = RowBatches(rows(), swiglu(rows()))
    alone, chain = built(ONE, 0), built(group("sequence", ONE, RBF), 0)
    fit(alone, data)
    fit(chain, data)
    torch.testing.assert_close(chain.members[0].last.coef, alone.last.coef)
    assert chain.members[1].last.coef.any()


def test_the_batches_do_not_matter() -> None:
    x, y = rows(), swiglu(rows())
    whole, parts = built(ONE, 0), built(ONE, 0)
    one = fit(whole, RowBatches(x, y, 1500))
    shaped = [(x[:600].view(2, 300, D), y[:600].view(2, 300, D)), (x[600:], y[600:])]
    two = fit(parts, shaped)
    torch.testing.assert_close(whole.last.coef, parts.last.coef)
    assert one.r2_after == pytest.approx(two.r2_after, abs=1e-9)
    held = x[9::10], y[9::10].double()
    residual = (whole.double()(held[0].double()) - held[1]).square().sum()
    assert one.r2_after == pytest.approx(
        1 - float(residual.detach() / (held[1] - held[1].mean(0)).square().sum()), abs=1e-9
    )


def test_bf16_parameters_and_data() -> None:
    module = built(ONE, 0).bfloat16()
    x = rows().bfloat16()
    target = built(ONE, 1).double()
    report = fit(module, RowBatches(x, target(x.double()).detach().bfloat16()))
    assert report.r2_after > 0.999
    assert module.last.coef.dtype == torch.bfloat16


def test_calibration_brings_inputs_into_range() -> None:
    module = built({"layers": "two", "hidden": 12, "squash": "affine"}, 0)
    x = 20 + 5 * rows()
    x[:, 0] = 3.0  # does not vary
    module(x)
    assert module.metrics["out_of_range"] > 0.4
    calibrate(module, x)
    module(x)
    assert module.metrics["out_of_range"] < 0.01
    assert all(p.isfinite().all() for p in module.parameters())
    z = x[:, 1:] * module.first.scale[1:] + module.first.shift[1:]
    torch.testing.assert_close(z.std(0), torch.full((D - 1,), 1 / 3), rtol=1e-2, atol=0)


def test_bad_data_is_refused_and_nothing_changes() -> None:
    module = built(ONE, 0)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x, y = rows(), swiglu(rows())
    few = RowBatches(x[:20], y[:20])
    with pytest.raises(ConfigError, match=r"calibration=18 .* at least the 24 coefficients"):
        fit(module, few)
    bad = y.clone()
    bad[700, 2] = torch.nan
    with pytest.raises(DataError, match="targets of batch 1 are not all finite"):
        fit(module, RowBatches(x, bad, 400))
    with pytest.raises(DataError, match="inputs of batch 0"):
        fit(module, RowBatches(x / 0, y))
    with pytest.raises(ValueError, match="iterable again"):
        fit(module, iter([(x, y)]))
    with pytest.raises(ValueError, match=r"\[\.\.\., 8\] -> \[\.\.\., 8\]"):
        fit(module, [(x, y[:, :3])])
    with pytest.raises(ValueError, match="as many"):
        RowBatches(x, y[:-1])
    with pytest.raises(ConfigError, match=r"held_out=1\.5 must be above 0"):
        fit(module, few, held_out=1.5)
    with pytest.raises(ConfigError, match=r"ridge=0\.0 is too small"):
        fit(module, RowBatches(x, y), ridge=0.0)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
