"""An estimate of the memory a device needs, before anything is built.

`kalmagrove train --dry-run` prints it. Weights, gradients and optimizer states follow from the ZeRO
stage (arXiv:1910.02054, section 3) and are near exact; activations are a rough count of the tensors
that the reference modules keep for the backward pass, good to perhaps a factor of two.
"""

from typing import NamedTuple

from kalmagrove.config import KAN, Run
from kalmagrove.config.counts import ada_head_dim, head_ranks, parameter_count


class Row(NamedTuple):
    component: str
    bytes: int


def memory_estimate(run: Run, dp: int, precision: str) -> list[Row]:
    """Bytes on one device, by component.

    Args:
        run: with `model.vocab_size` known.
        dp: data-parallel ranks, over which ZeRO shards.
        precision: fp32 or bf16; `engine.precision` with `auto` resolved.
    """
    params, stage = parameter_count(run.model).total, run.zero.stage
    size = 2 if precision == "bf16" else 4
    weights = params * size // (dp if stage == 3 else 1)
    accumulator = 4 if precision == "bf16" else 0  # gradients are summed in fp32
    gradients = params * (size + accumulator) // (dp if stage >= 2 else 1)
    states = params * _state_bytes(run, precision) // (dp if stage >= 1 else 1)
    tokens = run.batch.micro * run.data.seq_len
    layers = [layer_floats(run, layer) * size * tokens for layer in range(run.model.layers)]
    if run.engine.activation_checkpointing:
        # Each block keeps its input; one block at a time is computed again.
        activations = run.model.layers * run.model.d_model * size * tokens + max(layers)
    else:
        activations = sum(layers)
    assert run.model.vocab_size is not None
    # Logits, their fp32 copy, its log-softmax, and the gradient.
    logits = tokens * run.model.vocab_size * (size + 4 + 4 + 4)
    return [
        Row("parameters", weights),
        Row("gradients", gradients),
        Row("optimizer states", states),
        Row("activations", activations),
        Row("logits and loss", logits),
    ]


def _state_bytes(run: Run, precision: str) -> int:
    """Bytes a parameter: fp32 master weights (ZeRO keeps them at any precision) and the moments."""
    moments = {"adamw": 8, "muon": 8, "sgd": 4 if run.optim.momentum else 0}[run.optim.kind]
    master = 0 if run.zero.stage == 0 and precision == "fp32" else 4
    return master + moments


def layer_floats(run: Run, layer: int) -> int:
    """Numbers that one block keeps for a token, in the precision of the weights."""
    model = run.model
    D, kind = model.d_model, model.attention_kind(layer)
    count = 6 * D  # both residual sums, norms and inputs of the projections
    if kind == "ada":
        ada, v = model.attention.ada, ada_head_dim(model)
        width = ada.heads * max(head_ranks(model, layer))
        # q and k projected, convolved, normed, rotated (in fp32: twice); v, output, normed, gated
        count += 2 * 2 * 3 * width + 2 * 5 * ada.heads * v
        form = ada.form
        if form == "auto":
            form = "quadratic" if run.data.seq_len <= 2 * ada.chunk else "chunked"
        span = run.data.seq_len if form == "quadratic" else min(ada.chunk, run.data.seq_len)
        count += 2 * 2 * ada.heads * span if form != "recurrent" else 2 * width * v
    elif kind == "softmax":
        soft = model.attention.softmax
        count += 3 * (soft.head_dim or D // soft.heads) * (2 * soft.heads + 2 * soft.kv_heads)
    else:
        mla = model.attention.mla
        count += 2 * (mla.q_rank or 0) + 3 * mla.kv_rank + 3 * mla.rope_dim
        count += mla.heads * (4 * (mla.nope_dim + mla.rope_dim) + 3 * mla.v_dim)
    return count + _ffn_floats(run, layer)


def _ffn_floats(run: Run, layer: int) -> int:
    kind, ffn = run.model.ffn_kind(layer), run.model.ffn
    if kind == "dense":
        return 4 * ffn.dense.hidden
    if kind == "moe":
        return 4 * (ffn.moe.top_k * ffn.moe.hidden + ffn.moe.shared_hidden) + 4 * ffn.moe.experts
    if kind == "kan":
        return _kan_floats(ffn.kan)
    grove = ffn.grove
    one = _kan_floats(grove.kan)
    copies = 2 * grove.top_g * run.model.d_model  # of a token and its output, for each chosen grove
    router = grove.groves * (grove.edge_manifold + 4)
    return (grove.top_g + grove.shared) * one + copies + router


def _kan_floats(kan: KAN) -> int:
    """The reference path projects onto every edge and masks: [M, R] around the inner SiLU."""
    basis = kan.edge.grid + kan.edge.degree
    return kan.edges * (4 + 2 * basis + kan.rank * (2 + kan.inner_silu))
