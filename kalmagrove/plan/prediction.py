"""One run in one layout on one cluster: memory, seconds, dollars, joules.

`search` compares them; `kalmagrove train` writes one into the run's folder (`predict`), so that the
report can set what happened beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kalmagrove.config import Cluster, Run
from kalmagrove.config.counts import parameter_count
from kalmagrove.plan.efficiency import MEASURED_ON, machine_of
from kalmagrove.plan.host import Cost, HostTimes
from kalmagrove.plan.time import Part, step_time
from kalmagrove.track import Flops, flops_per_token, memory_estimate, path_of

USABLE = 0.92  # of a GPU's memory: the rest is CUDA's, NCCL's, and what no tensor fits into
SLOWER = 1.5  # what hosts with the same GPU differ by
MATTERS = 0.15  # of a step: what predictions aim at


@dataclass(frozen=True)
class Prediction:
    """What training `tokens` would take. GPUs in bf16; the loss is not predicted."""

    run: Run
    cluster: Cluster
    tokens: int
    memory: dict[str, int]  # bytes on one device, by component
    parts: list[Part]  # of a step
    host: Cost  # of a step

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= usable_bytes(self.cluster)

    @property
    def step_seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_s(self) -> float:
        return self.run.batch.tokens / self.step_seconds

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_s / 3600

    @property
    def usd(self) -> float | None:
        price = self.cluster.usd_per_gpu_hour
        return None if price is None else price * self.cluster.gpus * self.hours

    @property
    def joules(self) -> float:
        """At full load all the time: at most so many."""
        return self.cluster.watts * self.cluster.gpus * 3600 * self.hours

    @property
    def flops(self) -> float:
        """Model FLOPs of a token in training."""
        return self._flops.training

    @property
    def mfu(self) -> float:
        return self._utilisation(self._flops.training)

    @property
    def hfu(self) -> float:
        checkpointing = self.run.engine.activation_checkpointing
        return self._utilisation(self._flops.hardware(checkpointing))

    @property
    def _flops(self) -> Flops:
        path = path_of(self.run.model.backend, gpu=True)
        return flops_per_token(self.run.model, self.run.data.seq_len, path)

    def _utilisation(self, flops: float) -> float:
        peak = self.cluster.peak_tflops * 1e12 * self.cluster.gpus
        return self.tokens_per_s * flops / peak

    @property
    def extrapolated(self) -> tuple[str, ...]:
        """What the measurements that it rests on do not cover."""
        model, found = self.run.model, []
        if MEASURED_ON not in self.cluster.gpu:
            found.append(f"{self.cluster.gpu}: scaled from the H200 by the data sheets")
        if self.cluster.gpus > 2:
            found.append("more than 2 GPUs: communication by bytes and link speed alone")
        if self.cluster.gpus > self.cluster.gpus_per_node:
            found.append("several machines: network efficiency is assumed")
        kinds = {model.ffn_kind(i) for i in range(model.layers)}
        if "grove" in kinds and path_of(model.backend, gpu=True) == "kernels":
            found.append("grove layers: their kernels were measured alone, small ones left out")
        if "mla" in {model.attention_kind(i) for i in range(model.layers)}:
            found.append("mla: by the figures of softmax attention")
        if parameter_count(model).total > 3e9:
            found.append("model size: the largest one measured has 1.0B parameters")
        if self.run.parallel.cp > 1:
            found.append("cp: measured in one layout of two GPUs")
        optim = self.run.optim.kind
        if optim != "adamw":
            text = f"optim={optim}: the optimizer's time is AdamW's"
            found.append(text + ", without Newton-Schulz steps" * (optim == "muon"))
        return (*found, *self.host.notes, *self._host_note())

    def _host_note(self) -> Iterator[str]:
        """Where the time hangs on a host that was not measured."""
        if not self.host.elsewhere:
            return
        slower = step_time(self.run, self.cluster, self.host.times(SLOWER))
        longer = sum(part.seconds for part in slower) / self.step_seconds - 1
        if longer > MATTERS:
            yield (
                "host: the middle of a few H200 and H100 machines, which differ by half; one half "
                f"slower makes this step {longer:.0%} longer. Measure yours with kalmagrove bench "
                "host, then give host=FILE"
            )

    def tree(self) -> dict[str, Any]:
        """As JSON values; layout, then what it takes."""
        run, layout = self.run, self.run.parallel
        return {
            "model": run.model.name,
            "cluster": self.cluster.model_dump(),
            "layout": {
                "tp": layout.tp,
                "cp": layout.cp,
                "ep": layout.ep,
                "dp": run.data_parallel(self.cluster.gpus),
                "sequence": layout.sequence,
                "zero": run.zero.stage,
                "micro": run.batch.micro,
                "activation_checkpointing": run.engine.activation_checkpointing,
            },
            "tokens": self.tokens,
            "tokens_per_step": run.batch.tokens,
            "memory_bytes": self.memory,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "step_seconds": self.step_seconds,
            "step_split": {part.name: part.seconds for part in self.parts},
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "hours": self.hours,
            "usd": self.usd,
            "joules_at_most": self.joules,
            "extrapolated": list(self.extrapolated),
        }


def predicted(run: Run, cluster: Cluster, tokens: int, host: HostTimes | None = None) -> Prediction:
    """Of this layout.

    Args:
        host: measured where the run will be; None: as on the machines of `efficiency`.

    Raises:
        ConfigError: if the layout does not go over the cluster's GPUs.
    """
    run.check_world(cluster.gpus)
    cost = (host or HostTimes()).cost(run, cluster.gpus)
    parts = step_time(run, cluster, cost)
    return Prediction(run, cluster, tokens, memory_of(run, cluster), parts, cost)


def memory_of(run: Run, cluster: Cluster) -> dict[str, int]:
    """Bytes on one GPU, by component."""
    path = path_of(run.model.backend, gpu=True)
    return {row.component: row.bytes for row in memory_estimate(run, cluster.gpus, "bf16", path)}


def usable_bytes(cluster: Cluster) -> float:
    """Of one GPU."""
    return USABLE * cluster.memory_gb * 1e9


def predict(run: Run, device: str | None, world_size: int) -> dict[str, Any] | None:
    """Of a run that is about to start, as JSON values; None where nothing is known to predict with:
    no GPU, one whose figures are not listed, or fp32.

    Args:
        run: with `model.vocab_size` known.
        device: the GPU's name, as CUDA gives it; None: a CPU.
    """
    if device is None or run.engine.precision == "fp32":
        return None
    cluster = machine_of(device, world_size, run.price.usd_per_gpu_hour)
    if cluster is None:
        return None
    return predicted(run, cluster, run.steps * run.batch.tokens).tree()
