"""Parameters of a model, counted from its configuration alone, and those that a rank holds.

The dry run and the cost model read it before anything is built; a test compares it with the
modules. `tp` is the number of tensor-parallel ranks that share a layer; 1: all of it.
Letters: D model width, H heads, M edges, R rank, G groves, k edges kept, g groves chosen.
"""

from typing import NamedTuple

from kalmagrove.config.model import ADA, KAN, MLA, Edge, Grove, Model, MoE, Softmax


class Count(NamedTuple):
    """Parameters: all, and those that the output of one token depends on being read.

    Routers and edge functions are read whole, for every token; of experts, groves and kept edges
    only the chosen ones. Embedding and head count whole, as is the custom.
    """

    total: int
    active: int

    def __add__(self, other: object) -> "Count":
        assert isinstance(other, Count)
        return Count(self.total + other.total, self.active + other.active)


class Held(NamedTuple):
    """Parameters whose slices a rank holds, before ZeRO shards them over the ranks of the same."""

    dense: int  # with dp x cp ranks
    routed: int  # groves and experts: with processes / ep ranks


class Row(NamedTuple):
    component: str
    total: int
    active: int


def parameter_table(model: Model) -> list[Row]:
    """One row for each component and kind, in the order of the model; the sums are the whole model.

    `model.vocab_size` must be known.
    """
    assert model.vocab_size is not None, "the tokenizer decides the vocabulary"
    table = model.vocab_size * model.d_model
    rows = {"embedding": Count(table, table)}
    for layer in range(model.layers):
        attention, ffn = model.attention_kind(layer), model.ffn_kind(layer)
        for name, count in (
            (f"attention {attention}", attention_count(model, layer)),
            (f"ffn {ffn}", ffn_count(model, layer)),
        ):
            rows[name] = rows.get(name, Count(0, 0)) + count
    norms = (2 * model.layers + 1) * model.d_model
    rows["norms"] = Count(norms, norms)
    if not model.tie_embeddings:
        rows["head"] = Count(table, table)
    return [Row(name, *count) for name, count in rows.items()]


def parameter_count(model: Model) -> Count:
    """The whole model."""
    rows = parameter_table(model)
    return Count(sum(row.total for row in rows), sum(row.active for row in rows))


