"""Floating-point operations of a token, counted from the configuration.

`Meters` divides model FLOPs by the machine's peak (model-FLOPs utilisation, MFU) and hardware FLOPs
too (HFU); the dry run and `kalmagrove plan` print them. A multiply-add is 2 FLOPs. Norms,
activations and softmax are left out, as is the custom. docs/cost.md has the conventions.

Letters: D model width, H heads, T tokens of a row, M edges, R rank, k edges kept, G groves.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from kalmagrove.config import KAN, Edge, Model
from kalmagrove.config.counts import ada_head_dim, head_ranks, parameter_count

# What the layers run. kernels: those of `kalmagrove_kernels` on a GPU. reference: PyTorch on a GPU,
# which computes every edge and masks. cpu: PyTorch on a CPU, which sorts tokens by edge.
Path = Literal["kernels", "reference", "cpu"]
KERNEL_CHUNK = 64  # tokens that ADA's kernels multiply at once
SDPA_BACKWARD = 2.5  # of the forward pass: it makes the scores again


def path_of(backend: str, gpu: bool) -> Path:
    """What `model.backend` runs there; `auto` has kernels on every GPU that Triton knows."""
    if not gpu:
        return "cpu"
    return "reference" if backend == "reference" else "kernels"


class Row(NamedTuple):
    """FLOPs of one token in one component.

    model: the algorithm's own need in the forward pass: kept edges and chosen groves or experts
    only, linear attention by its recurrence, causal attention over the tokens it may see.
    forward, backward: what the path that runs computes: attention within whole chunks, with
    `reference` every edge of a chosen grove.
    """

    component: str
    model: float
    forward: float
    backward: float

    def plus(self, other: "Row") -> "Row":
        numbers = (a + b for a, b in zip(self[1:], other[1:], strict=True))
        return Row(self.component, *numbers)


class Flops(NamedTuple):
    """Of a whole model, per token. The last row is that of the logits."""

    rows: tuple[Row, ...]

    @property
    def forward(self) -> float:
        return sum(row.model for row in self.rows)

    @property
    def backward(self) -> float:
        """Of the algorithm: the backward pass of a product is two products."""
        return 2 * self.forward

    @property
    def training(self) -> float:
        """Model FLOPs of a training step."""
        return self.forward + self.backward

    def hardware(self, checkpointing: bool) -> float:
        """What a training step computes; activation checkpointing repeats the blocks' forward."""
        repeated = sum(row.forward for row in self.rows[:-1]) if checkpointing else 0.0
        return repeated + sum(row.forward + row.backward for row in self.rows)


def flops_per_token(model: Model, seq_len: int, path: Path = "reference") -> Flops:
    """FLOPs of one token, averaged over the positions of a row of `seq_len`.

    `model.vocab_size` must be known. Document borders inside a row are not counted: with
    `data.document_aware` softmax attention needs less.
    """
    assert model.vocab_size is not None, "the tokenizer decides the vocabulary"
    rows: dict[str, Row] = {}
    for layer in range(model.layers):
        for row in (*_attention(model, layer, seq_len, path), *_ffn(model, layer, path)):
            old = rows.get(row.component)
            rows[row.component] = row if old is None else old.plus(row)
    logits = 2.0 * model.d_model * model.vocab_size
    return Flops((*rows.values(), _product("logits", logits)))


def dense_twin(model: Model) -> Model:
    """The same backbone with softmax attention and SwiGLU, of as many parameters in all (the width
    is rounded): what `FLOPs per parameter` is compared with.
    """
    soft = model.attention.model_copy(update={"pattern": ("softmax",)})

    def of(hidden: int) -> Model:
        dense = model.ffn.dense.model_copy(update={"hidden": hidden})
        ffn = model.ffn.model_copy(update={"pattern": ("dense",), "dense": dense})
        return model.model_copy(update={"attention": soft, "ffn": ffn})

    missing = parameter_count(model).total - parameter_count(of(0)).total
    return of(max(1, round(missing / (3 * model.d_model * model.layers))))


def _product(component: str, flops: float) -> Row:
    return Row(component, flops, flops, 2 * flops)


def _attention(model: Model, layer: int, seq_len: int, path: Path) -> Iterator[Row]:
    kind, D = model.attention_kind(layer), model.d_model
    if kind == "ada":
        yield from _ada(model, layer, seq_len, path)
        return
    if kind == "softmax":
        soft = model.attention.softmax
        width = soft.head_dim or D // soft.heads
        projections = 4.0 * D * width * (soft.heads + soft.kv_heads)
        scores = 4.0 * soft.heads * width * _context(seq_len)
    else:
        projections = 2.0 * _mla_weights(model)
        mla = model.attention.mla
        scores = 2.0 * mla.heads * (mla.nope_dim + mla.rope_dim + mla.v_dim) * _context(seq_len)
    yield _product(f"attention {kind}", projections)
    yield Row(f"{kind} scores", scores, scores, SDPA_BACKWARD * scores)


