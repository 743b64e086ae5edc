"""ADA: the three forms against a plain double loop, and the layer around them."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kalmagrove.config import Model
from kalmagrove.nn.attention import build_attention
from kalmagrove.nn.norm import RMSNorm
from kalmagrove.nn.rope import rotary_angles, rotate
from kalmagrove.parallel import Groups
from kalmagrove_kernels.ada import (
    chunked,
    end_state,
    entering_state,
    from_state,
    quadratic,
    recurrent,
)

pytestmark = pytest.mark.unit

FORMS = {
    "quadratic": lambda *a, **k: quadratic(*a, **k),
    "chunked": lambda *a, **k: chunked(*a, chunk=16, **k)[0],
    "recurrent": lambda *a, **k: recurrent(*a, **k)[0],
}
DECAYS = {
    "none": None,
    "one": [1.0, 1.0],
    "zero": [0.0, 0.0],
    "tiny": [1e-30, 1e-3],
    "usual": [math.exp(-1 / 4), math.exp(-1 / 512)],
}


def double_loop(q, k, v, scale, log_decay=None, segments=None) -> Tensor:
    """The definition, one pair of tokens at a time, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(v)
    decay = [1.0] * q.shape[1] if log_decay is None else log_decay.double().exp().tolist()
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                for s in range(t + 1):
                    if segments is None or segments[b, t] == segments[b, s]:
                        weight = scale * decay[h] ** (t - s) * torch.dot(q[b, h, t], k[b, h, s])
                        out[b, h, t] += weight * v[b, h, s]
    return out


def some_qkv(tokens: int, heads: int = 2, batch: int = 2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, heads, tokens)
    q, k = (torch.randn(*shape, 6, generator=generator, dtype=dtype) for _ in range(2))
    return q, k, torch.randn(*shape, 5, generator=generator, dtype=dtype)


def some_segments(tokens: int, batch: int = 2) -> Tensor:
    """Rows with different borders, among them one-token segments and one longer than a chunk."""
    generator = torch.Generator().manual_seed(tokens)
    borders = torch.rand(batch, tokens, generator=generator) < 0.08
    borders[:, 0] = False
    borders[1, tokens // 3 : tokens // 3 + 3] = True
    return borders.cumsum(1).int()


def log_of(decay: list[float] | None) -> Tensor | None:
    return None if decay is None else torch.tensor(decay, dtype=torch.float64).log().float()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_every_form_is_the_double_loop(tokens: int, decay: str, packed: bool) -> None:
    q, k, v = some_qkv(tokens)
    segments = some_segments(tokens) if packed else None
    want = double_loop(q, k, v, 0.4, log_of(DECAYS[decay]), segments)
    for form in FORMS.values():
        got = form(q, k, v, scale=0.4, log_decay_H=log_of(DECAYS[decay]), segments_BT=segments)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [63, 64, 65, 150])
def test_forms_agree(tokens: int, decay: str, packed: bool) -> None:
    q, k, v = some_qkv(tokens)
    log_decay, segments = log_of(DECAYS[decay]), some_segments(tokens) if packed else None
    results = [
        form(q, k, v, scale=0.1, log_decay_H=log_decay, segments_BT=segments)
        for form in FORMS.values()
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("packed", [False, True])
def test_final_states_agree_and_continue(decay: str, packed: bool) -> None:
    q, k, v = some_qkv(70)
    log_decay, segments = log_of(DECAYS[decay]), some_segments(70) if packed else None
    options = {"scale": 0.3, "log_decay_H": log_decay}
    for cut in (1, 16, 32, 41):
        part = [x[:, :, :cut] for x in (q, k, v)]
        ids = None if segments is None else segments[:, :cut]
        _, by_token = recurrent(*part, segments_BT=ids, **options)
        _, by_chunk = chunked(*part, chunk=16, segments_BT=ids, return_state=True, **options)
        torch.testing.assert_close(by_chunk, by_token, atol=1e-5, rtol=1e-5)
        if not packed:
            rest = [x[:, :, cut:] for x in (q, k, v)]
            whole = quadratic(q, k, v, **options)[:, :, cut:]
            for form in (recurrent, lambda *a, **o: chunked(*a, chunk=16, return_state=True, **o)):
                out, after = form(*rest, state_BHRV=by_token, **options)
                torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)
                last = recurrent(q, k, v, **options)[1]
                torch.testing.assert_close(after, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_gradients_agree(form: str, packed: bool) -> None:
    segments = some_segments(50) if packed else None
    weight = torch.randn(2, 2, 50, 5, generator=torch.Generator().manual_seed(0))
    gradients = []
    for name in ("quadratic", form):
        inputs = [x.requires_grad_() for x in (*some_qkv(50), log_of(DECAYS["usual"]))]
        out = FORMS[name](*inputs[:3], scale=0.4, log_decay_H=inputs[3], segments_BT=segments)
        gradients.append(torch.autograd.grad((out * weight).sum(), inputs))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in some_qkv(5, batch=1, dtype=torch.float64)]
    log_decay = torch.tensor([-0.3, -2.0], dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[0, 0, 0, 1, 1]])

    def run(q, k, v, log_decay):
        return chunked(
            q, k, v, scale=0.5, log_decay_H=log_decay, segments_BT=segments, chunk=2,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(run, (*inputs, log_decay))


def test_extreme_decays_have_finite_gradients() -> None:
    q, k, v = some_qkv(40)
    log_decay = torch.tensor([-1e30, -1e-30], requires_grad=True)
    for form in FORMS.values():
        (gradient,) = torch.autograd.grad(
            form(q, k, v, scale=0.4, log_decay_H=log_decay).sum(), log_decay
        )
        assert gradient.isfinite().all()


def test_long_sequences_do_not_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4096, 8, generator=generator) for _ in range(3))
    log_decay = torch.tensor([-1 / 4096, -1 / 16])
    out, _ = chunked(q, k, v, scale=8**-0.5, log_decay_H=log_decay)
    apart = torch.arange(4095, -1, -1, dtype=torch.float64)
    for h in range(2):
        scores = k[0, h].double() @ q[0, h, -1].double() * 8**-0.5
        want = (scores * (log_decay[h].double() * apart).exp()) @ v[0, h].double()
        torch.testing.assert_close(out[0, h, -1].double(), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("pieces", "tokens"), [(1, 9), (2, 20), (4, 10), (6, 1), (5, 32)])
