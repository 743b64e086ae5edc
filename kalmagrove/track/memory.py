"""An estimate of the memory a device needs, before anything is built.

`kalmagrove train --dry-run` and `kalmagrove plan` print it. Weights, gradients and optimizer states
follow from the layout and the ZeRO stage (arXiv:1910.02054, section 3); activations are the tensors
that the modules keep for the backward pass, on the path that runs (`track.flops.Path`). The sum is
the peak as the backward pass begins: from there on gradients appear as activations go.

docs/cost.md sets it beside measured peaks.
"""

from typing import NamedTuple

from kalmagrove.config import KAN, Parallel, Run
from kalmagrove.config.counts import (
    Held,
    ada_head_dim,
    attention_count,
    ffn_count,
    head_ranks,
    held_parameters,
    routed_count,
)
from kalmagrove.track.communication import ranks_reached, routed_parts
from kalmagrove.track.flops import Path

# Of a logit: its fp32 copy, and in the backward pass the difference to log Z, its exponential, the
# gradient, and the scattered one of the target; in the weights' precision logit and gradient.
LOGIT_BYTES = 20
LIVE = 1_000_000_000  # parameters that ZeRO 3 keeps gathered at most (DeepSpeed's default)


class Row(NamedTuple):
    component: str
    bytes: int


def memory_estimate(
    run: Run, processes: int, precision: str, path: Path = "reference"
) -> list[Row]:
    """Bytes on one device, by component.

    Args:
        run: with `model.vocab_size` known.
        processes: of the run; its layout goes over them (`Run.check_world`).
        precision: fp32 or bf16; `engine.precision` with `auto` resolved.
        path: what the layers run, `track.flops.path_of`.
    """
    model, layout = run.model, run.parallel
    held = held_parameters(model, layout.tp, layout.ep)
    state = _States(run, processes, precision, held)
    size = 2 if precision == "bf16" else 4
    tokens = run.batch.micro * run.data.seq_len // layout.cp
    layers = [round(layer_floats(run, i, path) * size * tokens) for i in range(model.layers)]
    assert model.vocab_size is not None
    logits = tokens * model.vocab_size // layout.tp * LOGIT_BYTES
    activations = sum(layers)
    if run.engine.activation_checkpointing:
        # Each block keeps its input, part of the stream; blocks are computed again one at a time,
        # when the logits are gone.
        kept = model.layers * model.d_model * size * tokens // _stream_ranks(layout)
        activations = kept + max(0, max(layers) - logits)
    passing = max(0, state.new_gradients - activations - logits)
    rows = [
        Row("parameters", state.parameters),
        Row("gradients", state.gradient_sums + passing),
        Row("optimizer states", state.optimizer),
        Row("activations", activations),
        Row("logits and loss", logits),
    ]
    if layout.ep > 1:
        rows.append(Row("all-to-all buffers", _exchanged(run, size)))
    return rows


class _States:
    """Bytes of what there is a number of for each parameter, sharded by ZeRO."""

    def __init__(self, run: Run, processes: int, precision: str, held: Held) -> None:
        self._stage, self._held = run.zero.stage, held
        self._dense, self._routed = processes // run.parallel.tp, processes // run.parallel.ep
        size = 2 if precision == "bf16" else 4
        self.parameters = self._sharded(size, 3)
        if self._stage == 3 and processes > 1:
            self.parameters += size * _gathered(run, held)
        self.optimizer = self._sharded(_state_bytes(run, precision), 1)
        # In bf16 gradients are summed in fp32, by ZeRO 2 only where there is a second micro-batch.
        steps = run.accumulation(run.data_parallel(processes))
        summed = 4 if precision == "fp32" or self._stage != 2 or steps > 1 else 0
        self.gradient_sums = self._sharded(summed, 2)
        self.new_gradients = self._sharded(2, 2) if precision == "bf16" else 0

    def _sharded(self, size: int, sharded_from: int) -> int:
        """Bytes of `size` a parameter, sharded from that stage of ZeRO on."""
        if self._stage < sharded_from:
            return size * (self._held.dense + self._held.routed)
        return size * self._held.dense // self._dense + size * self._held.routed // self._routed


def _gathered(run: Run, held: Held) -> int:
    """Parameters that ZeRO 3 holds whole: at least those of the layer at work, and without
    activation checkpointing all, which autograd keeps from the forward to the backward pass.
    """
    whole = held.dense + held.routed
    if not run.engine.activation_checkpointing:
        return whole
    model, tp, ep = run.model, run.parallel.tp, run.parallel.ep
    layers = (
        attention_count(model, i, tp).total
        + ffn_count(model, i, tp).total
        - routed_count(model, i) * (ep - 1) // ep
        for i in range(model.layers)
    )
    return min(whole, max(LIVE, *layers))


def _state_bytes(run: Run, precision: str) -> int:
    """Bytes a parameter: fp32 master weights (ZeRO keeps them at any precision) and the moments."""
    moments = {"adamw": 8, "muon": 8, "sgd": 4 if run.optim.momentum else 0}[run.optim.kind]
    master = 0 if run.zero.stage == 0 and precision == "fp32" else 4
    return master + moments


