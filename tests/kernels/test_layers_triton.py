"""KAN layers and groves on Triton's kernels against the same modules on the reference path."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kalmagrove.config import KAN, Edge, Grove
from kalmagrove.nn.grove import GroveLayer
from kalmagrove.nn.kan import KANLayer
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit
BODY = {"edges": 9, "top_k": 3, "rank": 5}


def kan(backend: str, **edge: object) -> KANLayer:
    config = KAN(**BODY, edge=Edge(init_scale=0.5, **edge))
    return KANLayer(12, config, Groups.single(), backend)


def grove(backend: str, **edge: object) -> GroveLayer:
    body = KAN(**BODY, edge=Edge(init_scale=0.5, **edge))
    config = Grove(groves=3, top_g=2, edge_manifold=2, shared=True, kan=body)
    return GroveLayer(12, config, Groups.single(), backend)


def gradients(module: KANLayer | GroveLayer, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module.init_weights(0.5, 0.5)
    x = x.clone().requires_grad_()
    y, aux_loss = module(x)
    (y.square().sum() + aux_loss).backward()
    named = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y, "x": x.grad, "aux": aux_loss, **named}  # type: ignore[dict-item]


@pytest.mark.parametrize("build", [kan, grove])
@pytest.mark.parametrize("edge", [{}, {"basis": "chebyshev1", "base": "none"}])
def test_layers_agree_with_every_gradient(build: type, edge: dict[str, object]) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 7, 12)
    ours, plain = build("triton", **edge), build("reference", **edge)
    expected = gradients(plain, x)
    for name, value in gradients(ours, x).items():
        gap = (value - expected[name]).norm() / expected[name].norm().clamp(min=1e-9)
        assert gap < 2e-6, (name, float(gap))
    assert ours.metrics.keys() == plain.metrics.keys()
    for name, metric in plain.metrics.items():
        torch.testing.assert_close(ours.metrics[name], metric, msg=name)


def test_a_grove_without_tokens_has_gradients_of_zero() -> None:
    ours = grove("triton")
    ours.bias[2] = -100.0  # nobody chooses it
    found = gradients(ours, torch.randn(1, 4, 12))
    assert torch.equal(found["v"][2], torch.zeros_like(found["v"][2]))
    assert found["v"][:2].abs().sum() > 0


def test_stacked_groves_are_watched_one_by_one() -> None:
    x, seen = torch.randn(1, 6, 12), {}
    for backend in ("triton", "reference"):
        module = grove(backend)
        torch.manual_seed(0)
        module.init_weights(0.5, 0.5)
        found: dict[int | None, Tensor] = {}
        module.edge.watch = lambda h, number, found=found: found.update({number: h})
        module(x)
        seen[backend] = found
    for number, h in seen["triton"].items():
        torch.testing.assert_close(h, seen["reference"][number])
    assert {n for n, h in seen["reference"].items() if len(h)} == set(seen["triton"])


class NeverWaits(TorchDispatchMode):
    """Refuses the operations that read on the host what an accelerator has worked out."""

    WAITING = (
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
    )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} waits for the accelerator"
        return function(*args, **(kwargs or {}))


def test_a_layer_of_stacked_groves_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def tolist(x: Tensor) -> None:
        raise AssertionError("tolist waits for the accelerator")

    stacked, by_itself = grove("triton"), grove("reference")
    x = torch.randn(2, 7, 12, requires_grad=True)
    monkeypatch.setattr(Tensor, "tolist", tolist)
    with NeverWaits():
        y, aux_loss = stacked(x)
        (y.square().sum() + aux_loss).backward()
        assert stacked.metrics
        with pytest.raises(AssertionError, match="tolist waits"):  # it would be noticed
            by_itself(x)
