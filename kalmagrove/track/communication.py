"""Bytes that a rank sends in an optimizer step, by kind of parallelism, before anything is built.

`kalmagrove train --dry-run` prints it; a test counts what the model's collectives really send. The
mean over ranks, by the cost of ring algorithms: of n ranks and b bytes each sends (n - 1) / n b for
an all-gather or reduce-scatter (b: all pieces together), twice that for an all-reduce. Left out are
single numbers a step, and the routers' loads.

Letters: N tokens of a micro-batch on a rank, D model width, H heads, R rank or width of a head,
E experts or groves, K chosen a token, M edges.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from kalmagrove.config import Model, Run
from kalmagrove.config.counts import ada_head_dim, edge_size, head_ranks, held_parameters

INDEX, FLOAT, INT = 8, 4, 4  # bytes of an int64, a fp32 and an int32


class Row(NamedTuple):
    kind: str
    bytes: int


class Sent(NamedTuple):
    """Bytes of one micro-batch. `last` is of the forward pass too, after all that the backward pass
    needs: activation checkpointing does not repeat it.
    """

    forward: float = 0.0
    backward: float = 0.0
    last: float = 0.0

    def __add__(self, other: object) -> "Sent":
        assert isinstance(other, Sent)
        return Sent(*(a + b for a, b in zip(self, other, strict=True)))

    def closing(self) -> "Sent":
        return Sent(0.0, self.backward, self.forward)

    def all(self, repeated: bool) -> float:
        return self.forward * (1 + repeated) + self.backward + self.last


NOTHING = Sent()


def communication_estimate(run: Run, processes: int, precision: str) -> list[Row]:
    """What one rank sends in an optimizer step, on average over the ranks.

    Args:
        run: with `model.vocab_size` known.
        processes: of the run; its layout goes over them (`Run.check_world`).
        precision: fp32 or bf16; `engine.precision` with `auto` resolved.
    """
    model, size = run.model, 2 if precision == "bf16" else 4
    tensor, context, routed = _Tensor(run, size), _Context(run, size), _Routed(run, size)
    repeated, layers = run.engine.activation_checkpointing, range(model.layers)
    by_tensor = tensor.ends().all(False)
    by_tensor += sum(tensor.layer(i).all(repeated) for i in layers)
    by_context = sum(context.layer(i).all(repeated) for i in layers)
    by_routed = sum(routed.layer(i).all(repeated) for i in layers)
    steps = run.accumulation(run.data_parallel(processes))
    gradients, parameters = zero_bytes(run, processes, size)
    return [
        Row("tensor parallel", round(steps * by_tensor)),
        Row("context parallel", round(steps * by_context)),
        Row("groves and experts", round(steps * by_routed)),
        Row("gradients", round(gradients)),
        Row("parameters (ZeRO)", round(parameters)),
    ]


def zero_bytes(run: Run, processes: int, size: int) -> tuple[float, float]:
    """Of gradients and of parameters, in a step, as DeepSpeed's stages do it.

    Stages 0 and 1 all-reduce gradients once a step, stage 2 those of every micro-batch; stages 1
    and 2 gather the updated parameters. Stage 3 gathers parameters for the forward and for the
    backward pass of every micro-batch, and reduce-scatters its gradients.
    """
    dense, routed = zero_bytes_apart(run, processes, size)
    return dense[0] + routed[0], dense[1] + routed[1]


def zero_bytes_apart(
    run: Run, processes: int, size: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """`zero_bytes` of the dense parameters, and of groves or experts, which other ranks share."""
    layout, stage = run.parallel, run.zero.stage
    held = held_parameters(run.model, layout.tp, layout.ep)
    steps = run.accumulation(run.data_parallel(processes))

    def of(parameters: int, ranks: int) -> tuple[float, float]:
        once = size * parameters * _others(ranks)
        if stage == 3:
            return steps * once, steps * 2 * once
        return 2 * once * (steps if stage == 2 else 1), once if stage else 0.0

    return of(held.dense, processes // layout.tp), of(held.routed, processes // layout.ep)


def ranks_reached(parts: int, chosen: int, ranks: int) -> float:
    """Other ranks that a token is sent to, on average, if all choices are equally likely.

    A rank holds parts / ranks of the parts. Of all ways to choose, those that avoid one rank's are
    C(parts - parts / ranks, chosen) of C(parts, chosen).
    """
    avoided = math.comb(parts - parts // ranks, chosen) / math.comb(parts, chosen)
    return (ranks - 1) * (1 - avoided)


def routed_parts(model: Model, layer: int) -> tuple[int, int] | None:
    """Groves or experts of a layer, and how many a token chooses; None: it has none."""
    kind, ffn = model.ffn_kind(layer), model.ffn
    if kind == "grove":
        return ffn.grove.groves, ffn.grove.top_g
    return (ffn.moe.experts, ffn.moe.top_k) if kind == "moe" else None


def _others(ranks: int) -> float:
    """The share that a rank does not keep to itself."""
    return (ranks - 1) / ranks


@dataclass(frozen=True)
class _Tensor:
    """Tensor and sequence parallelism: see `kalmagrove.parallel.tensor`."""

    run: Run
    size: int

    @property
    def tokens(self) -> int:
        return self.run.batch.micro * self.run.data.seq_len // self.run.parallel.cp

    def enter(self, width: int) -> Sent:
        """An all-reduce of gradients; with `sequence` a gather, and a reduce-scatter back."""
        ring = self._ring(self.tokens * width * self.size)
        return Sent(ring, ring) if self.run.parallel.sequence else Sent(0, 2 * ring)

    def leave(self, width: int) -> Sent:
        """An all-reduce of partial sums; with `sequence` a reduce-scatter, and a gather back."""
        ring = self._ring(self.tokens * width * self.size)
        return Sent(ring, ring) if self.run.parallel.sequence else Sent(2 * ring, 0)

    def shared(self, numbers: int, size: int | None = None) -> Sent:
        """The all-reduced gradient of a whole weight."""
        return Sent(0, 2 * self._ring(numbers * (size or self.size)))

    def stream(self, numbers: int) -> Sent:
        """The same, of a weight that is applied to the stream."""
        return self.shared(numbers) if self.run.parallel.sequence else NOTHING

    def ends(self) -> Sent:
        """Embedding, last norm, head, and three numbers a token for the loss."""
        D = self.run.model.d_model
        loss = Sent(3 * 2 * self._ring(self.tokens * FLOAT))
        return self.leave(D) + self.stream(D) + self.enter(D) + loss

    def layer(self, layer: int) -> Sent:
        model = self.run.model
        norms = self.stream(2 * model.d_model)
        attention = {"ada": self._ada, "softmax": self._softmax, "mla": self._mla}
        return norms + attention[model.attention_kind(layer)](layer) + self._ffn(layer)

    def _ada(self, layer: int) -> Sent:
        model, ada = self.run.model, self.run.model.attention.ada
        sent = self.enter(model.d_model) + self.leave(model.d_model)
        if ada.output_norm:
            sent += self.shared(ada_head_dim(model))
        if ada.kernel == "ode":
            sent += self.shared(sum(head_ranks(model, layer)) * ada.taps, FLOAT)
        return sent

    def _softmax(self, layer: int) -> Sent:
        D, soft = self.run.model.d_model, self.run.model.attention.softmax
        width = soft.head_dim or D // soft.heads
        norms = self.shared(2 * width) if soft.qk_norm else NOTHING
        return self.enter(D) + norms + self.leave(D)

    def _mla(self, layer: int) -> Sent:
        """Latents are made on the stream and enter; whole weights make them."""
        D, mla = self.run.model.d_model, self.run.model.attention.mla
        widths = mla.kv_rank + mla.rope_dim + (mla.q_rank or D)
        whole = self.stream((mla.kv_rank + mla.rope_dim + (mla.q_rank or 0)) * D)
        norms = self.stream(mla.kv_rank + (mla.q_rank or 0))
        return self.enter(widths) + whole + norms + self.leave(D)

    def _ffn(self, layer: int) -> Sent:
        D, ffn, kind = self.run.model.d_model, self.run.model.ffn, self.run.model.ffn_kind(layer)
        if kind == "dense":
            return self.enter(D) + self.leave(D).closing()
        if kind == "kan":
            return self._kan(closing=True)
        if kind == "moe":
            router = self.shared(ffn.moe.experts * D)
            shared = self.enter(D) + self.leave(D) if ffn.moe.shared_hidden else NOTHING
            return router + self._apart(bool(ffn.moe.z_loss)) + shared
        grove = ffn.grove
        router = self.shared(grove.groves * (grove.edge_manifold * D + D + 1))
        shared = self._kan(closing=False) if grove.shared else NOTHING
        return router + self._apart(bool(grove.z_loss)) + shared

    def _kan(self, closing: bool) -> Sent:
        """Routed on the stream: the choice of edges enters beside the tokens."""
        D, ffn = self.run.model.d_model, self.run.model.ffn
        kan = ffn.kan if closing else ffn.grove.kan
        values = kan.top_k if kan.routing == "hard" else kan.edges
        sent = (
            self.enter(D) + self.enter(values) + self.stream(kan.edges * (D + edge_size(kan.edge)))
        )
        if self.run.parallel.sequence:
            sent += Sent(self._ring(self.tokens * kan.top_k * INDEX))
        return sent + (self.leave(D).closing() if closing else self.leave(D))

    def _apart(self, z_loss: bool) -> Sent:
        """Each rank routes its own piece of the tokens, which `sequence` gives it already."""
        loss = Sent(2 * self._ring(FLOAT)) if z_loss else NOTHING
        if self.run.parallel.sequence:
            return loss
        ring = self._ring(self.tokens * self.run.model.d_model * self.size)
        return loss + Sent(0, ring, ring)

    def _ring(self, size: float) -> float:
        return _others(self.run.parallel.tp) * size


@dataclass(frozen=True)
class _Context:
    """Context parallelism: see `kalmagrove.parallel.context` and the attentions."""

    run: Run
    size: int

    def layer(self, layer: int) -> Sent:
        model, tp = self.run.model, self.run.parallel.tp
        kind = model.attention_kind(layer)
        if kind == "ada":
            return self._ada(layer)
        if kind == "softmax":
            soft = model.attention.softmax
            width = soft.head_dim or model.d_model // soft.heads
            return self._gathered(2 * soft.kv_heads * width // tp)
        return self._gathered(model.attention.mla.kv_rank + model.attention.mla.rope_dim)

    def _gathered(self, width: int) -> Sent:
        """Keys and values, or latents, of all tokens; the tokens' segments."""
        tokens = self.run.batch.micro * self.run.data.seq_len
        ring = self._ring(tokens * width * self.size)
        segments = self._ring(tokens * INT) if self.run.data.document_aware else 0.0
        return Sent(ring + segments, ring)

    def _ada(self, layer: int) -> Sent:
        """The keys that the key kernel reaches go to the next rank; all ranks get all states."""
        model, parallel, rows = self.run.model, self.run.parallel, self.run.batch.micro
        ada, ranks, aware = (
            model.attention.ada,
            head_ranks(model, layer),
            self.run.data.document_aware,
        )
        reach = ada.taps - 1 if ada.kernel != "none" else 0
        # The last rank has no next one: the share of all is the same as of a ring.
        keys = self._ring(rows * reach * sum(ranks) / parallel.tp * self.size)
        entries = max(ranks) * ada_head_dim(model) * ada.heads // parallel.tp
        states = self._ring(rows * parallel.cp * entries * FLOAT)
        segments = self._ring(rows * (reach + parallel.cp) * INT) if aware else 0.0
        return Sent(keys + states + segments, keys + states)

    def _ring(self, size: float) -> float:
        return _others(self.run.parallel.cp) * size


@dataclass(frozen=True)
class _Routed:
    """The all-to-alls of groves and experts: see `kalmagrove.parallel.expert`.

    A token goes to each rank that holds any of its parts once, and one row comes back. Expected for
    a router that chooses all parts equally often and independently.
    """

    run: Run
    size: int

    def layer(self, layer: int) -> Sent:
        model, parallel = self.run.model, self.run.parallel
        routed, ep = routed_parts(model, layer), parallel.ep
        if routed is None or ep == 1:
            return NOTHING
        parts, chosen = routed
        tokens = self.run.batch.micro * self.run.data.seq_len / parallel.cp / parallel.tp
        rows = tokens * ranks_reached(parts, chosen, ep)
        counts = (ep - 1) * (1 + parts // ep) * INDEX
        there_and_back = 2 * rows * model.d_model * self.size
        gates, numbers = rows * chosen * FLOAT, rows * chosen * INT
        return Sent(counts + there_and_back + gates + numbers, there_and_back + gates)
