"""Refitting the grids of a model in training, on one process; the ranks are in tests/dist."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import make_run
from torch import Tensor

from kalmagrove.engine.refit import refit_grids
from kalmagrove.nn import build_model
from kalmagrove.nn.edge import EdgeActivation
from kalmagrove.nn.model import Transformer
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit
GRIDS = {"0", "1.0", "1.1", "1.shared"}


def engine(span: float, refit_above: float | None = 0.05) -> Any:
    """A layer of each kind over one process, without DeepSpeed."""
    torch.manual_seed(0)
    base = make_run().model.model_dump()
    edge = {"range": (-span, span), "grid": 16, "init_scale": 0.5, "refit_above": refit_above}
    base["layers"], base["ffn"]["pattern"] = 2, ("kan", "grove")
    base["ffn"]["kan"]["edge"] |= edge
    base["ffn"]["grove"]["kan"]["edge"] |= edge
    model = build_model(make_run(model=base).model, Groups.single()).train()
    return SimpleNamespace(
        module=model,
        groups=Groups.single(),
        eval_loss=lambda batch: model.eval()(**batch, normalizer=1.0),
    )


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(0, 32, (16, 32), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens, "targets": tokens}


def state(model: Transformer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def logits(engine: Any) -> Tensor:
    found = engine.module.eval()(batch()["tokens"]).logits
    assert found is not None
    return found.detach()


def test_the_function_stays_and_the_data_come_into_range() -> None:
    own = engine(span=1.5)
    before, old = logits(own), state(own.module)
    shares = {name: float(v) for name, v in own.module.metrics().items() if "out_of" in name}
    grids = refit_grids(own, batch())
    after = logits(own)
    assert set(grids) == GRIDS
    assert grids["0"].before == pytest.approx(shares["0.out_of_range"])
    for grid in grids.values():
        assert grid.after < 0.01 < 0.05 < grid.before
        assert 0 < grid.error < 0.15
    metrics = own.module.metrics()
    assert all(metrics[f"{i}.out_of_range"] < 0.01 < shares[f"{i}.out_of_range"] for i in (0, 1))
    moved = engine(span=1.5)  # the same ranges with the old coefficients
    ranges = {n: v for n, v in state(own.module).items() if n.endswith("range")}
    moved.module.load_state_dict(old | ranges)
    change = float((after - before).norm())
    assert change < 1e-3 * float(before.norm())
    assert change < 0.5 * float((logits(moved) - before).norm())
    changed = {n.rsplit(".", 1)[1] for n, v in state(own.module).items() if not v.equal(old[n])}
    assert changed == {"coef", "range"}, "no router load, no other weight"
    assert not refit_grids(own, batch()), "nothing is left to do"


@pytest.mark.parametrize(("span", "above"), [(8.0, 0.05), (1.5, None), (1.5, 0.9)])
def test_what_is_in_range_or_not_asked_for_stays(span: float, above: float | None) -> None:
    own = engine(span, above)
    old = state(own.module)
    assert not refit_grids(own, batch())
    assert all(value.equal(old[name]) for name, value in state(own.module).items())


@pytest.mark.parametrize("failure", ["singular", "nan"])
def test_a_failure_leaves_the_grid_as_it_was(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = engine(span=1.5)
    old = state(own.module)

    def fail(gram: Tensor, rhs: Tensor) -> Tensor:
        if rhs.shape[0] == 8 and fail.calls == 0:  # type: ignore[attr-defined]
            fail.calls += 1  # type: ignore[attr-defined]
            if failure == "singular":
                raise torch.linalg.LinAlgError("singular")
            return rhs * float("nan")
        return solve(gram, rhs)

    solve, fail.calls = torch.linalg.solve, 0  # type: ignore[attr-defined]
    monkeypatch.setattr("kalmagrove.nn.edge.torch.linalg.solve", fail)
    with caplog.at_level(logging.WARNING, "kalmagrove"):
        grids = refit_grids(own, batch())
    assert set(grids) == GRIDS - {"0"}
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "the grid of layer 0 stays as it was"
    ]
    new = state(own.module)
    for name in ("coef", "range"):
        assert new[f"blocks.0.ffn.edge.{name}"].equal(old[f"blocks.0.ffn.edge.{name}"])
    assert all(value.isfinite().all() for value in new.values())


def test_data_that_are_not_finite_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    own = engine(span=1.5)
    own.module.embedding.weight.data[3] = float("inf")
    old = state(own.module)
    refit_grids(own, {name: torch.full_like(v, 3) for name, v in batch().items()})
    assert all(v.equal(old[n]) for n, v in state(own.module).items() if "ffn" in n)
    edges = [m for m in own.module.modules() if isinstance(m, EdgeActivation)]
    assert not any(m._forward_pre_hooks for m in edges), "no hook is left behind"
