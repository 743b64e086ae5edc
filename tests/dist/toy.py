"""A small model, its run and its data: parameter kinds, a router-like buffer, uneven targets."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import Run, load
from kalmagrove.parallel import Groups, all_reduce_sum

VOCAB, WIDTH, SEQ, ROWS = 37, 12, 8, 8


class Output(NamedTuple):
    loss: Tensor
    logits: Tensor | None
    nll: Tensor


class Block(nn.Module):
    """x + U^T phi(V x), with the shapes of a tensorized KAN layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(WIDTH))
        self.norm.kind = "norm"
        self.v_MRD = nn.Parameter(torch.randn(3, 5, WIDTH) * 0.3)
        self.u_MRD = nn.Parameter(torch.randn(3, 5, WIDTH) * 0.3)
        self.spline = nn.Parameter(torch.randn(3, 2) * 0.3)
        self.spline.kind = "spline"
        self.register_buffer("bias", torch.zeros(3))
        self.register_buffer("load", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("btd,mrd->btmr", F.rms_norm(x, (WIDTH,)) * self.norm, self.v_MRD)
        gate = torch.sigmoid(h.sum(-1) + self.bias.to(h.dtype))
        if self.training:
            with torch.no_grad():
                self.load += gate.detach().float().sum((0, 1))
        y = torch.tanh(h) * self.spline[:, :1] + h * self.spline[:, 1:]
        return x + torch.einsum("btmr,mrd->btd", y * gate[..., None], self.u_MRD)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.embedding.weight.kind = "embedding"
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.bad_loss = self.bad_gradient = False  # what a test injects

    def forward(self, tokens: Tensor, targets: Tensor, normalizer: float) -> Output:
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        logits = F.linear(self.projection(x), self.embedding.weight)
        total = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        loss = total / normalizer
        nll = loss.detach()
        if self.bad_loss:
            loss = loss + float("inf")  # its gradient is finite
        if self.bad_gradient:
            x.register_hook(lambda gradient: gradient * float("nan"))
        return Output(loss, None, nll)

    def balance(self, groups: Groups) -> None:
        for block in self.blocks:
            all_reduce_sum(block.load, groups.dp)
            block.bias += 1e-2 * torch.sign(block.load.mean() - block.load)
            block.load.zero_()

    def metrics(self) -> dict[str, Tensor]:
        return {"bias": self.blocks[0].bias.clone()}

    def traffic(self) -> None:
        """Nothing is exchanged."""


class Rows:
    """Seeded rows with uneven masks; rank r's micro-batch j of step s holds rows (j * dp + r)."""

    def __init__(self, micro: int, dp_rank: int, dp_size: int) -> None:
        self.micro, self.rank, self.size = micro, dp_rank, dp_size
        self.samples = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        step, row = divmod(self.samples, ROWS)
        generator = torch.Generator().manual_seed(100 + step)
        tokens = torch.randint(0, VOCAB, (ROWS, SEQ), generator=generator)
        targets = (tokens * 7 + 3) % VOCAB
        for i in range(ROWS):
            targets[i, : i % SEQ] = -100
        count = int((targets != -100).sum())
        first = row + self.rank * self.micro
        mine = slice(first, first + self.micro)
        self.samples += self.micro * self.size
        parts = self.size * (ROWS // (self.micro * self.size))
        return {"tokens": tokens[mine], "targets": targets[mine], "normalizer": count / parts}

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "tokenizer": "toy"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]


def toy_run(**sections: Any) -> Run:
    """A run of `SEQ * ROWS` tokens a step; keyword arguments are merged over it."""
    kan = {"edges": 8, "top_k": 2, "rank": 4}
    tree: dict[str, Any] = {
        "steps": 6,
        "model": {
            "name": "toy",
            "d_model": WIDTH,
            "layers": 2,
            "vocab_size": VOCAB,
            "attention": {
                "pattern": ["softmax"],
                "ada": {"heads": 2},
                "softmax": {"heads": 2, "kv_heads": 1},
                "mla": {"heads": 2, "kv_rank": 4, "nope_dim": 4, "rope_dim": 2, "v_dim": 4},
            },
            "ffn": {
                "pattern": ["dense"],
                "dense": {"hidden": 8},
                "moe": {"experts": 4, "top_k": 2, "hidden": 8},
                "kan": kan,
                "grove": {"groves": 2, "top_g": 1, "kan": kan},
            },
        },
        "data": {"name": "rows", "source": {"kind": "stdlib"}, "seq_len": SEQ},
        "batch": {"tokens": SEQ * ROWS, "micro": 1},
        "zero": {"stage": 1, "persist": 0, "bucket": 500},
        "optim": {"kind": "sgd", "lr": 0.2, "momentum": 0.9, "weight_decay": 0.0, "clip": 0.5},
        "schedule": {"kind": "cosine", "warmup": 2},
        "engine": {"precision": "fp32"},
        "price": {"name": "none", "basis": "test"},
        "launch": {"timeout": 60},
    }
    return load(_merge(tree, sections))


def real_run(overrides: list[str]) -> Run:
    """A run of the smallest real model on `Rows`."""
    settings = [
        "model=kan_tiny",
        "optim=sgd",
        f"model.vocab_size={VOCAB}",
        f"data.seq_len={SEQ}",
        f"batch.tokens={SEQ * ROWS}",
        "batch.micro=1",
        "engine.precision=fp32",
        "zero.persist=0",
        "zero.bucket=5000",
    ]
    return load(compose_tree("train", [*settings, *overrides]))


def _merge(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


class Recorder:
    """Meters that remember the losses of every step, averaged over the ranks."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.steps: dict[int, tuple[float, float]] = {}
        self.events: list[Any] = []

    def start(self, step: int, tokens: int) -> None:
        self.events.append(["start", step, tokens])

    def step(self, record: Any) -> None:
        loss = all_reduce_sum(record.loss.clone(), self.groups.dp) / self.groups.dp.size
        self.steps[record.step] = (float(loss), float(record.grad_norm))

    def over_budget(self) -> tuple[str, str] | None:
        return None

    def pause(self) -> None:
        """The events say enough."""

    def evaluated(self, step: int, tokens: int, nats: float, val_tokens: int) -> None:
        self.events.append(["evaluated", step, nats])

    def saving(self, step: int, tokens: int) -> None:
        self.events.append(["saving", step])

    def checkpointed(
        self, step: int, tokens: int, path: Any, seconds: float, saved: int | None = None
    ) -> None:
        self.events.append(["checkpointed", step, path.name])

    def unsaved(self, step: int, tokens: int, reason: str) -> None:
        self.events.append(["unsaved", step, reason])

    def skipped(self, step: int, reason: str) -> None:
        self.events.append(["skipped", step, reason])

    def refitted(self, step: int, tokens: int, grids: Any) -> None:
        self.events.append(["refitted", step, sorted(grids)])

    def stop(self, status: str, **facts: Any) -> None:
        self.events.append(["stop", status])

    def state_dict(self) -> dict[str, Any]:
        return {"lines": len(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.events.append(["loaded", state["lines"]])
