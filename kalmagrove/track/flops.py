"""Floating-point operations of a token, counted from the configuration.

`Meters` divides model FLOPs by the machine's peak (model-FLOPs utilisation); the dry run prints
them. A multiply-add is 2 FLOPs. Norms, activations and softmax are left out, as is the custom.

Letters: D model width, H heads, T tokens of a row, M edges, R rank, k edges kept, G groves.
"""

from typing import NamedTuple

from kalmagrove.config import KAN, Edge, Model
from kalmagrove.config.counts import ada_head_dim, head_ranks


class Row(NamedTuple):
    """Forward FLOPs of one token in one component.

    model: the algorithm's own need: kept edges and chosen groves or experts only, linear attention
    by its recurrence, causal attention over the tokens it may see. hardware: what the reference
    path computes: every edge of a chosen grove, then masked (on GPU; on CPU it sorts
    tokens by edge and runs the kept ones); attention within whole chunks.
    """

    component: str
    model: float
    hardware: float


class Flops(NamedTuple):
    """Of a whole model, per token."""

    rows: tuple[Row, ...]

    @property
    def forward(self) -> float:
        return sum(row.model for row in self.rows)

    @property
    def training(self) -> float:
        """Model FLOPs of a training step: the backward pass of a product is two products."""
        return 3 * self.forward


def flops_per_token(model: Model, seq_len: int) -> Flops:
    """FLOPs of one token, averaged over the positions of a row of `seq_len`.

    `model.vocab_size` must be known. Document borders inside a row are not counted: with
    `data.document_aware` softmax attention needs less.
    """
    assert model.vocab_size is not None, "the tokenizer decides the vocabulary"
    rows: dict[str, Row] = {}
    for layer in range(model.layers):
        for row in (_attention(model, layer, seq_len), _ffn(model, layer)):
            old = rows.get(row.component, Row(row.component, 0.0, 0.0))
            rows[row.component] = Row(
                row.component, old.model + row.model, old.hardware + row.hardware
            )
    logits = 2.0 * model.d_model * model.vocab_size
    return Flops((*rows.values(), Row("logits", logits, logits)))


def _attention(model: Model, layer: int, seq_len: int) -> Row:
    kind = model.attention_kind(layer)
    name = f"attention {kind}"
    if kind == "ada":
        return Row(name, *_ada(model, layer, seq_len))
    total = _softmax(model, seq_len) if kind == "softmax" else _mla(model, seq_len)
    return Row(name, total, total)


def _ada(model: Model, layer: int, seq_len: int) -> tuple[float, float]:
    """Projections, key kernel, and the state: 2 r v to write k v^T, 2 r v to read with q."""
    ada, D = model.attention.ada, model.d_model
    ranks, v = head_ranks(model, layer), ada_head_dim(model)
    values, channels = ada.heads * v, sum(ranks)
    shared = 2.0 * D * (2 * channels + (2 + ada.output_gate) * values)
    if ada.kernel != "none":  # reading taps off the ODE is paid once a batch, not a token
        shared += 2.0 * ada.taps * channels
    state = 4.0 * channels * v
    width = max(ranks)  # heads are padded to the widest
    form = ada.form
    if form == "auto":
        form = "quadratic" if seq_len <= 2 * ada.chunk else "chunked"
    run = {
        "quadratic": 2.0 * ada.heads * seq_len * (width + v),
        "chunked": ada.heads * (2.0 * min(ada.chunk, seq_len) * (width + v) + 4.0 * width * v),
        "recurrent": 4.0 * ada.heads * width * v,
    }
    return shared + state, shared + run[form]


def _softmax(model: Model, seq_len: int) -> float:
    soft, D = model.attention.softmax, model.d_model
    width = soft.head_dim or D // soft.heads
    projections = 4.0 * D * width * (soft.heads + soft.kv_heads)
    return projections + 4.0 * soft.heads * width * _context(seq_len)


def _mla(model: Model, seq_len: int) -> float:
    mla, D = model.attention.mla, model.d_model
    key = mla.nope_dim + mla.rope_dim
    queries = mla.heads * key
    weights = D * queries if mla.q_rank is None else mla.q_rank * (D + queries)
    weights += D * (mla.kv_rank + mla.rope_dim)
    weights += mla.kv_rank * mla.heads * (mla.nope_dim + mla.v_dim) + mla.heads * mla.v_dim * D
    return 2.0 * weights + 2.0 * mla.heads * (key + mla.v_dim) * _context(seq_len)


def _context(seq_len: int) -> float:
    """Tokens a causal attention sees, itself included, averaged over the row."""
    return (seq_len + 1) / 2


def _ffn(model: Model, layer: int) -> Row:
    kind, D = model.ffn_kind(layer), model.d_model
    name = f"ffn {kind}"
    if kind == "dense":
        total = 6.0 * D * model.ffn.dense.hidden
        return Row(name, total, total)
    if kind == "moe":
        moe = model.ffn.moe
        total = 2.0 * D * moe.experts + 6.0 * D * (moe.top_k * moe.hidden + moe.shared_hidden)
        return Row(name, total, total)
    if kind == "kan":
        return Row(name, *_kan(model.ffn.kan, D))
    grove = model.ffn.grove
    router = 2.0 * grove.groves * D * (grove.edge_manifold + 1)
    needed, run = _kan(grove.kan, D)
    return Row(
        name,
        router + (grove.top_g + grove.shared) * needed,
        router + (grove.top_g + grove.shared) * run,
    )


def _kan(kan: KAN, D: int) -> tuple[float, float]:
    """W_e x and all edge functions, then V_i x and U_i^T of kept edges; the reference: of all."""
    edges = kan.edges * (2.0 * D + _edge(kan.edge))
    pair = 4.0 * kan.rank * D
    return edges + kan.top_k * pair, edges + kan.edges * pair


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