def test_pieces_join_to_the_whole(pieces: int, tokens: int, decay: str, packed: bool) -> None:
    """Every form on pieces of a row, joined by their end states, also in the gradient."""
    total = pieces * tokens
    q, k, v = (x.requires_grad_() for x in some_qkv(total, dtype=torch.float64))
    segments = some_segments(total) if packed else None
    rate = log_of(DECAYS[decay])
    options = {"log_decay_H": None if rate is None else rate.double().requires_grad_()}
    cut = [slice(p * tokens, (p + 1) * tokens) for p in range(pieces)]
    ids = [None if segments is None else segments[:, c] for c in cut]
    states = [
        end_state(k[:, :, c], v[:, :, c], segments_BT=i, **options)
        for c, i in zip(cut, ids, strict=True)
    ]
    ends = torch.stack(states, 2)
    last = None if segments is None else torch.stack([i[:, -1] for i in ids], 1)
    inputs = [x for x in (q, k, v, options["log_decay_H"]) if x is not None]
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(0)).double()
    want = quadratic(q, k, v, scale=0.4, segments_BT=segments, **options)
    wanted = torch.autograd.grad((want * weight).sum(), inputs)
    for form in FORMS.values():
        joined = []
        for p, (c, i) in enumerate(zip(cut, ids, strict=True)):
            part = [x[:, :, c] for x in (q, k, v)]
            state = entering_state(ends, p, tokens, last_segments_BN=last, **options)
            continues = None if last is None else i == last[:, max(p - 1, 0), None]
            own = form(*part, scale=0.4, segments_BT=i, **options)
            joined.append(
                own + from_state(part[0], state, scale=0.4, continues_BT=continues, **options)
            )
        got = torch.cat(joined, 2)
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)
        gradients = torch.autograd.grad((got * weight).sum(), inputs, retain_graph=True)
        for found, expected in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_segments_and_state_are_refused_together() -> None:
    q, k, v = some_qkv(4)
    state = torch.zeros(2, 2, 6, 5)
    for form in (chunked, recurrent):
        with pytest.raises(ValueError, match="exclude each other"):
            form(q, k, v, scale=1.0, segments_BT=some_segments(4), state_BHRV=state)


PAPER = {
    "decay": "none", "rope": False, "qk_norm": False, "output_norm": False, "output_gate": False,
}  # fmt: skip


def some_model(layers: int = 1, backend: str = "auto", **ada) -> Model:
    grove = {"groves": 2, "top_g": 1, "kan": {"edges": 8, "rank": 4}}
    return Model.model_validate(
        {
            "name": "test", "d_model": 24, "layers": layers, "backend": backend,
            "attention": {
                "pattern": ("ada",),
                "ada": {"heads": 3, "head_dim": 8, "chunk": 16, **ada},
                "softmax": {"heads": 3, "kv_heads": 3},
                "mla": {"heads": 2, "kv_rank": 4, "nope_dim": 4, "rope_dim": 2, "v_dim": 4},
            },
            "ffn": {
                "pattern": ("dense",), "dense": {"hidden": 8},
                "moe": {"experts": 2, "top_k": 1, "hidden": 8},
                "kan": grove["kan"], "grove": grove,
            },
        }
    )  # fmt: skip


