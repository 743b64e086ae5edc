"""KAN feed-forwards of a retrofit: the formula in slow loops, gradients, counts, start, nesting."""

import math
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev, hermite_e, legendre
from scipy.interpolate import BSpline
from torch import Tensor

from kalmagrove.config import ConfigError
from kalmagrove.config.model import Basis
from kalmagrove.config.retrofit import (
    MAX_DEGREE,
    WITHOUT_CONSTANT,
    KANFamily,
    KANParallel,
    KANSequence,
    feedforward_of,
)
from kalmagrove.retrofit.feedforward import KANLinear, build_feedforward
from kalmagrove_kernels import polynomial as op
from kalmagrove_kernels.edge.basis import BASES

pytestmark = pytest.mark.unit

NAMES = get_args(Basis)
FORMS = ("article", "redundancy_free")
SQUASHES = ("tanh", "affine", "none")


def family(**keys: Any) -> KANFamily:
    return KANFamily(**{"hidden": 5, "grid": 4, "degree": 3} | keys)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """All parameters at random, in fp64."""
    torch.manual_seed(0)
    for p in module.double().parameters():
        torch.nn.init.normal_(p, 0, 0.7)
    return module


def slow_functions(config: KANFamily, u: float, lower: list[float]) -> list[float]:
    """B_0(u), B_1(u), ... by textbook formulas, all of them."""
    degree, grid = config.degree, config.grid
    if config.basis == "fourier":
        waves = [(math.cos(k * math.pi * u), math.sin(k * math.pi * u)) for k in range(1, 4)]
        return [1.0, *(value for wave in waves for value in wave)]
    u = min(max(u, -1.0), 1.0)
    one = np.eye(degree + 1)
    if config.basis == "chebyshev1":
        return [chebyshev.chebval(u, row) for row in one]
    if config.basis == "chebyshev2":
        return [chebyshev.chebval(u, chebyshev.chebder(row)) / k for k, row in shifted(degree)]
    if config.basis == "legendre":
        return [legendre.legval(u, row) for row in one]
    if config.basis == "hermite":
        return [
            hermite_e.hermeval(3 * u, row) / math.sqrt(math.factorial(p))
            for p, row in enumerate(one)
        ]
    if config.basis == "rational":
        below = 1 + abs(sum(d * u ** (q + 1) for q, d in enumerate(lower)))
        return [u**p / below for p in range(degree + 1)]
    if config.basis == "rbf":
        step = 2 / (grid - 1)
        return [math.exp(-(((u + 1 - c * step) / step) ** 2)) for c in range(grid)]
    degree = degree if config.basis == "bspline" else 1
    knots = -1 + 2 / grid * np.arange(-degree, grid + degree + 1)
    pieces = [
        BSpline.basis_element(knots[p : p + degree + 2], extrapolate=False)(u)
        for p in range(grid + degree)
    ]
    return [float(np.nan_to_num(piece)) for piece in pieces]


def shifted(degree: int) -> list[tuple[int, np.ndarray]]:
    """T_{k} = e_k with U_{k-1} = T_k' / k."""
    return [(k, np.eye(degree + 2)[k]) for k in range(1, degree + 2)]


def slow_map(layer: KANLinear, x_NI: Tensor) -> Tensor:
    config = layer.config
    keep = slice(config.dropped, None)
    y_NJ = torch.zeros(len(x_NI), layer.outputs, dtype=torch.float64)
    for n, i in product(range(len(x_NI)), range(layer.inputs)):
        u = float(x_NI[n, i])
        if config.squash == "tanh":
            u = math.tanh(u)
        elif layer.scale is not None and layer.shift is not None:
            u = float(layer.scale[i].detach()) * u + float(layer.shift[i].detach())
        lower = [] if layer.lower is None else layer.lower[:, i].tolist()
        values = slow_functions(config, u, lower)[keep]
        for j in range(layer.outputs):
            y_NJ[n, j] += sum(
                c * v for c, v in zip(layer.coef[:, j, i].tolist(), values, strict=True)
            )
    return y_NJ if layer.bias is None else y_NJ + layer.bias.detach()


