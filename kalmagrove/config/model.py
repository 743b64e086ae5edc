"""What the model is: sizes, attention and feed-forward kinds, and every switch of the architecture.

Each kind keeps its sizes in a block of its own, so that `ffn=dense` or `attention=softmax` is a
whole comparison: the pattern changes, sizes chosen for a fair comparison are already there.
"""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from kalmagrove.config.base import Section
from kalmagrove.config.errors import ConfigError

Basis = Literal[
    "bspline",
    "chebyshev1",
    "chebyshev2",
    "legendre",
    "hermite",
    "fourier",
    "rational",
    "rbf",
    "piecewise_linear",
]
AttentionKind = Literal["ada", "softmax", "mla"]
FFNKind = Literal["dense", "moe", "kan", "grove"]
Backend = Literal["auto", "reference", "triton", "cuda"]


class Init(Section):
    """Normal(0, std); into the residual stream divided by sqrt(2 * layers) if depth_scaled."""

    std: PositiveFloat = 0.02
    depth_scaled: bool = True


class ADA(Section):
    """Arnold Diffusion Attention (KalmaGrove paper, section 3.2) and its switches."""

    heads: PositiveInt
    head_dim: PositiveInt | None = None  # width of a value head; null: d_model / heads
    qk_rank: PositiveInt | tuple[tuple[PositiveInt, ...], ...] | None = None
    # ^ width of a query/key head: null = head_dim; a number; or a table [ADA layer][head] of ranks
    kernel: Literal["cnn", "ode", "none"] = "cnn"  # the key kernel kappa
    taps: PositiveInt = 4
    kernel_activation: Literal["none", "silu"] = "none"
    ode_hidden: PositiveInt = 16
    decay: Literal["learned", "fixed", "none"] = "learned"
    decay_range: tuple[PositiveFloat, PositiveFloat] = (4.0, 512.0)
    # ^ time constants in tokens of the first and last head, geometrically spaced
    rope: bool = True
    rope_theta: PositiveFloat = 10000.0
    qk_norm: bool = True
    output_norm: bool = True  # per-head RMSNorm
    output_gate: bool = True
    form: Literal["auto", "quadratic", "chunked", "recurrent"] = "auto"
    # ^ auto: quadratic up to two chunks of tokens, chunked above; all compute the same
    chunk: PositiveInt = 64


class Softmax(Section):
    """Grouped-query softmax attention through torch SDPA."""

    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt | None = None  # null: d_model / heads
    rope: bool = True
    rope_theta: PositiveFloat = 10000.0
    qk_norm: bool = True


