"""The planner: predictions against what was measured, the search, the command, plan.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_run

from kalmagrove.cli import main
from kalmagrove.cli.compose import compose_tree
from kalmagrove.cli.run_folder import write_plan
from kalmagrove.config import Cluster, ConfigError, Plan, Run, load, validate
from kalmagrove.plan import predict, predicted, search, step_time
from kalmagrove.plan.efficiency import TABLE, machine_of, of
from kalmagrove.plan.host import Cost
from kalmagrove.plan.prediction import usable_bytes
from kalmagrove.track import flops_per_token
from tests import measured

pytestmark = pytest.mark.unit
QUICK = ["cluster.gpus=2", "cluster.gpus_per_node=2", "batch.tokens=262144", "show=2"]


def cluster(**changes: Any) -> Cluster:
    known = machine_of("NVIDIA H200", 8, 3.59)
    assert known is not None
    return validate(Cluster, known.model_dump() | changes)


def run_of(*words: str) -> Run:
    step = ["data.seq_len=2048", "batch.tokens=131072", "batch.micro=1", "model.vocab_size=32768"]
    return load(compose_tree("train", ["model=kan_1b", "zero=stage1", *step, *words]))


@pytest.fixture(scope="module")
def big() -> Run:
    return run_of()


@pytest.fixture(scope="module")
def rows() -> list[measured.Row]:
    return list(measured.rows())


def test_predicted_memory_is_within_a_tenth_of_every_measured_peak(
    rows: list[measured.Row],
) -> None:
    assert len(rows) == 47
    assert {r.name: r.memory_error for r in rows if abs(r.memory_error) > 0.1} == {}


def test_predicted_memory_holds_for_trainings_that_nothing_was_fitted_to() -> None:
    errors = sorted(abs(row.memory_error) for row in measured.unfitted())
    assert len(errors) == 15
    assert errors[-1] < 0.12  # one, ZeRO 3 on one GPU, misses the tenth that was aimed at
    assert errors[-2] < 0.06


def test_with_the_hosts_times_measured_there_steps_are_within_the_target() -> None:
    """But for an exchange of tokens, and on H100s, to which the plan extrapolates. Rows of 256
    tokens, the host measured with, were too few.
    """
    found = list(measured.on_the_spot())
    assert len(found) == 27
    assert {row.name: row.memory_error for row in found if abs(row.memory_error) > 0.1} == {}
    errors = {f"{row.group}, {row.name}": row.time_error for row in found}
    far = [name for name, error in errors.items() if abs(error) > 0.15 and "256" not in name]
    assert far == [
        "2,048 tokens: kan_135m, two GPUs, ep 2",
        "H100: kan_1b, ffn=kan, one GPU, ffn=kan, dp 1, ZeRO 1",
        "H100: kan_135m, two GPUs, dp 2, ZeRO 1",
    ]
    of_256 = sorted(abs(error) for name, error in errors.items() if "256" in name)
    assert of_256[-1] < 0.26
    assert sum(error > 0.15 for error in of_256) == 5


def test_predicted_steps_are_near_the_measured_ones(rows: list[measured.Row]) -> None:
    """One GPU within 15%; the layouts of two, of an old commit, within 25%."""
    alone = [r for r in rows if r.prediction.cluster.gpus == 1]
    assert {r.name: r.time_error for r in alone if abs(r.time_error) > 0.15} == {}
    assert {r.name: r.time_error for r in rows if abs(r.time_error) > 0.25} == {}


def test_efficiencies_say_where_they_are_from() -> None:
    root = measured.ROOT
    for name, row in TABLE.items():
        assert row.value > 0, name
        files = row.source.replace(",", " ").replace(";", " ").split()
        paths = [word for word in files if word.endswith((".json", ".md"))]
        assert all((root / path).is_file() for path in paths), name
        assert paths or "assumed" in row.what, name


def test_parts_of_a_step_follow_the_formulas(big: Run) -> None:
    parts = dict(step_time(big, cluster(gpus=1, gpus_per_node=1), Cost(0.0, 0.0)))
    flops = {r.component: r for r in flops_per_token(big.model, 2048, "kernels").rows}
    products = ("attention ada", "attention softmax", "logits")
    needed = sum(flops[name].forward + flops[name].backward for name in products)
    peak = of("products") * 989.5e12
    assert parts["matrix products"] == pytest.approx(131072 * needed / peak)
    loss = 131072 * 32768 * of("logits") / (of("copy") * 4.8e12)
    assert parts["loss"] == pytest.approx(loss)
    assert "tensor parallel" not in parts, "nothing is sent by one GPU"


def test_faster_machines_are_faster(big: Run) -> None:
    def seconds(run: Run = big, **changes: Any) -> float:
        parts = step_time(run, cluster(**changes), Cost(0.0, 0.0))
        return sum(part.seconds for part in parts)

    assert seconds(peak_tflops=2000.0) < seconds()
    assert seconds(memory_tbs=8.0) < seconds()
    assert seconds(link_gbs=900.0) < seconds()
    assert seconds(network_gbs=1.0) == seconds(), "one machine"
    apart = seconds(gpus_per_node=4)
    assert seconds(gpus_per_node=4, network_gbs=10.0) > apart > 0.99 * seconds()
    split = run_of("parallel.tp=2", "parallel.sequence=true")
    assert seconds(split, link_gbs=100.0) > seconds(split)
    cp = {"parallel": big.parallel.model_copy(update={"cp": 2})}
    assert seconds(big.model_copy(update=cp)) > 0
    alone = {"gpus": 1, "gpus_per_node": 1}  # with enough rows the GPU does not wait for the host
    again = run_of("engine.activation_checkpointing=true", "batch.micro=64")
    assert seconds(again, **alone) > 1.2 * seconds(run_of("batch.micro=64"), **alone)


def test_an_exchange_over_machines_waits_for_the_network() -> None:
    groves = run_of("ffn=grove", "parallel.ep=8")

    def seconds(**changes: Any) -> float:
        return dict(step_time(groves, cluster(**changes), Cost(0.0, 0.0)))["all-to-all"]

    inside = seconds()
    assert seconds(gpus_per_node=2, network_gbs=1000.0) < inside, "6 of 7 go out, fast"
    assert seconds(gpus_per_node=2, network_gbs=1.0) == pytest.approx(
        inside * of("exchange") * 450 * (6 / 7) / of("network")
    )


def test_prediction_adds_up(big: Run) -> None:
    one = predicted(big, cluster(), 10**9)
    assert one.tokens_per_s * one.step_seconds == pytest.approx(131072)
    assert one.hours * 3600 * one.tokens_per_s == pytest.approx(1e9)
    assert one.usd == pytest.approx(3.59 * 8 * one.hours)
    assert one.joules == pytest.approx(700 * 8 * 3600 * one.hours)
    peak = 989.5e12 * 8
    assert one.mfu == pytest.approx(one.tokens_per_s * one.flops / peak)
    assert one.hfu > one.mfu
    free = dataclasses.replace(one, cluster=cluster(usd_per_gpu_hour=None))
    assert free.usd is None, "an unknown price is not zero"
    assert json.loads(json.dumps(one.tree()))["layout"]["dp"] == 8


def test_what_is_not_measured_is_said(big: Run) -> None:
    alone = cluster(gpus=1, gpus_per_node=1)
    assert predicted(run_of("ffn=kan"), alone, 1).extrapolated == ()
    assert [t.split(":")[0] for t in predicted(big, alone, 1).extrapolated] == ["grove layers"]
    text = " ".join(predicted(big, cluster(gpu="NVIDIA H100", gpus_per_node=4), 1).extrapolated)
    for word in ("H100", "more than 2 GPUs", "several machines"):
        assert word in text
    latent = run_of("attention=mla", "ffn=kan")
    assert any(t.startswith("mla") for t in predicted(latent, alone, 1).extrapolated)


def test_search_keeps_what_fits_and_says_why_not(big: Run) -> None:
    small = cluster(memory_gb=10.0)
    result = search(big, small, 10**9)
    assert result.found
    assert all(one.peak_bytes <= usable_bytes(small) for one in result.found)
    times = [one.step_seconds for one in result.found]
    assert times == sorted(times)
    reasons = " ".join(refusal.reason for refusal in result.refused)
    assert "of a GPU's 9 usable" in reasons
    assert "must divide model.attention.softmax.kv_heads=4" in reasons
    layouts = [(o.run.parallel, o.run.zero.stage, o.run.engine) for o in result.found]
    assert len(set(map(str, layouts))) == len(layouts)
    for one in result.found[:3]:  # a larger micro-batch would not fit, or the step not divide
        micro = 2 * one.run.batch.micro
        batch = one.run.batch.model_copy(update={"micro": micro})
        larger = one.run.model_copy(update={"batch": batch})
        if 131072 % (2048 * micro * one.run.data_parallel(8)) == 0 and micro <= 32:
            assert predicted(larger, small, 1).peak_bytes > usable_bytes(small)


def test_plan_prints_layouts_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", "model=kan_135m", "compare=[dense_135m]", *QUICK, f"out={out}"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("kan_135m", "dense_135m", "Side by side", "The loss is not predicted",
                  "20 a parameter", "kalmagrove train model=kan_135m"):  # fmt: skip
        assert words in text
    models = json.loads(out.read_text())["models"]
    assert [m["model"] for m in models] == ["kan_135m", "dense_135m"]
    assert models[0]["layouts"][0]["tokens"] == models[1]["layouts"][0]["tokens"]
    assert models[0]["layouts"][0]["usd"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=dense_340b", "cluster=h100x8"], "cluster.gpus=8 cannot hold dense_340b; the"),
        (["search=false", "parallel.ep=3"], "parallel.ep=3 must divide model.ffn.grove.groves=8"),
        (["search=false", "batch.micro=64"], "cannot hold kan_1b"),
        (["cluster.gpus=12"], "cluster.gpus=12 must be whole machines"),
        (["engine.precision=fp32"], "engine.precision=fp32 is not planned for"),
        (["compare=[nope]", *QUICK], "model=nope is not an option"),
        (["cluster=nope"], "cluster=nope is not an option"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_sources_models_are_planned_side_by_side(capsys: pytest.CaptureFixture) -> None:
    layout = ["search=false", "zero=stage3", "parallel.tp=8", "parallel.sequence=true"]
    words = ["model=kan_340b", "compare=[moe_340b]", "cluster=h100x1024", "tokens=1000000000000"]
    again = "engine.activation_checkpointing=true"
    assert main(["plan", *words, *layout, "parallel.ep=16", again]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "$230k" in text
    assert "$2.1M" in text
    assert "it does not say how many it trained" in text


def test_plan_validates() -> None:
    tree = compose_tree("plan", [])
    assert validate(Plan, tree).cluster.gpus == 8
    with pytest.raises(ConfigError, match=r"cluster\.gpu_memory"):
        validate(Plan, tree | {"cluster": tree["cluster"] | {"gpu_memory": 1}})


def test_a_run_is_predicted_where_its_gpu_is_known(tmp_path: Path) -> None:
    run = make_run(zero={"stage": 1}, batch={"tokens": 64})
    tree = predict(run, "NVIDIA H200", 2)
    assert tree is not None
    assert tree["tokens"] == 8 * 64
    assert tree["usd"] is None
    assert predict(run, "NVIDIA GeForce GTX 1080", 2) is None
    assert predict(run, None, 2) is None
    assert predict(make_run(engine={"precision": "fp32"}), "NVIDIA H200", 2) is None
    for expected, plan in ((tree, tree), (tree, None)):  # what stood there first stays
        write_plan(tmp_path, plan)
        assert json.loads((tmp_path / "plan.json").read_text()) == expected
