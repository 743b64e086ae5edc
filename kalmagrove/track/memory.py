"""An estimate of the memory a device needs, before anything is built.

`kalmagrove train --dry-run` prints it. Weights, gradients and optimizer states follow from the
layout and the ZeRO stage (arXiv:1910.02054, section 3) and are near exact; activations are a rough
count of the tensors that the reference modules keep for the backward pass, good to perhaps a factor
of two.
"""

from typing import NamedTuple

from kalmagrove.config import KAN, Parallel, Run
from kalmagrove.config.counts import ada_head_dim, head_ranks, held_parameters


class Row(NamedTuple):
    component: str
    bytes: int


def memory_estimate(run: Run, processes: int, precision: str) -> list[Row]:
    """Bytes on one device, by component.

    Args:
        run: with `model.vocab_size` known.
        processes: of the run; its layout goes over them (`Run.check_world`).
        precision: fp32 or bf16; `engine.precision` with `auto` resolved.
    """
    model, layout, stage = run.model, run.parallel, run.zero.stage
    held = held_parameters(model, layout.tp, layout.ep)
    same_dense, same_routed = processes // layout.tp, processes // layout.ep

    def state(size: int, sharded_from: int) -> int:
        """Bytes of `size` a parameter, sharded from that stage of ZeRO on."""
        if stage < sharded_from:
            return size * (held.dense + held.routed)
        return size * held.dense // same_dense + size * held.routed // same_routed

    size = 2 if precision == "bf16" else 4
    accumulator = 4 if precision == "bf16" else 0  # gradients are summed in fp32
    tokens = run.batch.micro * run.data.seq_len // layout.cp
    layers = [round(layer_floats(run, i) * size * tokens) for i in range(model.layers)]
    activations = sum(layers)
    if run.engine.activation_checkpointing:
        # Each block keeps its input, part of the stream; one block at a time is computed again.
        kept = model.layers * model.d_model * size * tokens // _stream_ranks(layout)
        activations = kept + max(layers)
    assert model.vocab_size is not None
    # Logits, their fp32 copy, its log-softmax, and the gradient.
    logits = tokens * model.vocab_size // layout.tp * (size + 4 + 4 + 4)
    return [
        Row("parameters", state(size, 3)),
        Row("gradients", state(size + accumulator, 2)),
        Row("optimizer states", state(_state_bytes(run, precision), 1)),
        Row("activations", activations),
        Row("logits and loss", logits),
    ]


def _state_bytes(run: Run, precision: str) -> int:
    """Bytes a parameter: fp32 master weights (ZeRO keeps them at any precision) and the moments."""
    moments = {"adamw": 8, "muon": 8, "sgd": 4 if run.optim.momentum else 0}[run.optim.kind]
    master = 0 if run.zero.stage == 0 and precision == "fp32" else 4
    return master + moments


def _stream_ranks(layout: Parallel) -> int:
    """Ranks over which the residual stream of a piece of the rows is split."""
    return layout.tp if layout.sequence else 1


def layer_floats(run: Run, layer: int) -> float:
    """Numbers that one block keeps for a token of this rank's piece, in the weights' precision."""
    model, layout = run.model, run.parallel
    D, tp, cp, kind = model.d_model, layout.tp, layout.cp, model.attention_kind(layer)
    # Residual sums and norms; inputs of the projections, which every rank has whole.
    count: float = 4 * D / _stream_ranks(layout) + 2 * D
    if kind == "ada":
        ada, v = model.attention.ada, ada_head_dim(model)
        width = ada.heads * max(head_ranks(model, layer))
        piece = run.data.seq_len // cp
        # q and k projected, convolved, normed, rotated (in fp32: twice); v, output, normed, gated
        inner = 2 * 2 * 3 * width + 2 * 5 * ada.heads * v
        form = ada.form
        if form == "auto":
            form = "quadratic" if piece <= 2 * ada.chunk else "chunked"
        span = piece if form == "quadratic" else min(ada.chunk, piece)
        inner += 2 * 2 * ada.heads * span if form != "recurrent" else 2 * width * v
    elif kind == "softmax":
        soft = model.attention.softmax
        head = soft.head_dim or D // soft.heads
        # Keys and values of other ranks' tokens are gathered.
        inner = head * (6 * (soft.heads + soft.kv_heads) + 2 * soft.kv_heads * (cp - 1))
    else:
        mla = model.attention.mla
        key = mla.nope_dim + mla.rope_dim
        count += 2 * (mla.q_rank or 0) + (cp + 2) * (mla.kv_rank + mla.rope_dim)
        inner = mla.heads * (4 * key + 3 * mla.v_dim + (cp - 1) * (key + mla.v_dim))
    return count + inner / tp + _ffn_floats(run, layer)


def _ffn_floats(run: Run, layer: int) -> float:
    """Dense and shared widths are split over the tp ranks; routed tokens are too."""
    kind, ffn, tp = run.model.ffn_kind(layer), run.model.ffn, run.parallel.tp
    stream = _stream_ranks(run.parallel)
    if kind == "dense":
        return 4 * ffn.dense.hidden / tp
    if kind == "moe":
        hidden = ffn.moe.top_k * ffn.moe.hidden + ffn.moe.shared_hidden
        return 4 * (hidden + ffn.moe.experts) / tp
    if kind == "kan":
        return _kan_floats(ffn.kan, tp, stream)
    grove = ffn.grove
    copies = 2 * grove.top_g * run.model.d_model  # of a token and its output, for each chosen grove
    router = grove.groves * (grove.edge_manifold + 4)
    routed = grove.top_g * _kan_floats(grove.kan, 1, 1) + copies + router
    return routed / tp + grove.shared * _kan_floats(grove.kan, tp, stream)


def _kan_floats(kan: KAN, tp: int, stream: int) -> float:
    """The reference path projects onto every edge and masks: [M, R] around the inner SiLU. Kernels
    on a GPU keep less: the kept edges' [k, R].

    Edges are computed on the stream; V and U are split over the tp ranks along R.
    """
    basis = kan.edge.grid + kan.edge.degree
    return kan.edges * ((4 + 2 * basis) / stream + kan.rank / tp * (2 + kan.inner_silu))
