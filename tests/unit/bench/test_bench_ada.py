"""`kalmagrove bench ada` on tiny shapes, and what its checks let pass."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kalmagrove.bench import ada, ada_ours, ada_peers
from kalmagrove.bench.check import check, expected
from kalmagrove.bench.spec import Case, Function, Implementation, Inputs
from kalmagrove.bench.suites import ADA
from kalmagrove.bench.timing import launch_ms, sets_for
from kalmagrove.cli import main

pytestmark = pytest.mark.unit
SHAPE = {"B": 2, "T": 37, "H": 3, "D": 8, "P": 4}
CASES = {case.op: case for case in ada.cases(tiny=True)}
TIMES = {"median_ms", "min_ms", "floor_ms", "of_floor", "pass", "graph", "peak_extra_bytes"}
FIELDS = TIMES | {"op", "impl", "ours", "shape", "check", "errors", "gpu", "versions", "commit"}


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def drawn(function: Function, shape: dict[str, Any], dtype: torch.dtype = torch.float32) -> Inputs:
    return function.inputs(shape, torch.Generator().manual_seed(0), dtype)


def verdict(run: Any, function: Function, case: Case) -> str:
    inputs = drawn(function, case.shape)
    return check(case, Implementation("tried", run), expected(case, function, inputs)).check


def test_tiny_run_measures_pytorch_and_lists_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    words = ["bench", "ada", "--device", "cpu", "--tiny", "--rounds", "1", "--out", str(out)]
    assert main(words) == 0
    written = json.loads(out.read_text())
    assert written["header"]["suite"] == "ada"
    assert written["header"]["launch_ms"] is None
    records = written["records"]
    assert all(record.keys() >= FIELDS for record in records)
    measured = {(r["op"], r["impl"]) for r in records if r["median_ms"] is not None}
    assert measured == {(op, "torch") for op in ada.FUNCTIONS} | {("ada", "sdpa")}
    for record in records:
        if record["median_ms"] is None:
            assert record["check"].startswith("unavailable: ")
            assert record["ours"] or record["impl"].startswith("fla")
        else:
            assert record["check"] == "ok"
            ratio = record["median_ms"] / record["floor_ms"]
            assert record["of_floor"] == pytest.approx(ratio, abs=1e-2)
    passes = {op: {r["pass"] for r in records if r["op"] == op and r["pass"]} for op in CASES}
    assert passes.pop("ada_decode") == {"fwd"}
    assert all(found == {"fwd", "bwd", "fwd+bwd"} for found in passes.values())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_our_kernels_pass_their_check_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    words = ["bench", "ada", "--device", "cpu", "--tiny", "--rounds", "1", "--impl", "ours"]
    words += ["--ops", "ada_norm_gate,ada_decode", "--out", str(out)]
    run = subprocess.run(
        [sys.executable, "-m", "kalmagrove", *words],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    records = json.loads(out.read_text())["records"]
    assert {(r["op"], r["check"]) for r in records} == {
        ("ada_decode", "ok"),
        ("ada_norm_gate", "ok"),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu", "--tiny", "--ops", "x"], "--ops=x must be one of ada_decode"),
        (["--device", "cpu", "--tiny", "--impl", "x"], "--impl=x must be one of ours"),
        (["--device", "cpu", "--tiny", "--tune"], "unrecognized arguments: --tune"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["bench", "ada", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_every_case_has_a_function_and_implementations() -> None:
    for tiny in (False, True):
        ops = {case.op for case in ADA.cases(tiny=tiny)}
        assert ops == set(ADA.functions) == set(ADA.ours) == set(ADA.peers)
    shapes = [case.shape for case in ADA.cases(tiny=False) if case.op == "ada"]
    assert {(s["B"], s["T"], s["H"], s["D"]) for s in shapes} == {
        (1, 16384, 16, 128), (4, 4096, 16, 128), (8, 2048, 32, 64), (1, 65536, 16, 128),
        (32, 1024, 16, 64),
    }  # fmt: skip


REFERENCE = [
    ("ada", ada_ours.attention("reference"), ada.ATTENTION),
    ("ada", ada_ours.attention("reference"), ada.LEARNED),
    ("ada", ada_ours.attention("reference"), ada.PLAIN),
    ("ada_prepare", ada_ours.prepare("reference"), ada.FUNCTIONS["ada_prepare"]),
    ("ada_norm_gate", ada_ours.norm_gate("reference"), ada.FUNCTIONS["ada_norm_gate"]),
    ("ada_decode", ada_ours.decode("reference"), ada.FUNCTIONS["ada_decode"]),
]


@pytest.mark.parametrize(("op", "run", "function"), REFERENCE)
def test_our_ops_are_called_as_they_are(op: str, run: Any, function: Function) -> None:
    assert verdict(run, function, CASES[op]) == "ok"


# The reference in pieces.


@pytest.mark.parametrize("function", [ada.ATTENTION, ada.LEARNED, ada.PLAIN])
def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, function: Function) -> None:
    case, inputs = Case("ada", SHAPE), drawn(function, SHAPE)
    whole = expected(case, function, inputs)
    monkeypatch.setattr(ada, "PIECE", SHAPE["B"] * SHAPE["T"] * SHAPE["D"] * 2)
    assert [len(p["log_decay"]) for p in ada.by_heads(inputs, SHAPE)] == [2, 1]
    found = expected(case, function, inputs)
    assert found.exact.keys() == whole.exact.keys()
    for name, exact in whole.exact.items():
        parts = [p[name].flatten() for p in ada.by_heads({name: exact}, SHAPE)]
        assert found.exact[name].shape == (exact.numel(),)
        torch.testing.assert_close(found.exact[name], torch.cat(parts))
        assert found.limits[name] == pytest.approx(whole.limits[name], rel=0.1)


def test_a_wrong_head_shows_in_any_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ada, "PIECE", 1)

    def last_head_wrong(inputs: Inputs, shape: dict[str, Any]) -> torch.Tensor:
        y = ada.attention_reference(inputs, shape)
        return torch.cat([y[:, :, :-1], 1.01 * y[:, :, -1:]], dim=2)

    assert verdict(ada.attention_reference, ada.ATTENTION, Case("ada", SHAPE)) == "ok"
    found = verdict(last_head_wrong, ada.ATTENTION, Case("ada", SHAPE))
    assert found.startswith("failed: y is off by")


@pytest.mark.parametrize("scores", [1, 2**33])
def test_softmax_is_checked_by_the_formula(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    monkeypatch.setattr(ada_peers, "SCORES", scores)
    monkeypatch.setattr(ada_peers, "QUERIES", 10)
    inputs, case = drawn(ada_peers.SOFTMAX, SHAPE), Case("ada", SHAPE)
    pieces = ada_peers._some_heads(inputs, SHAPE)
    assert len(pieces) == (1 if scores == 1 else SHAPE["H"])
    assert verdict(ada_peers._sdpa, ada_peers.SOFTMAX, case) == "ok"
    wrong = verdict(lambda i, s: 1.01 * ada_peers._sdpa(i, s), ada_peers.SOFTMAX, case)
    assert wrong.startswith("failed: y is off by")


def test_products_in_bf16_set_the_limit_of_bf16() -> None:
    case, inputs = Case("ada", SHAPE), drawn(ada.ATTENTION, SHAPE, torch.bfloat16)
    limits = expected(case, ada.ATTENTION, inputs).limits
    strict = expected(case, ada.ATTENTION._replace(rounded=None), inputs).limits
    assert all(1e-3 < strict[name] < limits[name] < 2e-2 for name in limits)
    wide = drawn(ada.ATTENTION, SHAPE)
    assert max(expected(case, ada.ATTENTION, wide).limits.values()) < 2e-5


def test_taps_in_the_order_of_a_convolution() -> None:
    turned = ada_peers._reversed(ada.FUNCTIONS["ada_prepare"])
    shape = SHAPE | {"steps": "conv"}
    inputs = drawn(turned, shape)
    weight, padded = inputs["taps"].unsqueeze(1), torch.nn.functional.pad
    x_BCT = padded(inputs["x"].transpose(1, 2), (SHAPE["P"] - 1, 0))
    y = torch.nn.functional.conv1d(x_BCT, weight, groups=len(weight)).transpose(1, 2)
    torch.testing.assert_close(ada.heads(y, shape), turned.reference(inputs, shape))


# One token.


def test_decoding_may_write_into_its_inputs() -> None:
    function, case = ada.FUNCTIONS["ada_decode"], CASES["ada_decode"]

    def in_place(inputs: Inputs, shape: dict[str, Any]) -> Any:
        o, state, tail = function.reference(inputs, shape)
        inputs["state"].copy_(state)
        inputs["tail"].copy_(tail)
        return o, inputs["state"], inputs["tail"]

    def forgetful(inputs: Inputs, shape: dict[str, Any]) -> Any:
        return function.reference(inputs, shape)[0], inputs["state"], inputs["tail"]

    inputs = drawn(function, case.shape)
    before = {name: t.clone() for name, t in inputs.items()}
    truth = expected(case, function, inputs)
    for _ in range(2):
        assert check(case, Implementation("tried", in_place), truth).check == "ok"
    assert all(torch.equal(t, before[name]) for name, t in inputs.items())
    found = check(case, Implementation("tried", forgetful), truth).check
    assert "state is off" in found
    assert "tail is off" in found


def test_a_token_continues_the_rows() -> None:
    """Of two tokens by the attention, the second is that of the decoder after the first."""
    shape = {"B": 2, "T": 1, "H": 2, "D": 8, "P": 4}
    inputs = drawn(ada.FUNCTIONS["ada_decode"], shape)
    o, _, _ = ada.decode_reference(inputs, shape)
    past = torch.cat([inputs["tail"], inputs["k"].unsqueeze(1)], dim=1)
    k_BC = sum(past[:, 3 - p] * inputs["taps"][:, p] for p in range(4))
    angles = ada._angles(ada.POSITION, 1, shape, o.device)
    q, k = (
        ada.positioned(ada.heads(x.unsqueeze(1), shape), angles)[:, 0] for x in (inputs["q"], k_BC)
    )
    kept = inputs["state"] * inputs["log_decay"].exp()[:, None, None]
    state = kept + k.unsqueeze(3) * inputs["v"].unsqueeze(2)
    torch.testing.assert_close(o, 8**-0.5 * torch.einsum("bhr,bhrv->bhv", q, state))


# Costs and times.


def test_the_floor_reads_and_writes_everything_once() -> None:
    inputs = drawn(ada.ATTENTION, SHAPE, torch.bfloat16)
    cost = ada.attention_costs(SHAPE, inputs)
    x, weights = 2 * 2 * 37 * 3 * 8, 4 * (3 * 8 * 4 + 3)
    assert (cost["fwd"].moved, cost["bwd"].moved) == (4 * x + weights, 7 * x + 2 * weights)
    assert cost["fwd"].flops == 2 * 37 * 3 * (4 * 8 * 8) + 2 * x // 2 * 4
    decode = ada.FUNCTIONS["ada_decode"]
    token = CASES["ada_decode"].shape
    inputs = drawn(decode, token, torch.bfloat16)
    numbers = 2 * 2 * 16
    state, tail, taps = 4 * numbers * 16, 2 * 3 * numbers, 4 * 2 * 16 * 4 + 4 * 2
    moved = decode.costs(token, inputs)["fwd"].moved
    assert moved == 2 * (state + tail) + taps + 4 * 2 * numbers


def test_large_inputs_need_two_sets() -> None:
    cuda = torch.device("cuda")
    small, large = (torch.empty(n, dtype=torch.int8, device="meta") for n in (2**28, 2**30))
    assert (sets_for([small], cuda), sets_for([large], cuda)) == (4, 2)
    assert launch_ms(torch.device("cpu")) is None