def some_layer(layer: int = 0, layers: int = 1, **ada):
    torch.manual_seed(1)
    attention = build_attention(some_model(layers, **ada), layer, Groups.single())
    attention.init_weights(0.3, 0.3)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.startswith("kernel"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return attention


SETTINGS = {
    "default": {},
    "paper": PAPER,
    "fixed decay, silu": {"decay": "fixed", "kernel_activation": "silu"},
    "ode": {"kernel": "ode", "taps": 3},
    "no kernel": {"kernel": "none", "rope": False},
    "one tap": {"taps": 1},
    "many taps": {"taps": 20, "qk_norm": False},
    "one rank": {"qk_rank": 4},
    "ranks": {"qk_rank": ((2, 6, 4),)},
    "ranks without rope": {"qk_rank": ((1, 5, 3),), "rope": False, "output_gate": False},
}


def by_hand(attention, x: Tensor) -> Tensor:
    """The layer written out head by head in fp64, from its parameters."""
    config, (batch, tokens, _) = attention.config, x.shape
    x = x.double()
    q, k, v = (x @ w.weight.double().T for w in (attention.w_q, attention.w_k, attention.w_v))
    if attention.kernel is not None:
        taps, raw = attention.kernel().double(), k
        k = torch.zeros_like(raw)
        for t in range(tokens):
            for p in range(min(t + 1, taps.shape[1])):
                k[:, t] += taps[:, p] * raw[:, t - p]
    if config.kernel_activation == "silu":
        k = k * torch.sigmoid(k)
    out, row = torch.zeros(batch, tokens, 3, 8, dtype=torch.float64), 0
    for head, rank in enumerate(attention.ranks):
        parts = [y[..., row : row + rank] for y in (q, k)]
        row += rank
        if config.qk_norm:
            parts = [y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() for y in parts]
        if config.rope:
            time = torch.arange(tokens, dtype=torch.float64)[:, None]
            angle = time * config.rope_theta ** (
                -torch.arange(0, rank, 2, dtype=torch.float64) / rank
            )
            turned = []
            for y in parts:
                z = torch.complex(y[..., : rank // 2], y[..., rank // 2 :])
                z = z * torch.polar(torch.ones_like(angle), angle)
                turned.append(torch.cat([z.real, z.imag], -1))
            parts = turned
        log_decay = None
        if config.decay != "none":
            low, high = config.decay_range
            log_decay = torch.tensor([-1 / (low * (high / low) ** (head / 2))])
        heads = (parts[0][:, None], parts[1][:, None], v[:, None, :, head * 8 : head * 8 + 8])
        out[:, :, head] = double_loop(*heads, 8**-0.5, log_decay)[:, 0]
    if config.output_norm:
        out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    out = out.flatten(2)
    if config.output_gate:
        gate = x @ attention.w_g.weight.double().T
        out = out * gate * torch.sigmoid(gate)
    return out @ attention.w_o.weight.double().T


@pytest.mark.parametrize("setting", SETTINGS)
def test_layer_is_the_formula_written_out(setting: str) -> None:
    attention = some_layer(**SETTINGS[setting])
    x = torch.randn(2, 19, 24)
    with torch.no_grad():
        torch.testing.assert_close(
            attention(x).double(), by_hand(attention, x), atol=1e-4, rtol=1e-4
        )


def test_paper_setting_is_the_literal_formula() -> None:
    attention, x = some_layer(**PAPER), torch.randn(1, 9, 24)
    q, k, v = (w(x)[0].view(9, 3, 8) for w in (attention.w_q, attention.w_k, attention.w_v))
    padded = torch.cat([torch.zeros(3, 24), k.flatten(1)])
    kernel = attention.kernel().T
    k = sum(kernel[p] * padded[3 - p : 12 - p] for p in range(4)).view(9, 3, 8)
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(8)
    want = attention.w_o(torch.einsum("hts,shd->thd", scores.tril(), v).flatten(1))
    torch.testing.assert_close(attention(x)[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_layer_is_causal(setting: str, form: str) -> None:
    attention = some_layer(form=form, **SETTINGS[setting])
    x = torch.randn(1, 40, 24)
    changed = x.clone()
    changed[:, 23:] = torch.randn(1, 17, 24)
    before, after = attention(x), attention(changed)
    torch.testing.assert_close(before[:, :23], after[:, :23], atol=1e-6, rtol=0)
    assert (before[:, 23] - after[:, 23]).abs().max() > 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_packed_row_equals_separate_rows(setting: str, form: str) -> None:
    """In fp64 but for the angles of the rotation, which are fp32."""
    attention = some_layer(form=form, **SETTINGS[setting]).double()
    documents = [torch.randn(1, n, 24).double() for n in (1, 2, 21, 16, 5)]
    segments = torch.cat([torch.full((1, d.shape[1]), i) for i, d in enumerate(documents)], dim=1)
    packed = attention(torch.cat(documents, dim=1), segments.int())
    separate = torch.cat([attention(d) for d in documents], dim=1)
    torch.testing.assert_close(packed, separate, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
def test_decoding_equals_the_full_forward(setting: str) -> None:
    attention = some_layer(**SETTINGS[setting]).double()
    x = torch.randn(2, 53, 24).double()
    with torch.no_grad():
        want = attention(x)
        for splits in ([1] * 53, [20, *[1] * 33], [2, 1, 17, 33], [53]):
            cache = attention.init_cache(2, 53, x.device, x.dtype)
            got = torch.cat([attention(part, cache=cache) for part in x.split(splits, 1)], dim=1)
            torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)
            assert cache.tokens == 53


def test_state_is_constant_size_and_fp32() -> None:
    attention = some_layer().bfloat16()
    cache = attention.init_cache(1, 10**9, "cpu", torch.bfloat16)
    with torch.no_grad():
        attention(torch.randn(1, 30, 24).bfloat16(), cache=cache)
    assert cache.state.shape == (1, 3, 8, 8)
    assert cache.state.dtype == torch.float32
    assert cache.tail.shape == (1, 3, 24)


def test_cache_refuses_segments() -> None:
    attention = some_layer()
    cache = attention.init_cache(1, 4, "cpu", torch.float32)
    with pytest.raises(ValueError, match="exclude each other"):
        attention(torch.randn(1, 4, 24), torch.zeros(1, 4), cache)


def test_unequal_ranks_hold_no_surplus_parameters() -> None:
    attention = some_layer(layer=1, layers=2, qk_rank=((8, 8, 8), (2, 6, 4)))
    assert attention.ranks == (2, 6, 4)
    assert attention.w_q.weight.shape == attention.w_k.weight.shape == (12, 24)
    assert attention.kernel.taps_CP.shape == (12, 4)
    assert attention.scale == 8**-0.5


def test_qk_rank_table_counts_ada_layers_only() -> None:
    data = some_model(4, qk_rank=((2, 2, 2), (4, 4, 4), (6, 6, 6), (8, 8, 8))).model_dump()
    data["attention"]["pattern"] = ("ada", "softmax")
    data["attention"]["ada"]["qk_rank"] = ((2, 2, 2), (4, 4, 4))
    model = Model.model_validate(data)
    assert build_attention(model, 2, Groups.single()).ranks == (4, 4, 4)


@pytest.mark.parametrize("setting", ["default", "ode", "ranks"])
def test_bf16_is_close_to_fp32(setting: str) -> None:
    attention = some_layer(**SETTINGS[setting])
    x = torch.randn(2, 80, 24).bfloat16().float()
    want = attention(x)
    got = attention.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    error = (got.float() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error < 0.02


def test_every_parameter_learns_and_has_its_kind() -> None:
    for setting in ("default", "ode", "ranks"):
        attention = some_layer(**SETTINGS[setting])
        attention(torch.randn(2, 40, 24)).square().sum().backward()
        for name, parameter in attention.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
            kernel = name.startswith("kernel") or name == "log_rate_H"
            kind = "kernel" if kernel else "norm" if "norm" in name else "matrix"
            assert parameter.kind == kind, name


def test_activation_checkpointing_gives_the_same_gradient() -> None:
    attention = some_layer(kernel="ode")
    x = torch.randn(1, 40, 24)
    plain = torch.autograd.grad(attention(x).sum(), list(attention.parameters()))
    again = checkpoint(attention, x, use_reentrant=False).sum()
    for got, want in zip(
        torch.autograd.grad(again, list(attention.parameters())), plain, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_decay_starts_in_its_range_and_is_reported() -> None:
    attention = some_layer(decay_range=(4.0, 256.0))
    attention(torch.randn(1, 4, 24))
    torch.testing.assert_close(attention.metrics["time_constant"], torch.tensor([4.0, 32.0, 256.0]))


def test_rotation_depends_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for shift in (0, 37):
        turned = [
            rotate(x, rotary_angles(shift + at, 1, 8, 100.0, x.device))
            for x, at in ((q, 5), (k, 2))
        ]
        scores.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)
    assert (scores[0] - (q * k).sum()).abs() > 1e-3


def test_rms_norm_computes_in_fp32() -> None:
    norm = RMSNorm(64, eps=1e-5).bfloat16()
    x = (torch.randn(5, 64) * 1e3).bfloat16()
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    got = norm(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16())
