"""ADA's kernels on a GPU: every gradient against fp64, at production shapes and awkward ones.

In half precision the error may be twice that of the reference on the same inputs, which computes in
fp32 and rounds its results. The gradient of a decay is a sum of what nearly cancels: the reference
has it in fp32, the kernels from products in half precision, so it has a bound of its own.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from kalmagrove_kernels import ada

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DECAY = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-3}
# States are sums of products of half precision, which the reference does not round.
STATE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-5}
FLOOR = {torch.bfloat16: 1e-3, torch.float16: 2e-4, torch.float32: 2e-5}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def time_constants(heads: int, low: float = 4.0, high: float = 512.0) -> Tensor:
    steps = torch.linspace(0, 1, heads, device="cuda")
    return -1 / (low * (high / low) ** steps)


def case(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, *, state: bool = False
) -> dict[str, Tensor]:
    batch, tokens, heads, rank, width = shape
    torch.manual_seed(sum(shape))
    q, k = torch.randn(2, batch, tokens, heads, rank, device="cuda").to(dtype).unbind()
    found = {"q": q, "k": k, "v": torch.randn(batch, tokens, heads, width, device="cuda").to(dtype)}
    found["decay"] = time_constants(heads)
    if state:
        found["state"] = torch.randn(batch, heads, rank, width, device="cuda")
    return found


def run(given: dict[str, Tensor], backend: str, dtype: torch.dtype | None, **more: Any) -> Any:
    """Outputs and gradients by name; dtype None: as given."""
    leaves = {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in given.items()}
    names = {"decay": "log_decay_H", "state": "state_BHRV"}
    optional = {names[n]: x for n, x in leaves.items() if n in names}
    q, k, v = (leaves[n] for n in "qkv")
    out, end = ada.attention(
        q, k, v, scale=q.shape[-1] ** -0.5, backend=backend, **optional, **more
    )
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(out.shape, generator=generator, device="cuda").to(given["v"].dtype)
    loss = (out.double() * weight.double()).sum()
    if end is not None:
        loss = loss + (end.double() * 0.1).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    results = {"out": out.detach()}
    results |= {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
    return results if end is None else results | {"end": end.detach()}


def check(given: dict[str, Tensor], **more: Any) -> None:
    dtype = given["q"].dtype
    ours, again = (run(given, "triton", None, **more) for _ in range(2))
    assert all(torch.equal(again[name], value) for name, value in ours.items())
    theirs = run(given, "reference", None, **more)
    truth = run(given, "reference", torch.float64, **more)
    errors = {
        name: (relative(value, truth[name]), relative(theirs[name], truth[name]))
        for name, value in ours.items()
    }
    own = {"ddecay": DECAY[dtype], "end": STATE[dtype], "dstate": STATE[dtype]}
    bad = {
        name: (mine, reference)
        for name, (mine, reference) in errors.items()
        if not mine <= own.get(name, 2 * reference + FLOOR[dtype])
    }
    assert not bad, (bad, errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1000, 4, 128, 128),
        (3, 63, 5, 64, 64),
        (1, 1, 2, 32, 32),
        (2, 333, 3, 24, 60),  # widths that no block fills
        (1, 2050, 2, 256, 256),
        (1, 700, 3, 48, 128),  # queries and keys of a rank below the values'
    ],
)
def test_shapes(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")
    check(case(shape, dtype, state=True), return_state=True)


@pytest.mark.parametrize("shape", [(4, 4096, 16, 128, 128), (8, 2048, 32, 64, 64)])
def test_production_shapes(shape: tuple[int, int, int, int, int]) -> None:
    check(case(shape, torch.bfloat16))


def test_packed_documents() -> None:
    given = case((2, 3000, 4, 128, 128), torch.bfloat16, state=True)
    segments = torch.randint(0, 9, (2, 3000), device="cuda").sort(1).values
    check(given, segments_BT=segments, return_state=True)


@pytest.mark.parametrize("low_high", [(4.0, 512.0), (1.0, 8.0), (1e4, 1e6)])
def test_65536_tokens_do_not_drift(low_high: tuple[float, float]) -> None:
    """The last thousand tokens, and the gradients there, against fp64 on one head of three."""
    given = case((1, 65536, 3, 128, 128), torch.bfloat16)
    given["decay"] = time_constants(3, *low_high)
    ours = run(given, "triton", None)
    decays = []
    for head in range(3):
        one = {n: x[head : head + 1] if n == "decay" else x[:, :, head : head + 1]
               for n, x in given.items()}  # fmt: skip
        generator = torch.Generator("cuda").manual_seed(0)
        weight = torch.randn(given["v"].shape, generator=generator, device="cuda")
        weight = weight.bfloat16()[:, :, head : head + 1].double()
        leaves = [one[n].double().requires_grad_() for n in ("q", "k", "v", "decay")]
        q, k, v, decay = leaves
        out, _ = ada.attention(q, k, v, scale=128**-0.5, log_decay_H=decay)
        truth = dict(
            zip(("dq", "dk", "dv", "ddecay"), torch.autograd.grad(out, leaves, weight), strict=True)
        )
        truth["out"] = out
        for name, value in truth.items():
            if name == "ddecay":
                decays.append(value[0])
                continue
            mine = ours[name][:, :, head : head + 1]
            for part in (slice(0, 1000), slice(32000, 33000), slice(64536, 65536)):
                assert relative(mine[:, part], value[:, part]) < 6e-3, (name, head, part)
    assert relative(ours["ddecay"], torch.stack(decays)) < DECAY[torch.bfloat16]


@pytest.mark.parametrize("size", [1e4, 1e-20])
def test_extreme_numbers_stay_numbers(size: float) -> None:
    given = case((1, 500, 4, 64, 64), torch.bfloat16)
    given["q"], given["k"] = given["q"] * size, given["k"] * size
    given["decay"] = torch.tensor([-torch.inf, -1e3, -1e-30, 0.0], device="cuda")
    assert all(bool(x.isfinite().all()) for x in run(given, "triton", None).values())


def test_pieces_of_a_row_are_the_row() -> None:
    given = case((1, 4096, 8, 128, 128), torch.bfloat16)
    options: dict[str, Any] = {
        "scale": 128**-0.5, "log_decay_H": given["decay"], "backend": "triton",
    }  # fmt: skip
    whole, end = ada.attention(*(given[n] for n in "qkv"), return_state=True, **options)
    outs, state = [], None
    for piece in (slice(0, 1000), slice(1000, 1001), slice(1001, 4096)):
        cut = (given[n][:, piece] for n in "qkv")
        out, state = ada.attention(*cut, state_BHRV=state, return_state=True, **options)
        outs.append(out)
    assert relative(torch.cat(outs, 1), whole) < 5e-3
    assert end is not None
    assert state is not None
    assert relative(state, end) < STATE[torch.bfloat16]


def prepared(x: Tensor, taps: Tensor | None, backend: str, **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, taps) if t is not None]
    more = {"taps_CP": leaves[1]} if taps is not None else {}
    y = ada.prepare(leaves[0], backend=backend, **more, **options)
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(y.shape, generator=generator, device="cuda")
    return [y.detach(), *torch.autograd.grad(y, leaves, weight.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [128, 64, 96, 20])
@pytest.mark.parametrize("what", ["all", "convolution", "norm and rope", "documents"])
def test_prepare(what: str, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, tokens = 5, 700
    x = torch.randn(2, tokens, heads * width, device="cuda").to(dtype)
    taps = None if what == "norm and rope" else torch.randn(heads * width, 4, device="cuda")
    options: dict[str, Any] = {"heads": heads, "width": width}
    if what != "convolution":
        angles = 1000 * torch.rand(tokens, 1, width // 2, device="cuda")
        options |= {"norm_eps": 1e-5, "angles_THr": angles, "silu": what == "all"}
    if what == "documents":
        options["segments_BT"] = torch.randint(0, 9, (2, tokens), device="cuda").sort(1).values
    ours, again = (prepared(x, taps, "triton", **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    theirs = prepared(x, taps, "reference", **options)
    wide = None if taps is None else taps.double()
    truth = prepared(x.double(), wide, "reference", **options)
    for i, (mine, reference, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
        # The gradient passes one more rounding to the dtype, between its two kernels.
        limit = (
            2 * relative(reference, exact)
            + FLOOR[dtype]
            + (2e-3 if i and dtype == torch.bfloat16 else 0)
        )
        assert relative(mine, exact) < limit, (i, relative(mine, exact), relative(reference, exact))


def test_memory_is_what_a_layer_must_keep() -> None:
    """Forward keeps q, k and v, its output and one state a span; nothing of [T, T], no copies."""
    given = case((1, 16384, 16, 128, 128), torch.bfloat16)
    q, k, v = (given[n].requires_grad_() for n in "qkv")
    options: dict[str, Any] = {"log_decay_H": given["decay"], "backend": "triton"}
    ada.attention(q, k, v, scale=0.1, **options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, _ = ada.attention(q, k, v, scale=0.1, **options)
    states = 4 * 16 * 128 * 128 * (16384 // 2048)
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * 2 + states + 2**20


def test_a_captured_graph_replays() -> None:
    given = case((2, 2048, 8, 64, 64), torch.bfloat16)
    q, k, v = (given[n].requires_grad_() for n in "qkv")
    weight = torch.randn_like(v)

    def step() -> tuple[Tensor, ...]:
        out, _ = ada.attention(q, k, v, scale=0.1, log_decay_H=given["decay"], backend="triton")
        return out, *torch.autograd.grad(out, (q, k, v), weight)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.copy_(torch.randn_like(q))
    graph.replay()
    for replayed, direct in zip(captured, step(), strict=True):
        assert torch.equal(replayed, direct)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 1000, 2048), (1, 3, 24), (3, 129, 1032)])
def test_convolution_in_cuda(
    shape: tuple[int, int, int], dtype: torch.dtype, segmented: bool
) -> None:
    torch.manual_seed(0)
    batch, tokens, channels = shape
    x, taps = torch.randn(shape, device="cuda").to(dtype), torch.randn(channels, 4, device="cuda")
    options: dict[str, Any] = {"heads": 1, "width": channels}
    if segmented:
        options["segments_BT"] = torch.randint(0, 9, (batch, tokens), device="cuda").sort(1).values
    ours, again = (prepared(x, taps, "cuda", **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    theirs = prepared(x, taps, "reference", **options)
    truth = prepared(x.double(), taps.double(), "reference", **options)
    for mine, reference, exact in zip(ours, theirs, truth, strict=True):
        assert relative(mine, exact) < 2 * relative(reference, exact) + FLOOR[dtype]


def test_launches_tell_their_arguments_apart() -> None:
    """Sizes of 1, multiples of 16 or not, and addresses that are not aligned, one after another."""
    taps = torch.randn(64, 4, device="cuda")
    for tokens in (16, 1, 17, 16, 33, 1):
        for offset in (0, 1):
            memory = torch.randn(tokens * 64 + offset, device="cuda").bfloat16()
            x = memory[offset:].view(1, tokens, 64)
            ours = prepared(x, taps, "triton", heads=2, width=32, norm_eps=1e-5)
            truth = prepared(
                x.double(), taps.double(), "reference", heads=2, width=32, norm_eps=1e-5
            )
            for mine, exact in zip(ours, truth, strict=True):
                assert relative(mine, exact) < 1e-2, (tokens, offset)
