"""What a step costs the host: rows measured on a machine, and the numbers without them."""

import json
from pathlib import Path
from typing import Any

import pytest

from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import ConfigError, Run, load
from kalmagrove.config.layout import UsedLayout
from kalmagrove.nn import build_model
from kalmagrove.parallel import Groups
from kalmagrove.plan import HostTimes, predicted
from kalmagrove.plan.efficiency import machine_of, of
from kalmagrove.plan.host import PARAMETERS

pytestmark = pytest.mark.unit
USED = {"zero": 1, "several": False, "tp": False, "cp": False, "ep": False, "sequence": False}


def kind(attention: str, layer: float, ffn: str = "kan") -> dict[str, Any]:
    return {
        "attention": attention,
        "ffn": ffn,
        "layer": layer,
        "rest": 0.004,
        "optimizer_layer": 0.001,
        "optimizer_rest": 0.002,
    }


def written(folder: Path, *layouts: dict[str, Any]) -> str:
    path = folder / "host.json"
    path.write_text(json.dumps({"layouts": layouts}))
    return str(path)


def run_of(*words: str) -> Run:
    step = ["data.seq_len=2048", "batch.tokens=32768", "batch.micro=4", "model.vocab_size=32768"]
    return load(compose_tree("train", ["model=kan_135m", "ffn=kan", "zero=stage1", *step, *words]))


def test_measured_layers_are_multiplied(tmp_path: Path) -> None:
    both = [kind("ada", 0.010), kind("softmax", 0.005)]
    times = HostTimes.read(written(tmp_path, {"used": USED, "kinds": both}))
    run = run_of("attention=hybrid")
    ada = sum(run.model.attention_kind(i) == "ada" for i in range(30))
    assert 0 < ada < 30
    cost = times.cost(run, 1)
    assert cost.passes == pytest.approx(ada * 0.010 + (30 - ada) * 0.005 + 0.004)
    assert cost.optimizer == pytest.approx(30 * 0.001 + 0.002)
    assert cost.notes == ()
    again = times.cost(run_of("attention=hybrid", "engine.activation_checkpointing=true"), 1)
    assert again.passes - 0.004 == pytest.approx((cost.passes - 0.004) * 4 / 3)


def test_a_step_is_as_long_as_the_slower_of_host_and_gpu(tmp_path: Path) -> None:
    run = run_of("attention=ada")
    alone = machine_of("NVIDIA H200", 1, None)
    assert alone is not None

    def seconds(layer: float) -> float:
        times = HostTimes.read(written(tmp_path, {"used": USED, "kinds": [kind("ada", layer)]}))
        return predicted(run, alone, 1, times).step_seconds

    assert seconds(1e-6) == seconds(1e-5), "hidden behind the GPU's work"
    assert seconds(0.2) - seconds(0.1) == pytest.approx(4 * 30 * 0.1), "four micro-batches"


def test_the_nearest_layout_is_taken_and_said(tmp_path: Path) -> None:
    plain = {"used": USED, "kinds": [kind("ada", 0.010)]}
    split = {"used": {**USED, "several": True, "tp": True}, "kinds": [kind("ada", 0.020)]}
    times = HostTimes.read(written(tmp_path, plain, split, {"failed": "out of memory"}))
    run = run_of("attention=ada", "model.attention.ada.heads=8", "parallel.tp=2")
    assert times.cost(run, 2).passes == pytest.approx(30 * 0.020 + 0.004)
    sequence = run_of(
        "attention=ada", "model.attention.ada.heads=8", "parallel.tp=2", "parallel.sequence=true"
    )
    cost = times.cost(sequence, 2)
    assert cost.passes == pytest.approx(30 * 0.020 + 0.004)
    assert cost.notes == ("host: of ZeRO 1, tp for ZeRO 1, tp, sequence",)
    other = times.cost(run_of("attention=ada", "zero=stage3"), 1)
    assert other[:2] == HostTimes().cost(run_of("attention=ada", "zero=stage3"), 1)[:2]
    assert "no ada + kan with ZeRO 3" in other.notes[0]


@pytest.mark.parametrize("text", ["", "[]", '{"layouts": [{"kinds": [{}]}]}', '{"layouts": []}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="host"):
        HostTimes.read(str(path))
    with pytest.raises(ConfigError, match="bench host"):
        HostTimes.read(str(tmp_path / "missing.json"))


@pytest.mark.parametrize("attention", ["ada", "softmax", "mla"])
@pytest.mark.parametrize("ffn", ["dense", "kan", "grove", "moe"])
def test_parameters_are_those_of_the_layers(attention: str, ffn: str) -> None:
    words = ["model=kan_tiny", f"attention={attention}", f"ffn={ffn}", "model.vocab_size=64"]
    model = build_model(load(compose_tree("train", words)).model, Groups.single())
    block = model.blocks[0]  # type: ignore[index]
    assert len(list(block.parameters())) == PARAMETERS[attention] + PARAMETERS[ffn]


def test_without_measurements_kinds_and_zero_are_told_apart() -> None:
    plain, experts = run_of("attention=ada"), run_of("attention=ada", "ffn=moe")
    cost = HostTimes().cost(plain, 1)
    assert cost.passes == pytest.approx(30 * (of("host_ada") + of("host_kan")) + of("host_rest"))
    assert HostTimes().cost(experts, 1).passes > 2 * cost.passes
    sharded = HostTimes().cost(run_of("attention=ada", "zero=stage3"), 1).passes
    assert sharded - cost.passes == pytest.approx(30 * 15 * of("host_zero3"))
    pieces = HostTimes().cost(run_of("attention=ada", "parallel.cp=2"), 2).passes
    assert pieces - cost.passes == pytest.approx(30 * of("host_cp"))


def test_layouts_are_named() -> None:
    run = run_of("attention=ada")
    assert str(UsedLayout.of(run, 1)) == "ZeRO 1, one GPU"
    assert str(UsedLayout.of(run, 2)) == "ZeRO 1, dp"