@pytest.mark.parametrize("basis", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_every_map_is_its_formula(basis: str, form: str) -> None:
    x_NI = torch.randn(4, 3, dtype=torch.float64)
    for squash in SQUASHES:
        layer = randomised(KANLinear(3, 2, family(basis=basis, form=form, squash=squash)))
        torch.testing.assert_close(layer(x_NI).detach(), slow_map(layer, x_NI))
        lead = x_NI.view(2, 2, 3)
        torch.testing.assert_close(layer(lead), layer(x_NI).view(2, 2, 2))


@pytest.mark.parametrize("basis", NAMES)
def test_the_config_counts_the_functions_of_the_table(basis: str) -> None:
    for degree, grid in product((1, 2, 4), (2, 5)):
        config = family(basis=basis, degree=degree, grid=grid)
        assert config.functions == BASES[basis](degree, grid).linear_size
    assert MAX_DEGREE == op.MAX_DEGREE


@pytest.mark.parametrize("basis", sorted(set(NAMES) - set(WITHOUT_CONSTANT)))
@pytest.mark.parametrize("squash", SQUASHES)
def test_dropping_a_function_loses_nothing(basis: str, squash: str) -> None:
    """Any function of the article's form is one of the redundancy-free form."""
    article = randomised(KANLinear(3, 2, family(basis=basis, squash=squash)))
    free = randomised(KANLinear(3, 2, family(basis=basis, squash=squash, form="redundancy_free")))
    free.load_state_dict({k: v for k, v in article.state_dict().items() if k != "coef"}, False)
    with torch.no_grad():
        first_JI = article.coef[0]
        spline = basis in ("bspline", "piecewise_linear")
        free.coef.copy_(article.coef[1:] - (first_JI if spline else 0))
        free.bias.copy_(first_JI.sum(1))
    x_NI = 2 * torch.randn(20, 3, dtype=torch.float64)
    torch.testing.assert_close(free(x_NI), article(x_NI))


@pytest.mark.parametrize("layers", ["one", "two", "gated"])
def test_layers(layers: str) -> None:
    module = randomised(build_feedforward(family(layers=layers, form="redundancy_free"), 4))
    x = torch.randn(3, 4, dtype=torch.float64)
    h = x if layers == "one" else slow_map(module.first, x)
    if layers == "gated":
        h = h * slow_map(module.gate, x)
    torch.testing.assert_close(module(x).detach(), slow_map(module.last, h))


@pytest.mark.parametrize(
    ("basis", "squash", "layers"),
    [
        ("chebyshev2", "affine", "two"),
        ("rational", "affine", "gated"),
        ("bspline", "tanh", "one"),
        ("rbf", "affine", "one"),
        ("fourier", "none", "one"),
    ],
)
def test_gradcheck(basis: str, squash: str, layers: str) -> None:
    config = family(basis=basis, squash=squash, layers=layers, hidden=2, form="redundancy_free")
    module = build_feedforward(config, 2, out_std=1.0).double()
    x = (0.4 * torch.randn(3, 2, dtype=torch.float64)).requires_grad_()
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("basis", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_and_outputs_have_the_inputs_type(
    basis: str, dtype: torch.dtype
) -> None:
    """Also with values far outside the range; with fp32 parameters and with bf16 ones."""
    config = family(basis=basis, squash="affine", layers="gated", form="redundancy_free")
    for narrow in (False, True):
        module = build_feedforward(config, 6)
        module = module.to(dtype) if narrow else module
        x = torch.randn(2, 7, 6, dtype=dtype)
        x[0, 0, 0], x[0, 0, 1], x[0, 0, 2] = 0.0, 1e4, -1e4
        x.requires_grad_()
        y = module(x)
        assert (y.dtype, y.shape) == (dtype, x.shape)
        y.float().square().sum().backward()
        for tensor in (y, x.grad, *(p.grad for p in module.parameters())):
            assert tensor is not None
            assert tensor.isfinite().all()


@pytest.mark.parametrize("basis", NAMES)
def test_bf16_is_near_fp32(basis: str) -> None:
    module = build_feedforward(family(basis=basis, hidden=32), 32, out_std=1.0)
    x = torch.randn(200, 32).bfloat16()
    error = (module(x).float() - module(x.float())).square().mean().sqrt()
    assert error < 0.08


NESTED = {
    "kind": "parallel",
    "combine": "sum",
    "members": [
        {"kind": "sequence", "members": [{"layers": "one"}, {"basis": "rbf", "hidden": 4}]},
        {
            "kind": "parallel",
            "combine": "split",
            "members": [
                {"basis": "fourier", "squash": "affine", "layers": "gated", "hidden": 3},
                {"basis": "rational", "form": "redundancy_free", "layers": "one"},
            ],
        },
    ],
}


@pytest.mark.parametrize("basis", NAMES)
def test_parameter_counts(basis: str) -> None:
    for form, squash, layers in product(FORMS, SQUASHES, ("one", "two", "gated")):
        config = family(basis=basis, form=form, squash=squash, layers=layers)
        module = build_feedforward(config, 7)
        assert sum(p.numel() for p in module.parameters()) == config.parameters(7)


def test_the_default_is_the_articles_feed_forward() -> None:
    """The 39,377,088 trainable parameters of KALLM on SmolLM2-135M, last 5 blocks.

    V = 49152 tokens, D = 576, 9 heads and 3 key-value heads of 64, embedding tied and trainable:
        embedding             V D                   = 28,311,552
        attention, a block    2 D D + 2 D (3 * 64)  =    884,736
        two norms, a block    2 D                   =      1,152
        final norm            D                     =        576
    which leaves 5 * 1,327,104 = 5 * 2 * (3 * 576 * 384): three coefficients an edge, no bias and no
    scale. Biases in each map would add 5 * (384 + 576).
    """
    config = KANFamily()
    module = build_feedforward(config, 576)
    count = sum(p.numel() for p in module.parameters())
    assert count == config.parameters(576) == 2 * (3 * 576 * 384) == 1_327_104
    assert {name for name, _ in module.named_parameters()} == {"first.coef", "last.coef"}
    frozen_but = 49152 * 576 + 576 + 5 * (2 * 576 * 576 + 2 * 576 * 192 + 2 * 576)
    assert frozen_but + 5 * count == 39_377_088


@pytest.mark.parametrize("basis", NAMES)
def test_outputs_start_at_the_given_std(basis: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(1000, 64)
    for form, squash, layers in product(FORMS, ("tanh", "affine"), ("one", "two", "gated")):
        config = family(basis=basis, form=form, squash=squash, layers=layers, hidden=64)
        module = build_feedforward(config, 64, out_std=0.3)
        with torch.no_grad():
            y = module(x)
            assert y.var(0).mean() == pytest.approx(0.09, rel=0.15)
            assert y.mean(0).abs().max() < 0.1
            if module.first is not None:
                assert module.first(x).var(0).mean() == pytest.approx(1, rel=0.15)


def test_nested_groups_start_at_the_given_std() -> None:
    torch.manual_seed(1)
    x = torch.randn(1000, 64)
    member = {"layers": "one"}
    for tree in (
        {"kind": "parallel", "combine": "sum", "members": [member] * 3},
        {"kind": "parallel", "combine": "split", "members": [member] * 3},
        {"kind": "sequence", "members": [member] * 3},
        NESTED,
    ):
        with torch.no_grad():
            y = build_feedforward(feedforward_of(tree), 64, out_std=2.0)(x)
        assert y.var(0).mean() == pytest.approx(4, rel=0.15)


def test_groups_are_their_definitions() -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    pair = (family(layers="one"), family(basis="rbf", layers="one"))
    summed = randomised(build_feedforward(KANParallel(members=pair), 7))
    f, g = summed.members
    w = summed.weight
    torch.testing.assert_close(summed(x), w[0] * f(x) + w[1] * g(x))
    split = randomised(build_feedforward(KANParallel(members=pair, combine="split"), 7))
    f, g = split.members
    assert split.shares == [4, 3]
    torch.testing.assert_close(split(x), f(x[:, :4]) + g(x[:, 4:]))
    chain = randomised(build_feedforward(KANSequence(members=(*pair, pair[0])), 7))
    f, g, h = chain.members
    second = f(x) + g(f(x))
    torch.testing.assert_close(chain(x), second + h(second))


def test_nesting() -> None:
    config = feedforward_of(NESTED)
    module = build_feedforward(config, 9)
    assert sum(p.numel() for p in module.parameters()) == config.parameters(9)
    x = torch.randn(2, 3, 9, requires_grad=True)
    assert module(x).shape == x.shape
    module(x).sum().backward()
    assert x.grad is not None
    last = [p for name, p in module.named_parameters() if name.endswith("last.coef")]
    assert len(last) == 4
    assert all(p.grad is not None and p.grad.any() for p in last)  # corrections at 0 learn too
    assert set(module.metrics) == {"out_of_range"}  # of the one affine member
    assert feedforward_of(config.model_dump()) == config


def test_out_of_range_is_the_share_of_inputs() -> None:
    x = torch.tensor([[0.5, -2.0], [1.5, 0.0], [0.1, 0.2], [-1.0, 3.0]], requires_grad=True)
    module = build_feedforward(family(layers="one", squash="none"), 2)
    assert module.metrics == {}
    module(x)
    assert module.metrics["out_of_range"].item() == 3 / 8
    assert not module.metrics["out_of_range"].requires_grad
    affine = build_feedforward(family(layers="one", squash="affine"), 2)
    affine(4 * x)  # the scale starts at 1/3
    assert affine.metrics["out_of_range"].item() == 4 / 8
    tanh = build_feedforward(family(layers="two"), 2)
    tanh(x)
    assert tanh.metrics == {}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"degree": 9}, r"ffn\.degree=9 must be at most 8; try 8"),
        ({"basis": "rbf", "grid": 1}, r"ffn\.grid=1 must be at least 2 with basis=rbf; try 8"),
        ({"degree": 0}, r"ffn\.degree=0 should be greater than 0"),
        ({"basis": "sine"}, r"ffn\.basis=sine should be 'bspline', 'chebyshev1'.*"),
        ({"degre": 3}, r"ffn\.degre=3 is not a known key of a family; known keys: kind, basis.*"),
        ({"kind": "serial"}, r"ffn\.kind=serial is no kind of feed-forward; use one of family.*"),
        ({"kind": "sequence"}, r"ffn\.members=null is required.*"),
        ({"kind": "sequence", "members": [{}]}, r"ffn\.members=1 members must be at least 2.*"),
        (
            {"kind": "parallel", "members": [{}, {"hidden": -1}]},
            r"ffn\.members\.1\.hidden=-1 should be greater than 0.*",
        ),
        (
            {"kind": "parallel", "members": [{}, {"kind": "sum"}]},
            r"ffn\.members\.1\.kind=sum is no kind.*",
        ),
    ],
)
def test_what_cannot_be_built_is_explained(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        feedforward_of(tree)


def test_it_can_be_built_without_memory() -> None:
    """As libraries do before they read a checkpoint."""
    with torch.device("meta"):
        module = build_feedforward(feedforward_of(NESTED), 576)
    assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("basis", NAMES)
def test_the_smallest_of_each_start_well(basis: str) -> None:
    for form in FORMS:
        config = family(basis=basis, form=form, degree=1, grid=2, layers="one")
        y = build_feedforward(config, 200, out_std=1.0)(torch.randn(1000, 200))
        assert y.detach().var(0).mean() == pytest.approx(1, rel=0.15)


def test_more_members_than_channels() -> None:
    config = KANParallel(members=(KANFamily(),) * 3, combine="split")
    with pytest.raises(ConfigError, match=r"ffn.members=3 .* the 2 channels .*; use fewer"):
        build_feedforward(config, 2)


def test_an_unknown_backend() -> None:
    with pytest.raises(KeyError, match="backend='cuda' must be one of"):
        build_feedforward(KANFamily(), 4, backend="cuda")