class MLA(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    heads: PositiveInt
    kv_rank: PositiveInt  # width of the compressed key/value latent
    q_rank: PositiveInt | None = None  # null: queries are not compressed
    nope_dim: PositiveInt  # width of a head's part without position
    rope_dim: PositiveInt  # width of a head's rotary part (keys share one)
    v_dim: PositiveInt
    rope_theta: PositiveFloat = 10000.0


class Attention(Section):
    """`pattern` is repeated over the layers: [ada, ada, ada, softmax] is three ADA to one."""

    pattern: tuple[AttentionKind, ...] = Field(min_length=1)
    ada: ADA
    softmax: Softmax
    mla: MLA


class Edge(Section):
    """The learnable univariate function phi of an edge (KalmaGrove paper, section 3.1)."""

    basis: Basis = "bspline"
    degree: PositiveInt = 3  # of the spline or polynomial; harmonics of a Fourier series
    grid: PositiveInt = 8  # intervals (bspline, piecewise_linear) or centres (rbf)
    range: tuple[float, float] = (-3.0, 3.0)  # of pre-activations
    base: Literal["silu", "identity", "none"] = "silu"  # added beside the basis
    init_scale: float = Field(
        0.1, ge=0
    )  # size of the basis part at the start, relative to the base
    refit_above: float | None = Field(0.05, ge=0, lt=1)
    # ^ share of pre-activations out of range above which the grid is refitted; null: never


class KAN(Section):
    """One tensorized KAN layer: M edges, k kept, rank R."""

    edges: PositiveInt
    top_k: PositiveInt = 8
    rank: PositiveInt
    inner_silu: bool = True
    routing: Literal["hard", "straight_through"] = "hard"
    routing_width: PositiveFloat = 0.1  # of the surrogate gradient around the threshold
    edge: Edge = Edge()


class Grove(Section):
    """Several KAN layers, a few chosen for each token (KalmaGrove paper, section 2.3)."""

    groves: PositiveInt
    top_g: PositiveInt
    edge_manifold: PositiveInt = 16  # d_E, rows of E_i
    shared: bool = True  # one more grove that every token passes
    bias_rate: float = Field(1e-3, ge=0)  # step of the load-balancing selection bias; 0: off
    z_loss: float = Field(1e-3, ge=0)
    capacity: PositiveFloat | None = None
    # ^ a grove takes at most this times its even share of a rank's choices; null: none is dropped
    kan: KAN


class Dense(Section):
    """SwiGLU."""

    hidden: PositiveInt


class MoE(Section):
    """DeepSeek-V3 experts (arXiv:2412.19437, 2.1.2): sigmoid router, selection bias, shared one."""

    experts: PositiveInt
    top_k: PositiveInt
    hidden: PositiveInt  # of one expert
    shared_hidden: int = Field(0, ge=0)  # of the shared expert; 0: none
    scale: PositiveFloat = 1.0  # of the routed output
    bias_rate: float = Field(1e-3, ge=0)
    z_loss: float = Field(0.0, ge=0)
    capacity: PositiveFloat | None = None  # see Grove


class FFN(Section):
    """`pattern` is repeated over the layers, as for attention."""

    pattern: tuple[FFNKind, ...] = Field(min_length=1)
    dense: Dense
    moe: MoE
    kan: KAN
    grove: Grove


class Model(Section):
    """The whole model. `vocab_size` null means: the tokenizer's, rounded up to `vocab_multiple`."""

    name: str
    d_model: PositiveInt
    layers: PositiveInt
    vocab_size: PositiveInt | None = None
    vocab_multiple: PositiveInt = 64
    tie_embeddings: bool = True
    norm_eps: PositiveFloat = 1e-5
    logit_z_loss: float = Field(0.0, ge=0)
    init: Init = Init()
    attention: Attention
    ffn: FFN
    backend: Backend = "auto"

    def attention_kind(self, layer: int) -> AttentionKind:
        return self.attention.pattern[layer % len(self.attention.pattern)]

    def ffn_kind(self, layer: int) -> FFNKind:
        return self.ffn.pattern[layer % len(self.ffn.pattern)]

    def layer_kinds(self) -> list[tuple[AttentionKind, FFNKind]]:
        """Of every layer."""
        return [(self.attention_kind(i), self.ffn_kind(i)) for i in range(self.layers)]

    def padded_vocab(self, tokens: int) -> int:
        """The embedding's rows for a tokenizer of `tokens` entries."""
        return -(-tokens // self.vocab_multiple) * self.vocab_multiple

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        kinds = {self.attention_kind(i) for i in range(self.layers)}
        if "ada" in kinds:
            self._check_ada()
        if "softmax" in kinds:
            self._check_softmax()
        if "mla" in kinds and self.attention.mla.rope_dim % 2:
            raise ConfigError(
                "model.attention.mla.rope_dim",
                self.attention.mla.rope_dim,
                "must be even (rotary pairs)",
                f"try {self.attention.mla.rope_dim + 1}",
            )
        ffns = {self.ffn_kind(i) for i in range(self.layers)}
        if "kan" in ffns:
            _check_kan("model.ffn.kan", self.ffn.kan)
        if "grove" in ffns:
            grove = self.ffn.grove
            _check_kan("model.ffn.grove.kan", grove.kan)
            _at_most("model.ffn.grove.top_g", grove.top_g, "groves", grove.groves)
        if "moe" in ffns:
            _at_most("model.ffn.moe.top_k", self.ffn.moe.top_k, "experts", self.ffn.moe.experts)
        return self

    def _check_ada(self) -> None:
        ada, key = self.attention.ada, "model.attention.ada"
        if ada.head_dim is None:
            _divides(f"{key}.heads", ada.heads, "model.d_model", self.d_model)
        width = ada.head_dim or self.d_model // ada.heads
        if isinstance(ada.qk_rank, tuple):
            ada_layers = sum(self.attention_kind(i) == "ada" for i in range(self.layers))
            if len(ada.qk_rank) != ada_layers or any(len(r) != ada.heads for r in ada.qk_rank):
                raise ConfigError(
                    f"{key}.qk_rank",
                    "[...]",
                    f"must hold one row for each of the {ada_layers} ADA layers, "
                    f"each with heads={ada.heads} ranks",
                    "or give one number",
                )
            ranks = [r for row in ada.qk_rank for r in row]
        else:
            ranks = [ada.qk_rank or width]
        if ada.rope and any(r % 2 for r in ranks):
            odd = next(r for r in ranks if r % 2)
            raise ConfigError(
                f"{key}.qk_rank" if ada.qk_rank else f"{key}.head_dim",
                odd,
                "must be even with rope=true (rotary pairs)",
                f"try {odd + 1} or {key}.rope=false",
            )
        low, high = ada.decay_range
        if ada.decay != "none" and low > high:
            raise ConfigError(
                f"{key}.decay_range", [low, high], "must be ascending", f"try [{high},{low}]"
            )

    def _check_softmax(self) -> None:
        soft, key = self.attention.softmax, "model.attention.softmax"
        if soft.head_dim is None:
            _divides(f"{key}.heads", soft.heads, "model.d_model", self.d_model)
        _divides(f"{key}.kv_heads", soft.kv_heads, f"{key}.heads", soft.heads)
        width = soft.head_dim or self.d_model // soft.heads
        if soft.rope and width % 2:
            raise ConfigError(
                f"{key}.head_dim",
                width,
                "must be even with rope=true (rotary pairs)",
                f"try {width + 1}",
            )


def _check_kan(key: str, kan: KAN) -> None:
    _at_most(f"{key}.top_k", kan.top_k, "edges", kan.edges)
    low, high = kan.edge.range
    if low >= high:
        raise ConfigError(f"{key}.edge.range", [low, high], "must be ascending", "try [-3,3]")


def _at_most(key: str, value: int, other: str, limit: int) -> None:
    if value > limit:
        home = key.rsplit(".", 1)[0]
        raise ConfigError(
            key, value, f"must be at most {home}.{other}={limit}", f"try {min(8, limit)}"
        )


def _divides(key: str, value: int, other: str, whole: int) -> None:
    if whole % value:
        divisors = [n for n in range(1, whole + 1) if whole % n == 0]
        near = [max(n for n in divisors if n < value), *[n for n in divisors if n > value][:1]]
        options = " or ".join(map(str, near))
        raise ConfigError(key, value, f"must divide {other}={whole}", f"try {options}")
