"""Which layouts a run can have: what parallel.tp, cp and ep must divide, and the nearest that do.

`Run` asks when it is loaded (`check_layout`) and when the number of processes is known
(`check_processes`), before anything is built.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Self

from kalmagrove.config.errors import ConfigError

if TYPE_CHECKING:
    from kalmagrove.config.model import Model
    from kalmagrove.config.run import Parallel, Run


class Rule(NamedTuple):
    """A rule that a layout breaks."""

    key: str  # of `parallel`
    text: str
    whole: int  # allowed values divide it


def check_layout(run: "Run") -> None:
    """Check what holds for any number of processes.

    Raises:
        ConfigError: naming the first setting that cannot be split so, and the nearest that can.
    """
    parallel = run.parallel
    for rule in _broken(run, parallel):
        value = getattr(parallel, rule.key)
        raise ConfigError(f"parallel.{rule.key}", value, rule.text, _try(run, rule))
    if parallel.sequence and parallel.tp == 1:
        raise ConfigError(
            "parallel.sequence",
            True,
            "splits norms and residuals over the ranks of parallel.tp, which is 1",
            "use parallel.sequence=false or a larger parallel.tp",
        )


def check_processes(run: "Run", processes: int) -> None:
    """Check that the layout goes over so many processes.

    Raises:
        ConfigError: with the nearest layout for them, and the nearest numbers for the layout.
    """
    tp, cp, ep = run.parallel.tp, run.parallel.cp, run.parallel.ep
    for key, value in (("parallel.tp x parallel.cp", tp * cp), ("parallel.ep", ep)):
        if processes % value:
            unit = math.lcm(tp * cp, ep)
            below = processes // unit * unit
            numbers = [str(n) for n in (below, below + unit) if n and _batch_divides(run, n)]
            remedy = f"try {_difference(run.parallel, nearest_layout(run, processes))}"
            if numbers:
                remedy += f", or {' or '.join(numbers)} processes"
            rule = f"must divide the number of processes={processes}"
            raise ConfigError(key, value, rule, remedy)


def nearest_layout(run: "Run", processes: int) -> "Parallel":
    """The layout over so many processes that is nearest to the one asked for.

    Near in powers of two, summed over the dimensions; with equal distances the smaller tp, then the
    smaller cp. Layouts over which `batch.tokens` divides come first.
    """
    asked = run.parallel

    def distance(layout: "Parallel") -> tuple[float, ...]:
        pairs = ((layout.tp, asked.tp), (layout.cp, asked.cp), (layout.ep, asked.ep))
        far = sum(abs(math.log2(own / wanted)) for own, wanted in pairs)
        return not _batch_divides(run, processes, layout), round(far, 6), layout.tp, layout.cp

    layouts = [
        asked.model_copy(
            update={"tp": tp, "cp": cp, "ep": ep, "sequence": asked.sequence and tp > 1}
        )
        for tp in _divisors(processes)
        for cp in _divisors(processes // tp)
        for ep in _divisors(processes)
    ]
    return min((layout for layout in layouts if not any(_broken(run, layout))), key=distance)


def _broken(run: "Run", parallel: "Parallel") -> Iterator[Rule]:
    """The rules that a layout breaks, in the order in which they are reported."""
    tp, cp, ep, seq_len = parallel.tp, parallel.cp, parallel.ep, run.data.seq_len
    if tp > 1 and run.optim.kind == "muon":
        yield Rule("tp", "splits the matrices that optim.kind=muon must see whole", 1)
    for key, size in _tp_splits(run.model).items():
        if size % tp:
            yield Rule("tp", f"must divide {key}={size}", size)
    parts = _ep_splits(run.model)
    if ep > 1 and not parts:
        yield Rule("ep", "splits groves and experts, of which model.ffn.pattern has none", 1)
    for key, size in parts.items():
        if size % ep:
            yield Rule("ep", f"must divide {key}={size}", size)
    if seq_len % cp:
        yield Rule("cp", f"must divide data.seq_len={seq_len}", seq_len)
        return
    piece, reach = seq_len // cp, _kernel_reach(run.model)
    if cp > 1 and piece < reach:
        text = f"leaves a rank {piece} tokens of data.seq_len={seq_len}, fewer than the {reach}"
        yield Rule("cp", f"{text} that model.attention.ada.taps looks back", seq_len)
    if piece % tp and (parallel.sequence or parts):
        why = "parallel.sequence=true" if parallel.sequence else "tokens go to groves or experts"
        text = f"must divide data.seq_len / parallel.cp = {piece} where {why}"
        yield Rule("tp", text, piece)


def _tp_splits(model: "Model") -> dict[str, int]:
    """What tensor parallelism splits, of the kinds that the layers use."""
    attention, ffn = model.attention, model.ffn
    heads = {
        "ada": {"ada.heads": attention.ada.heads},
        "softmax": {
            "softmax.heads": attention.softmax.heads,
            "softmax.kv_heads": attention.softmax.kv_heads,
        },
        "mla": {"mla.heads": attention.mla.heads},
    }
    widths = {
        "dense": {"dense.hidden": ffn.dense.hidden},
        "kan": {"kan.rank": ffn.kan.rank},
        "grove": {"grove.kan.rank": ffn.grove.kan.rank} if ffn.grove.shared else {},
        "moe": {"moe.shared_hidden": ffn.moe.shared_hidden},
    }
    sizes: dict[str, int] = {}
    for layer in range(model.layers):
        for name, size in heads[model.attention_kind(layer)].items():
            sizes[f"model.attention.{name}"] = size
        for name, size in widths[model.ffn_kind(layer)].items():
            sizes[f"model.ffn.{name}"] = size
    if model.vocab_size is None:  # `Model.padded_vocab` will be a multiple
        return {**sizes, "model.vocab_multiple": model.vocab_multiple}
    return {**sizes, "model.vocab_size": model.vocab_size}


def _ep_splits(model: "Model") -> dict[str, int]:
    """What expert parallelism splits, of the kinds that the layers use."""
    parts = {
        "grove": ("model.ffn.grove.groves", model.ffn.grove.groves),
        "moe": ("model.ffn.moe.experts", model.ffn.moe.experts),
    }
    kinds = {model.ffn_kind(layer) for layer in range(model.layers)}
    return dict(parts[kind] for kind in ("grove", "moe") if kind in kinds)


def _kernel_reach(model: "Model") -> int:
    """Tokens before its own that an ADA key kernel reads: all from the one rank before."""
    kinds = {model.attention_kind(layer) for layer in range(model.layers)}
    ada = model.attention.ada
    return ada.taps - 1 if "ada" in kinds and ada.kernel != "none" else 0


def _batch_divides(run: "Run", processes: int, layout: "Parallel | None" = None) -> bool:
    layout = layout or run.parallel
    dp = processes // (layout.tp * layout.cp)
    return run.batch.tokens % (run.data.seq_len * run.batch.micro * dp) == 0


def _try(run: "Run", rule: Rule) -> str:
    """The nearest values of the rule's key, below and above, that break no rule of that key."""
    value = getattr(run.parallel, rule.key)

    def allowed(other: int) -> bool:
        changed = run.parallel.model_copy(update={rule.key: other})
        return all(broken.key != rule.key for broken in _broken(run, changed))

    good = [n for n in _divisors(rule.whole) if allowed(n)]
    near = [*[n for n in good if n < value][-1:], *[n for n in good if n > value][:1]]
    return f"try {' or '.join(map(str, near))}"


