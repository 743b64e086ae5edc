"""`kalmagrove bench lengths`: what it makes of its words, and of steps that fail."""

import json
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kalmagrove.bench import lengths
from kalmagrove.cli import bench_lengths, main
from kalmagrove.cli.arguments import UsageError
from kalmagrove.config import ConfigError
from kalmagrove.config.counts import parameter_count
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit
TINY = ["model=kan_tiny", "model.vocab_size=64"]
ATTENTIONS = ["ada", "hybrid", "softmax"]


class PlainEngine:
    """The engine's interface with plain gradient descent in DeepSpeed's place."""

    accumulation = 1

    def __init__(self, model: torch.nn.Module, run: Any, groups: Groups) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def train_step(self, batches: list[Any], step: int) -> tuple[torch.Tensor, float]:
        output = self.model(**batches[0])
        output.loss.backward()
        self.optimizer.step()
        return output.nll, 1.0


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "connect", lambda run: torch.device("cpu"))
    monkeypatch.setattr(lengths, "disconnect", lambda: None)
    monkeypatch.setattr(lengths, "build_engine", PlainEngine)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(Groups, "init", lambda *_: Groups.single())
    monkeypatch.setattr(Groups, "reset", lambda: None)
    monkeypatch.setattr("kalmagrove.bench.layouts.barrier", lambda group: None)


def words(*more: str) -> list[str]:
    given = ["bench", "lengths", "--lengths", "16,32", "--tokens", "64", "--steps", "2"]
    return [*given, *more, *TINY]


def test_every_attention_at_every_length(
    plain: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "deep" / "lengths.json"
    assert main(words("--out", str(out))) == 0
    written = json.loads(out.read_text())
    header, records = written["header"], written["records"]
    assert header["suite"] == "lengths"
    assert header["tokens_per_step"] == 64
    assert header["activation_checkpointing"] is True
    assert list(header["parameters"]) == ATTENTIONS
    assert [(r["attention"], r["length"], r["rows"]) for r in records] == [
        (attention, length, 64 // length) for attention in ATTENTIONS for length in (16, 32)
    ]
    for record in records:
        assert record["check"] == "ok"
        assert len(record["step_seconds"]) == 2
        assert record["tokens_per_second"] > 0
        assert record["model_flops_per_second"] > 0
        assert record["loss"] == pytest.approx(4.2, abs=0.5)
        assert record["peak_bytes"] is None
        assert record.keys() >= {"gpu", "versions", "commit"}
    assert "tokens/s" in capsys.readouterr().out


def test_failures_are_listed_and_the_next_length_begins_anew(
    plain: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = count()

    def build(*_: Any) -> Any:
        errors = [torch.OutOfMemoryError("CUDA out of memory. Tried to"), ValueError("no\ntile")]
        number = next(built)
        if number > 1:
            return SimpleNamespace(accumulation=1, train_step=lambda *_: (torch.ones(()), 1.0))
        raise errors[number]

    monkeypatch.setattr(lengths, "build_engine", build)
    out = tmp_path / "l.json"
    assert main(words("--attentions", "ada,softmax", "--out", str(out))) == 0
    records = json.loads(out.read_text())["records"]
    assert [r["check"] for r in records] == [
        "failed: out of memory", "failed: ValueError: no", "ok", "ok",
    ]  # fmt: skip
    assert records[0]["tokens_per_second"] is None
    assert next(built) == 3, "one engine for both lengths of softmax"


def test_nothing_measured_is_an_exit_code(
    plain: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "l.json"
    assert main(words("--seconds", "-1", "--attentions", "ada", "--out", str(out))) == 1
    assert "not measured: ada 16; ada 32" in capsys.readouterr().out
    assert json.loads(out.read_text())["header"]["skipped"] == ["ada 16", "ada 32"]


def test_models_are_of_equal_size() -> None:
    runs = bench_lengths.contenders(ATTENTIONS, [1024, 131072], 131072, bench_lengths.DEFAULTS)
    sizes = [parameter_count(contender.first.model).total for contender in runs]
    assert 150e6 < sizes[0] < 400e6
    assert sizes == pytest.approx([sizes[0]] * 3, rel=0.01)
    assert f"{sizes[0] / 1e6:.0f}M parameters" in bench_lengths.USAGE
    assert [run.batch.micro for run in runs[0].runs.values()] == [128, 1]
    assert {run.accumulation(1) for each in runs for run in each.runs.values()} == {1}


def test_a_model_of_the_words_keeps_its_sizes() -> None:
    kept = bench_lengths._defaults(["model=kan_1b", "ffn=kan"])
    assert kept == [
        "model.vocab_size=8192", "optim=adamw", "engine.activation_checkpointing=true",
        "engine.refit_every=null",
    ]  # fmt: skip
    (only,) = bench_lengths.contenders(["ada"], [64], 64, [*kept, "model=kan_1b", "ffn=kan"])
    assert only.first.model.d_model == 2048
    assert lengths.matching_width(only.first.model, 10**9) is None


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (["--steps", "0"], ConfigError),
        (["--lengths", "48", "--tokens", "64"], ConfigError),
        (["--lengths", "128", "--tokens", "64"], ConfigError),
        (["--lengths", "many"], UsageError),
        (["model.backend=cpu"], ConfigError),
        (["--attentions", "none"], ConfigError),
    ],
)
def test_mistakes_are_one_line(wrong: list[str], error: type[Exception]) -> None:
    with pytest.raises(error):
        bench_lengths.main(wrong)


HEADER = {
    "parameters": {"ada": 10**8, "softmax": 10**8}, "tokens_per_step": 64, "gpu": None,
    "machine": "x86", "backend": "auto",
}  # fmt: skip


def test_plots_are_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert lengths.plot(tmp_path, HEADER, []) == []
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_plot_of_times_and_failures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    records = [
        {"attention": a, "length": n, "check": check, "tokens_per_second": speed}
        for a, check, speed in (("ada", "ok", 10.0), ("softmax", "failed: out of memory", None))
        for n in (16, 32)
    ]
    written = lengths.plot(tmp_path / "plots", HEADER, records)
    assert [path.name for path in written] == ["lengths.png", "lengths.svg"]
    assert all(path.stat().st_size > 1000 for path in written)