def _stream_ranks(layout: Parallel) -> int:
    """Ranks over which the residual stream of a piece of the rows is split."""
    return layout.tp if layout.sequence else 1


def _exchanged(run: Run, size: int) -> int:
    """Rows sent to other ranks and rows received, of the layer with most."""
    model, layout = run.model, run.parallel
    tokens = run.batch.micro * run.data.seq_len / layout.cp / layout.tp
    reached = [
        ranks_reached(*parts, layout.ep)
        for parts in (routed_parts(model, i) for i in range(model.layers))
        if parts is not None
    ]
    return round(2 * tokens * max(reached, default=0.0) * model.d_model * size)


def layer_floats(run: Run, layer: int, path: Path = "reference") -> float:
    """Numbers that one block keeps for a token of this rank's piece, in the weights' precision."""
    model, layout = run.model, run.parallel
    D, tp, cp, kind = model.d_model, layout.tp, layout.cp, model.attention_kind(layer)
    # Inputs of the norms; inputs of the projections, which every rank has whole.
    count: float = 2 * D / _stream_ranks(layout) + 2 * D
    if kind == "ada":
        inner = _ada_floats(run, layer, path)
    elif kind == "softmax":
        soft = model.attention.softmax
        head, norms = soft.head_dim or D // soft.heads, soft.qk_norm
        # Queries and keys before their norms, what SDPA gets and gives, its output as the
        # projection's input. Keys and values of other ranks' tokens are gathered.
        inner = head * (norms * (soft.heads + soft.kv_heads) + 2 * soft.heads)
        inner += head * 2 * soft.kv_heads * cp
    else:
        mla = model.attention.mla
        key = mla.nope_dim + mla.rope_dim
        count += 2 * (mla.q_rank or 0) + (cp + 1) * (mla.kv_rank + mla.rope_dim)
        inner = mla.heads * (2 * key + 2 * mla.v_dim + (cp - 1) * (key + mla.v_dim))
    return count + inner / tp + _ffn_floats(run, layer, path)


def _ada_floats(run: Run, layer: int, path: Path) -> float:
    """Of all heads. Kernels keep queries and keys before and after their preparation, values,
    gate, output before and after the norm. The reference computes in fp32, and keeps every step.
    """
    ada, v = run.model.attention.ada, ada_head_dim(run.model)
    rank = max(head_ranks(run.model, layer))
    keys, values = ada.heads * rank, ada.heads * v
    if path == "kernels" and ada.form == "auto":
        return 4 * keys + 4 * values
    piece, form = run.data.seq_len // run.parallel.cp, ada.form
    if form == "auto":
        form = "quadratic" if piece <= 2 * ada.chunk else "chunked"
    if form == "recurrent":
        return 12 * keys + 10 * values + 2 * keys * v
    if form == "quadratic":
        return 12 * keys + 10 * values + 4 * ada.heads * piece
    chunk = min(ada.chunk, piece)
    return 20 * keys + 10 * values + 4 * keys * v / chunk + 4 * ada.heads * chunk


def _ffn_floats(run: Run, layer: int, path: Path) -> float:
    """Dense and shared widths are split over the tp ranks; routed tokens are too."""
    kind, ffn, tp, D = run.model.ffn_kind(layer), run.model.ffn, run.parallel.tp, run.model.d_model
    stream = _stream_ranks(run.parallel)
    if kind == "dense":
        return 4 * ffn.dense.hidden / tp
    if kind == "kan":
        return _kan_floats(ffn.kan, tp, stream, path)
    # Of a token: it and the output of each chosen part, and the router's fp32 copy.
    if kind == "moe":
        hidden = ffn.moe.top_k * ffn.moe.hidden + ffn.moe.shared_hidden
        return (4 * (hidden + ffn.moe.experts) + 2 * (ffn.moe.top_k + 1) * D) / tp
    grove = ffn.grove
    router = grove.groves * (grove.edge_manifold + 4) + 2 * (grove.top_g + 1) * D
    routed = grove.top_g * _kan_floats(grove.kan, 1, 1, path) + router
    return routed / tp + grove.shared * _kan_floats(grove.kan, tp, stream, path)


def _kan_floats(kan: KAN, tp: int, stream: int, path: Path) -> float:
    """The reference path on a GPU projects onto every edge and masks: [M, R] around the inner SiLU.
    Kernels keep the kept edges' [k, R], values, indices and order (`projection.workspace_bytes`).

    Edges are computed on the stream; V and U are split over the tp ranks along R.
    """
    if path == "kernels" and kan.routing == "hard":
        return kan.edges / stream + kan.top_k * (6 + kan.rank / tp)
    basis = kan.edge.grid + kan.edge.degree
    return kan.edges * ((4 + 2 * basis) / stream + kan.rank / tp * (2 + kan.inner_silu))