def held_parameters(model: Model, tp: int, ep: int) -> Held:
    """What one of tp tensor-parallel and ep expert-parallel ranks holds.

    Where the heads of an ADA layer have different ranks, the mean over the tensor-parallel ranks.
    """
    assert model.vocab_size is not None, "the tokenizer decides the vocabulary"
    tables = 1 if model.tie_embeddings else 2
    whole = (2 * model.layers + 1) * model.d_model + tables * model.vocab_size // tp * model.d_model
    routed = 0
    for layer in range(model.layers):
        parts = routed_count(model, layer)
        whole += attention_count(model, layer, tp).total + ffn_count(model, layer, tp).total - parts
        routed += parts
    return Held(whole, routed // ep)


def attention_count(model: Model, layer: int, tp: int = 1) -> Count:
    """The attention of one layer, its inner norms included."""
    kind, D = model.attention_kind(layer), model.d_model
    if kind == "ada":
        count = _ada(model.attention.ada, D, sum(head_ranks(model, layer)), tp)
    elif kind == "softmax":
        count = _softmax(model.attention.softmax, D, tp)
    else:
        count = _mla(model.attention.mla, D, tp)
    return Count(count, count)


def ffn_count(model: Model, layer: int, tp: int = 1) -> Count:
    """The feed-forward of one layer, with all its groves or experts."""
    kind, D = model.ffn_kind(layer), model.d_model
    if kind == "dense":
        count = 3 * D * model.ffn.dense.hidden // tp
        return Count(count, count)
    if kind == "moe":
        return _moe(model.ffn.moe, D, tp)
    return kan_count(model.ffn.kan, D, tp) if kind == "kan" else _grove(model.ffn.grove, D, tp)


def routed_count(model: Model, layer: int) -> int:
    """The groves or experts of one layer, without router and shared one."""
    kind, ffn, D = model.ffn_kind(layer), model.ffn, model.d_model
    if kind == "moe":
        return ffn.moe.experts * 3 * D * ffn.moe.hidden
    return ffn.grove.groves * kan_count(ffn.grove.kan, D).total if kind == "grove" else 0


def head_ranks(model: Model, layer: int) -> tuple[int, ...]:
    """Widths of the query/key heads of an ADA layer."""
    ada = model.attention.ada
    if isinstance(ada.qk_rank, tuple):
        return ada.qk_rank[sum(model.attention_kind(i) == "ada" for i in range(layer))]
    return (ada.qk_rank or ada_head_dim(model),) * ada.heads


def ada_head_dim(model: Model) -> int:
    """Width of an ADA value head."""
    return model.attention.ada.head_dim or model.d_model // model.attention.ada.heads


def kan_count(kan: KAN, D: int, tp: int = 1) -> Count:
    """One tensorized KAN layer: W_e, edge functions, and (split along the rank) V and U."""
    edges = kan.edges * (D + edge_size(kan.edge))
    pair = 2 * kan.rank * D // tp
    return Count(edges + kan.edges * pair, edges + kan.top_k * pair)


def edge_size(edge: Edge) -> int:
    """Parameters of one edge function: basis coefficients, and the scale of a base."""
    return basis_size(edge) + (edge.base != "none")


def basis_size(edge: Edge) -> int:
    """Coefficients of the basis of one edge function."""
    sizes = {
        "bspline": edge.grid + edge.degree,
        "fourier": 2 * edge.degree + 1,
        "rational": 2 * edge.degree + 1,
        "rbf": edge.grid,
        "piecewise_linear": edge.grid + 1,
    }
    return sizes.get(edge.basis, edge.degree + 1)


def _ada(ada: ADA, D: int, all_channels: int, tp: int) -> int:
    width = ada.head_dim or D // ada.heads
    heads, channels = ada.heads // tp, all_channels // tp
    values = heads * width
    count = 2 * D * channels + (2 + ada.output_gate) * D * values
    if ada.kernel == "cnn":
        count += channels * ada.taps
    elif ada.kernel == "ode":  # couples all channels
        count += 2 * all_channels * (1 + ada.ode_hidden) + 2 * ada.ode_hidden
    return count + width * ada.output_norm + heads * (ada.decay == "learned")


def _softmax(soft: Softmax, D: int, tp: int) -> int:
    width = soft.head_dim or D // soft.heads
    return 2 * D * width * (soft.heads + soft.kv_heads) // tp + 2 * width * soft.qk_norm


def _mla(mla: MLA, D: int, tp: int) -> int:
    heads = mla.heads // tp
    queries = heads * (mla.nope_dim + mla.rope_dim)
    count = D * queries if mla.q_rank is None else mla.q_rank * (D + queries + 1)
    count += D * (mla.kv_rank + mla.rope_dim) + mla.kv_rank
    count += mla.kv_rank * heads * (mla.nope_dim + mla.v_dim)
    return count + heads * mla.v_dim * D


def _moe(moe: MoE, D: int, tp: int) -> Count:
    always = moe.experts * D + 3 * D * moe.shared_hidden // tp
    expert = 3 * D * moe.hidden
    return Count(always + moe.experts * expert, always + moe.top_k * expert)


def _grove(grove: Grove, D: int, tp: int) -> Count:
    router = grove.groves * (grove.edge_manifold * D + D + 1)
    one, shared = kan_count(grove.kan, D), kan_count(grove.kan, D, tp)
    return Count(
        router + grove.groves * one.total + grove.shared * shared.total,
        router + grove.top_g * one.active + grove.shared * shared.active,
    )
