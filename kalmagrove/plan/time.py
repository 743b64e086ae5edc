"""Seconds of a training step on a cluster, predicted part by part.

`prediction` adds them up. FLOPs over a share of the peak, bytes over a share of the memory's speed,
bytes sent over a share of the links' speed, and the host where the GPU waits for it: shares and
bytes are measured ones (`efficiency`). Parts follow one another; communication hides nothing.

Letters: D model width, M edges, R rank, k edges kept.
"""

from typing import NamedTuple

from kalmagrove.config import KAN, Cluster, Run
from kalmagrove.config.counts import ada_head_dim, head_ranks, held_parameters
from kalmagrove.plan.efficiency import of
from kalmagrove.plan.host import Cost, again
from kalmagrove.track import communication_estimate, flops_per_token, path_of
from kalmagrove.track.communication import routed_parts, zero_bytes_apart
from kalmagrove.track.flops import Path, Row

ROUTER_SHARE = 0.06  # of the bf16 peak: routers multiply in fp32 (H200: 67 of 989 TFLOP/s)
GRADIENTS = "gradients and ZeRO"
# FLOPs that take no time of their own: their kernels are bound by the bytes that they move.
KERNELS = ("edge functions", "ada key kernel", "ada sums")


class Part(NamedTuple):
    name: str
    seconds: float  # of a step


def step_time(run: Run, cluster: Cluster, host: Cost) -> list[Part]:
    """The parts of a step, of the slowest rank; GPUs in bf16.

    Args:
        run: with `model.vocab_size` known and a layout that goes over the cluster's GPUs.
        host: what the step costs it.
    """
    return _Step(run, cluster).parts(host)