def _difference(old: "Parallel", new: "Parallel") -> str:
    keys = [key for key in ("tp", "cp", "ep") if getattr(old, key) != getattr(new, key)]
    words = [f"parallel.{key}={getattr(new, key)}" for key in keys]
    if old.sequence != new.sequence:
        words.append("parallel.sequence=false")
    return " ".join(words)


def _divisors(whole: int) -> list[int]:
    return [n for n in range(1, whole + 1) if whole % n == 0]


class UsedLayout(NamedTuple):
    """Which ways of splitting a run uses: what decides how many operations a layer takes."""

    zero: int
    several: bool  # ranks
    tp: bool
    cp: bool
    ep: bool
    sequence: bool

    @classmethod
    def of(cls, run: "Run", ranks: int) -> Self:
        layout = run.parallel
        return cls(
            run.zero.stage,
            ranks > 1,
            layout.tp > 1,
            layout.cp > 1,
            layout.ep > 1,
            layout.sequence and layout.tp > 1,
        )

    def agreeing(self, other: "UsedLayout") -> int:
        """In how many of them they are alike."""
        return sum(a == b for a, b in zip(self, other, strict=True))

    def __str__(self) -> str:
        words = [name for name in ("tp", "cp", "ep", "sequence") if getattr(self, name)]
        return ", ".join([f"ZeRO {self.zero}", *(words or ["dp" if self.several else "one GPU"])])
