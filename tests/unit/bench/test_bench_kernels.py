"""`kalmagrove bench kernels` on tiny shapes: end to end, and that wrong results get no time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kalmagrove.bench import report, runner, tune
from kalmagrove.bench.cases import cases
from kalmagrove.bench.check import check, expected, poisoned, relative
from kalmagrove.bench.ops import FUNCTIONS
from kalmagrove.bench.ours import OURS
from kalmagrove.bench.peers import PEERS
from kalmagrove.bench.spec import Case, Implementation, Inputs, UnavailableError
from kalmagrove.bench.suites import KERNELS
from kalmagrove.bench.timing import Ceilings, Task, ceilings, measure, peak_extra_bytes, sets_for
from kalmagrove.cli import main

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
FIELDS = {"op", "impl", "ours", "shape", "pass", "graph", "median_ms", "min_ms", "floor_ms"}
FIELDS |= {"peak_extra_bytes", "of_floor", "check", "errors", "gpu", "versions", "commit"}


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_tiny_run_measures_every_peer_and_lists_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "deep" / "k.json"
    words = ["bench", "kernels", "--device", "cpu", "--tiny", "--rounds", "1", "--out", str(out)]
    assert main([*words, "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "no claims" in printed
    assert str(out) in printed
    written = json.loads(out.read_text())
    assert written["header"]["claims"] is False
    assert written["header"]["skipped"] == []
    records = written["records"]
    assert all(record.keys() >= FIELDS for record in records)
    measured = {(r["op"], r["impl"]) for r in records if r["median_ms"] is not None}
    gpu_only = {"liger", "sonicmoe"}
    here = {(op, i.name) for op, each in PEERS.items() for i in each if i.name not in gpu_only}
    assert measured == here
    for record in records:
        if record["median_ms"] is None:
            assert record["check"].startswith("unavailable: ")
            assert record["ours"] or record["impl"] in gpu_only
        else:
            assert record["check"] == "ok"
            assert record["median_ms"] >= record["min_ms"] > 0
            assert record["floor_ms"] > 0
            assert record["graph"] is False
            assert record["peak_extra_bytes"] is None
    passes = {r["pass"] for r in records if (r["op"], r["impl"]) == ("kan_layer", "grouped_mm")}
    assert passes == {"fwd", "bwd", "fwd+bwd"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_our_kernels_pass_their_check_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "k.json"
    words = ["bench", "kernels", "--device", "cpu", "--tiny", "--rounds", "1"]
    words += ["--ops", "permute", "--impl", "ours", "--out"]
    run = subprocess.run(
        [sys.executable, "-m", "kalmagrove", *words, str(out)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    records = json.loads(out.read_text())["records"]
    assert {record["check"] for record in records} == {"ok"}
    assert len(records) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "nope is not a suite; use kernels, ada, lengths, layouts"),
        (["kernels", "--nope"], "unrecognized arguments: --nope"),
        (["kernels", "--rounds", "0"], "0 is not positive"),
        (["kernels", "--device", "cpu"], "--device cpu needs --tiny"),
        (["kernels", "--device", "cpu", "--tiny", "--ops", "x"], "--ops=x must be one of permute"),
        (["kernels", "--device", "cpu", "--tiny", "--impl", "x"], "--impl=x must be one of ours"),
        (["kernels", "--tune", "--device", "cpu", "--tiny"], "needs TRITON_INTERPRET=1"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["bench", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_of_suites(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench"]) == 2
    assert main(["bench", "--help"]) == 0
    assert "kalmagrove bench layouts" in capsys.readouterr().out
    for suite in ("kernels", "ada", "lengths", "layouts"):
        assert main(["bench", suite, "--help"]) == 0
        assert f"usage: kalmagrove bench {suite}" in capsys.readouterr().out


def test_without_time_left_cases_are_named(capsys: pytest.CaptureFixture) -> None:
    runner.run(KERNELS, device="cpu", tiny=True, ops=["permute"], rounds=1, seconds=-1.0)
    assert "not measured: permute N=63 K=3 C=12; permute N=48" in capsys.readouterr().out


def test_every_case_has_a_function_and_implementations() -> None:
    for tiny in (False, True):
        ops = {case.op for case in cases(tiny=tiny)}
        assert ops == set(FUNCTIONS) == set(OURS) == set(PEERS)
        for case in cases(tiny=tiny):
            assert sum(case.shape.get("rows", [case.shape["N"]])) == case.shape["N"]


# What fails its check is refused.

PROJECTION = Case("projection", {"N": 40, "D": 16, "M": 6, "K": 2, "R": 4})


def verdict(run: Any, case: Case = PROJECTION, backend: str | None = None) -> str:
    function = FUNCTIONS[case.op]
    inputs = function.inputs(case.shape, torch.Generator().manual_seed(0), torch.float32)
    implementation = Implementation("tried", run, backend=backend)
    return check(case, implementation, expected(case, function, inputs)).check


def right(inputs: Inputs, shape: dict[str, Any]) -> torch.Tensor:
    return FUNCTIONS["projection"].reference(inputs, shape)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return 1.001 * dy


def raising(error: Exception) -> Any:
    def run(inputs: Inputs, shape: dict[str, Any]) -> torch.Tensor:
        raise error

    return run


def test_right_results_pass() -> None:
    assert verdict(right) == "ok"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda i, s: 1.001 * right(i, s), "failed: y is off by 0.001"),
        (lambda i, s: WrongGradient.apply(right(i, s)), "failed: dkept is off by 0.001"),
        (lambda i, s: right(i, s) + torch.empty(40, 16), "failed: y is off by nan"),
        (lambda i, s: right(i, s) + torch.empty_like(i["x"]), "failed: y is off by nan"),
        (lambda i, s: right(i, s) + i["x"].new_empty(40, 16), "failed: y is off by nan"),
        (lambda i, s: right(i, s)[:-1], "failed: "),
        (raising(UnavailableError("not installed")), "unavailable: not installed"),
        (raising(KeyError("backend='cuda' must be")), "unavailable: "),
        (raising(KeyError("a_kernel")), "failed: 'a_kernel'"),
        (raising(RuntimeError("backend=cuda is missing here")), "unavailable: backend=cuda"),
        (raising(RuntimeError("nvcc could not compile; choose backend='triton'")), "failed: nvcc"),
        (raising(RuntimeError("illegal memory access")), "failed: illegal memory access"),
    ],
)
def test_wrong_results_and_missing_backends(run: Any, message: str) -> None:
    assert verdict(run).startswith(message)


def test_edges_must_be_the_largest_ones() -> None:
    case = Case("edge_topk", {"N": 30, "M": 9, "K": 3})
    reference = FUNCTIONS["edge_topk"].reference

    def second_best(inputs: Inputs, shape: dict[str, Any]) -> Any:
        if "index_NK" in inputs:
            return reference(inputs, shape)
        index_NK = reference(inputs, shape | {"K": 4}).index_NK[:, 1:]
        return reference(inputs | {"index_NK": index_NK}, shape)

    def mislabelled(inputs: Inputs, shape: dict[str, Any]) -> Any:
        kept = reference(inputs, shape)
        return kept._replace(index_NK=kept.index_NK.flip(1))

    def forgetful(inputs: Inputs, shape: dict[str, Any]) -> Any:
        return reference(inputs, shape)._replace(energy=torch.zeros(()))

    assert verdict(reference, case) == "ok"
    assert "magnitude is off" in verdict(second_best, case)
    assert "index is off" in verdict(mislabelled, case)
    assert "energy is off" in verdict(forgetful, case)


def test_the_order_of_pairs_must_be_exact() -> None:
    case = Case("permute", {"N": 20, "K": 2, "C": 5})
    reference = FUNCTIONS["permute"].reference
    assert verdict(reference, case) == "ok"
    flipped = verdict(lambda i, s: [t.flip(0) for t in reference(i, s)], case)
    assert flipped.startswith("failed: order is off")


def test_a_refused_implementation_has_no_time_and_the_exit_code_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wrong = Implementation("ours", lambda i, s: 2 * right(i, s), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(OURS, "projection", [wrong])
    code = runner.run(
        KERNELS, device="cpu", tiny=True, ops=["projection"], implementations=["ours"], rounds=1
    )
    assert code == 1
    assert "ours: failed: y is off by" in capsys.readouterr().out
    found = runner.measure_case(
        PROJECTION, FUNCTIONS["projection"], [wrong], CPU, Ceilings(1e9, 1e9), 1, 0
    )
    assert [record["median_ms"] for record in found] == [None]


def test_poison_is_gone_afterwards() -> None:
    before = torch.empty
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert not torch.empty(3, dtype=torch.int32).float().isnan().any()
    assert torch.empty is before
    assert "new_empty" not in vars(torch.Tensor)


def test_relative_error() -> None:
    one = torch.ones(4, dtype=torch.float64)
    assert relative(1.5 * one, one) == pytest.approx(0.5)
    assert relative(one, 0 * one) == pytest.approx(2.0)
    assert relative(one[:3], one) == float("inf")
    assert relative(one[:0], one[:0]) == 0.0


# Time, memory, report.


def test_tasks_take_turns() -> None:
    seen: list[str] = []
    tasks = [Task(lambda _, n=name: seen.append(n), calls=2) for name in "ab"]
    measure(tasks, rounds=3, device=CPU)
    assert seen == ["a", "b"] * 3
    assert all(len(task.samples) == 3 for task in tasks)
    assert peak_extra_bytes(tasks[0], CPU) is None
    assert sets_for([torch.ones(2)], CPU) == 1


def test_floor_is_the_larger_of_both() -> None:
    top = Ceilings(bytes_per_s=1e3, flops_per_s=1e6)
    assert top.floor_ms(flops=1e6, moved=0) == pytest.approx(1e3)
    assert top.floor_ms(flops=1e6, moved=2e3) == pytest.approx(2e3)
    measured = ceilings(CPU, rounds=1)
    assert min(measured) > 0


def test_costs_of_the_layer_are_those_of_its_matrices() -> None:
    shape = {"N": 10, "D": 16, "M": 6, "K": 2, "R": 4}
    function = FUNCTIONS["kan_layer"]
    inputs = function.inputs(shape, torch.Generator(), torch.bfloat16)
    cost = function.costs(shape, inputs)
    assert cost["fwd"].flops == 2 * 10 * 16 * (6 + 2 * 2 * 4)
    assert cost["bwd"].flops == 2 * cost["fwd"].flops
    elements = 2 * 10 * 16 + 6 * 16 + 2 * 6 * 4 * 16 + 6 * 11 + 6
    assert cost["fwd"].moved == 2 * elements


def test_dense_peers_have_as_many_parameters() -> None:
    shape = {"N": 4, "D": 8, "M": 104, "K": 8, "R": 64}
    by_name = {peer.name: peer.function for peer in PEERS["kan_layer"] if peer.function}
    sizes = {
        name: sum(t.numel() for t in inputs.values() if t.requires_grad) - 4 * 8
        for name in ("dense", "dense-active")
        for inputs in [by_name[name].inputs(shape, torch.Generator(), torch.float32)]
    }
    assert sizes["dense"] == pytest.approx(8 * 104 * (1 + 2 * 64), rel=0.01)
    assert sizes["dense-active"] == pytest.approx(8 * (104 + 2 * 8 * 64), rel=0.01)


def test_replayed_backward_is_a_difference() -> None:
    base = {"impl": "a", "graph": True, "method": "direct", "median_ms": 1.0, "min_ms": 0.5}
    records = [
        base | {"pass": "fwd", "floor_ms": 0.2},
        base | {"pass": "fwd+bwd", "median_ms": 3.0, "min_ms": 2.0, "floor_ms": 0.6},
        base | {"impl": "b", "pass": "fwd", "floor_ms": 0.2},
        base | {"pass": "fwd+bwd", "graph": False, "floor_ms": 0.6},
    ]
    (found,) = runner._graph_backwards(records)
    assert (found["pass"], found["method"], found["graph"]) == ("bwd", "difference", True)
    assert (found["median_ms"], found["min_ms"]) == (2.0, 1.5)
    assert found["floor_ms"] == pytest.approx(0.4)


def test_plots_are_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.plot(tmp_path, {}, []) == []
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_plots_show_every_op(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    base = {"shape": {"N": 4}, "pass": "fwd", "graph": True, "ours": True, "floor_ms": 0.1}
    records = [
        base | {"op": op, "impl": impl, "median_ms": ms}
        for op in ("permute", "projection")
        for impl, ms in (("ours", 1.0), ("torch.sort", 2.0), ("refused", None))
    ]
    header = {"suite": "kernels", "gpu": None, "machine": "x86", "dtype": "float32"}
    written = report.plot(tmp_path / "plots", header, records)
    assert {path.name for path in written} == {
        f"kernels_{op}.{ending}" for op in ("permute", "projection") for ending in ("png", "svg")
    }
    assert all(path.stat().st_size > 1000 for path in written)


def test_the_best_tile_is_the_fastest_right_one() -> None:
    base = {"op": "projection", "stage": "rank", "kind": "r64", "current": False}
    records = [
        base | {"tile": {"rows": 1}, "ms": 3.0, "current": True},
        base | {"tile": {"rows": 2}, "ms": 2.0},
        base | {"tile": {"rows": 4}, "ms": None},
    ]
    entry = tune.best(records)["projection"]["rank"]["r64"]
    assert entry == {"ms": 2.0, "current_ms": 3.0, "tile": {"rows": 2}}