class _Step:
    def __init__(self, run: Run, cluster: Cluster) -> None:
        self.run, self.cluster = run, cluster
        self.path: Path = path_of(run.model.backend, gpu=True)
        self.micro_batches = run.accumulation(run.data_parallel(cluster.gpus))
        self.tokens = run.batch.micro * run.data.seq_len / run.parallel.cp  # a rank's, at once
        self.again = again(run)
        self.layers = [_Layer(run, i, self.path) for i in range(run.model.layers)]

    def parts(self, host: Cost) -> list[Part]:
        times = self.micro_batches
        flops = flops_per_token(self.run.model, self.run.data.seq_len, self.path)
        products, kan, scores, routers = (
            sum(self._passes(row, row is flops.rows[-1]) for row in flops.rows if test(row))
            for test in (_is_product, _is_kan, _is_scores, _is_router)
        )
        cp = self.run.parallel.cp
        kan_share = of("kan_products") if self.path == "kernels" else of("products")
        row = self.run.data.seq_len
        scores_share = of("scores") * row / (row + of("scores_row"))
        sent = self._sent()
        layers = [
            Part("matrix products", self._computed(products, of("products"))),
            Part("KAN layers", self._computed(kan, kan_share) + self._moved_by("kan")),
            # Later pieces of a row have more to attend to.
            Part("softmax scores", (2 - 1 / cp) * self._computed(scores, scores_share)),
            Part("ADA", self._moved_by("ada")),
            Part("routing", self._computed(routers, ROUTER_SHARE) + self._moved_by("routing")),
            Part("norms, rotation, SwiGLU", self._moved_by("other")),
            Part("loss", self._loss()),
        ]
        layers = [Part(part.name, times * part.seconds) for part in layers]
        layers += [part for part in sent if part.name != GRADIENTS]
        busy = sum(part.seconds for part in layers)  # in which the host prepares what follows
        # The norm of the gradients waits for the passes: what follows it is prepared anew.
        optimizer = self._optimizer()
        waiting = max(0.0, times * host.passes - busy)
        waiting += max(of("step"), host.optimizer - optimizer)
        rest = [part for part in sent if part.name == GRADIENTS]
        step = [
            *layers,
            Part("optimizer", optimizer),
            *rest,
            Part("waiting for the host", waiting),
        ]
        return [part for part in step if part.seconds > 0]

    def _passes(self, row: Row, last: bool) -> float:
        """FLOPs a token on this rank; the logits are not computed again."""
        again = 0.0 if last else row.forward * self.run.engine.activation_checkpointing
        return (row.forward + row.backward + again) / self.run.parallel.tp

    def _computed(self, flops_per_token: float, share: float) -> float:
        return self.tokens * flops_per_token / (share * self.cluster.peak_tflops * 1e12)

    def _moved(self, bytes_: float) -> float:
        return bytes_ / (of("copy") * self.cluster.memory_tbs * 1e12)

    def _moved_by(self, what: str) -> float:
        return self._moved(
            self.again * self.tokens * sum(layer.moved.get(what, 0.0) for layer in self.layers)
        )

    def _loss(self) -> float:
        assert self.run.model.vocab_size is not None
        words = self.run.model.vocab_size / self.run.parallel.tp
        return self._moved(self.tokens * words * of("logits"))

    def _optimizer(self) -> float:
        layout, gpus = self.run.parallel, self.cluster.gpus
        held = held_parameters(self.run.model, layout.tp, layout.ep)
        own: float = held.dense + held.routed
        sums = self.micro_batches * of("sums") * own
        if self.run.zero.stage:
            own = held.dense * layout.tp / gpus + held.routed * layout.ep / gpus
        return self._moved(of("optimizer") * own + sums)

    def _sent(self) -> list[Part]:
        """Bytes over speeds. Ranks of a group lie side by side: tp innermost, then cp, then dp."""
        run, cluster, layout = self.run, self.cluster, self.run.parallel
        sent = dict(communication_estimate(run, cluster.gpus, "bf16"))
        dense, routed = zero_bytes_apart(run, cluster.gpus, 2)
        pieces = layout.tp * layout.cp
        return [
            Part("tensor parallel", sent["tensor parallel"] / self._ring(layout.tp, 1)),
            Part("context parallel", sent["context parallel"] / self._ring(pieces, layout.tp)),
            Part("all-to-all", self._exchange(sent["groves and experts"], layout.ep)),
            Part(
                GRADIENTS,
                sum(dense) / self._ring(cluster.gpus, layout.tp)
                + sum(routed) / self._ring(cluster.gpus, layout.ep),
            ),
        ]

    def _ring(self, reach: int, apart: int) -> float:
        """Bytes a second that a rank sends in gathers among every `apart`-th of `reach` ranks.

        Over several machines the ring goes through the network cards of all its ranks in each.
        """
        cluster, link = self.cluster, of("gather") * self.cluster.link_gbs * 1e9
        if reach <= cluster.gpus_per_node:
            return link
        cards = max(1, cluster.gpus_per_node // apart)
        return min(link, cards * of("network") * cluster.network_gbs * 1e9)

    def _exchange(self, sent: float, ranks: int) -> float:
        """Seconds of an even all-to-all, within machines and between them at once."""
        cluster, node = self.cluster, self.cluster.gpus_per_node
        out = max(0, ranks - node) / max(1, ranks - 1)
        network = of("network") * cluster.network_gbs * 1e9
        return sent * max((1 - out) / (of("exchange") * cluster.link_gbs * 1e9), out / network)


def _is_kan(row: Row) -> bool:
    return row.component in ("ffn kan", "ffn grove")


def _is_scores(row: Row) -> bool:
    return row.component in ("softmax scores", "mla scores")


def _is_router(row: Row) -> bool:
    return row.component == "routers"


def _is_product(row: Row) -> bool:
    other = _is_kan(row) or _is_scores(row) or _is_router(row)
    return not other and row.component not in KERNELS


class _Layer:
    """Bytes that a layer moves through a rank's memory for a token, both passes, by kind."""

    def __init__(self, run: Run, layer: int, path: Path) -> None:
        model, layout = run.model, run.parallel
        self.moved = {"other": of("stream") * model.d_model / (layout.tp if layout.sequence else 1)}
        self._attention(run, layer, path)
        kind, ffn, tp = model.ffn_kind(layer), model.ffn, layout.tp
        if kind == "dense":
            self._add("other", of("hidden") * ffn.dense.hidden / tp)
        elif kind == "kan":
            self._kan(ffn.kan, model.d_model, path, 1.0, tp)
        elif kind == "moe":
            hidden = ffn.moe.top_k * ffn.moe.hidden + ffn.moe.shared_hidden
            self._add("other", of("hidden") * hidden / tp)
        else:
            self._kan(ffn.grove.kan, model.d_model, path, ffn.grove.top_g / tp, 1)
            if ffn.grove.shared:
                self._kan(ffn.grove.kan, model.d_model, path, 1.0, tp)
        parts = routed_parts(model, layer)
        if parts is not None:
            self._add("routing", of("dispatch") * parts[1] * model.d_model / tp)

    def _add(self, kind: str, bytes_: float) -> None:
        self.moved[kind] = self.moved.get(kind, 0.0) + bytes_

    def _attention(self, run: Run, layer: int, path: Path) -> None:
        model, tp = run.model, run.parallel.tp
        kind = model.attention_kind(layer)
        if kind == "ada":
            ada = model.attention.ada
            kernels = path == "kernels" and ada.form == "auto"
            channels = (sum(head_ranks(model, layer)) + ada.heads * ada_head_dim(model)) / 2
            self._add("ada", of("ada" if kernels else "ada_reference") * channels / tp)
        elif kind == "softmax":
            soft = model.attention.softmax
            width = soft.head_dim or model.d_model // soft.heads
            self._add("other", of("softmax") * width * (soft.heads + soft.kv_heads) / tp)
        else:
            mla = model.attention.mla
            self._add("other", of("softmax") * 2 * mla.heads * mla.rope_dim / tp)

    def _kan(self, kan: KAN, D: int, path: Path, times: float, tp: int) -> None:
        """`times` layers a token. Rows of pairs are as wide as the stream on every rank."""
        if path == "kernels" and kan.routing == "hard":
            self._add("kan", times * of("kan_rows") * kan.top_k * D)
        else:
            self._add("kan", times * of("kan_masked") * kan.edges * kan.rank / tp)