def _ada(model: Model, layer: int, seq_len: int, path: Path) -> Iterator[Row]:
    """Projections, key kernel, and the state: 2 r v to write k v^T, 2 r v to read with q."""
    ada, D = model.attention.ada, model.d_model
    ranks, v = head_ranks(model, layer), ada_head_dim(model)
    values, channels = ada.heads * v, sum(ranks)
    yield _product("attention ada", 2.0 * D * (2 * channels + (2 + ada.output_gate) * values))
    if ada.kernel != "none":  # reading taps off the ODE is paid once a batch, not a token
        yield _product("ada key kernel", 2.0 * ada.taps * channels)
    run, kernels = _ada_sums(model, max(ranks), seq_len, path)  # heads are padded to the widest
    yield Row("ada sums", 4.0 * channels * v, run, (3 if kernels else 2) * run)


def _ada_sums(model: Model, r: int, seq_len: int, path: Path) -> tuple[float, bool]:
    """FLOPs of the sums over tokens as they are run, and whether kernels run them: these make each
    of three gradients as they make the output.
    """
    ada, v = model.attention.ada, ada_head_dim(model)
    if path == "kernels" and ada.form == "auto":
        return ada.heads * (2.0 * min(KERNEL_CHUNK, seq_len) * (r + v) + 4.0 * r * v), True
    form = ada.form
    if form == "auto":
        form = "quadratic" if seq_len <= 2 * ada.chunk else "chunked"
    if form == "quadratic":
        return 2.0 * ada.heads * seq_len * (r + v), False
    if form == "recurrent":
        return 4.0 * ada.heads * r * v, False
    chunk = min(ada.chunk, seq_len)
    chunks = -(-seq_len // chunk)
    # All chunks but the last write a state, one [chunks, chunks] matrix combines them.
    states = r * v * (2.0 * (chunks - 1) / chunks + 2.0 * chunks / chunk + 2.0)
    return ada.heads * (2.0 * chunk * (r + v) + (states if chunks > 1 else 0.0)), False


def _mla_weights(model: Model) -> int:
    mla, D = model.attention.mla, model.d_model
    queries = mla.heads * (mla.nope_dim + mla.rope_dim)
    weights = D * queries if mla.q_rank is None else mla.q_rank * (D + queries)
    weights += D * (mla.kv_rank + mla.rope_dim)
    return (
        weights + mla.kv_rank * mla.heads * (mla.nope_dim + mla.v_dim) + mla.heads * mla.v_dim * D
    )


def _context(seq_len: int) -> float:
    """Tokens a causal attention sees, itself included, averaged over the row."""
    return (seq_len + 1) / 2


def _ffn(model: Model, layer: int, path: Path) -> Iterator[Row]:
    kind, D, ffn = model.ffn_kind(layer), model.d_model, model.ffn
    if kind == "dense":
        yield _product("ffn dense", 6.0 * D * ffn.dense.hidden)
    elif kind == "moe":
        moe = ffn.moe
        yield _product("routers", 2.0 * D * moe.experts)
        yield _product("ffn moe", 6.0 * D * (moe.top_k * moe.hidden + moe.shared_hidden))
    elif kind == "kan":
        yield from _kan("ffn kan", ffn.kan, D, 1, path)
    else:
        grove = ffn.grove
        yield _product("routers", 2.0 * grove.groves * D * (grove.edge_manifold + 1))
        yield from _kan("ffn grove", grove.kan, D, grove.top_g + grove.shared, path)


def _kan(component: str, kan: KAN, D: int, layers: int, path: Path) -> Iterator[Row]:
    """W_e x, then V_i x and U_i^T of kept edges (of all edges where they are masked); functions."""
    every = path == "reference" or kan.routing != "hard"
    edges, pair = 2.0 * kan.edges * D, 4.0 * kan.rank * D
    needed = layers * (edges + kan.top_k * pair)
    run = layers * (edges + (kan.edges if every else kan.top_k) * pair)
    yield Row(component, needed, run, 2 * run)
    yield _product("edge functions", layers * kan.edges * _edge(kan.edge))


def _edge(edge: Edge) -> float:
    """One evaluation of an edge function, about: its basis by recurrence, and the sum over it.

    A B-spline has degree + 1 functions that are not zero, each level of de Boor's recurrence costs
    3 FLOPs a function; three-term recurrences cost 3 a term; other families about 4 a function.
    """
    if edge.basis == "bspline":
        return 3.0 * edge.degree * (edge.degree + 1) + 2.0 * (edge.degree + 1)
    if edge.basis == "piecewise_linear":
        return 6.0
    if edge.basis == "rbf":
        return 6.0 * edge.grid
    terms = 2 * edge.degree + 1 if edge.basis in ("fourier", "rational") else edge.degree + 1
    return 5.0 * terms
