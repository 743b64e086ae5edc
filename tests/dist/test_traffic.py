"""What the model's collectives send is what the dry run says (`pytest -s` prints the table)."""

from typing import Any

import pytest

from tests.dist.harness import WHOLE, run_ranks

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not WHOLE, reason="takes minutes; `make test-matrix` runs it"),
]
WORKERS = "tests.dist.traffic_workers"
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp 2": {"tp": 2},
        "tp 2, sequence": {"tp": 2, "sequence": True},
        "cp 2": {"cp": 2},
        "ep 2": {"ep": 2},
    },
    4: {
        "tp 4": {"tp": 4},
        "cp 4": {"cp": 4},
        "ep 4": {"ep": 4},
        "tp 2, cp 2, ep 4, sequence": {"tp": 2, "cp": 2, "ep": 4, "sequence": True},
    },
}
CASES = {
    "plain": [],
    "checkpointed": ["engine.activation_checkpointing=true", "data.document_aware=true"],
    "bf16, switches": [
        "engine.precision=bf16",
        "model.tie_embeddings=false",
        "model.attention.ada.kernel=ode",
        "model.attention.ada.output_norm=false",
        "model.attention.ada.qk_rank=[[8,6,4,2],[2,4,6,8]]",
        "model.attention.softmax.qk_norm=false",
        "model.attention.mla.q_rank=12",
        "model.ffn.kan.routing=straight_through",
        "model.ffn.kan.edge.base=none",
        "model.ffn.grove.shared=false",
        "model.ffn.grove.z_loss=0",
        "model.ffn.moe.z_loss=1e-3",
        "model.ffn.moe.shared_hidden=0",
    ],
}


Row = tuple[str, str, str, float, float]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("meters"))
    plain = {"plain": CASES["plain"]}
    result: dict[str, Any] = run_ranks(
        "both", 2, module=WORKERS, timeout=300, layouts=LAYOUTS[2], cases=plain, folder=folder
    )
    return result


def compare(rows: list[Row], ranks: int) -> None:
    """Tensor and context parallelism exactly; all-to-all as random routing makes it."""
    rows = [row for row in rows if row[3] or row[4]]
    for layout, case, kind, counted, predicted in rows:
        print(f"| {ranks} | {layout} | {case} | {kind} | {counted:,.0f} | {predicted:,.0f} |")
        close = {"rel": 0.05} if kind == "groves and experts" else {"abs": 0.5}
        assert counted == pytest.approx(predicted, **close), (layout, case, kind)
    assert len({kind for _, _, kind, _, _ in rows}) == 3


def test_two_ranks_send_what_is_predicted(on_two_ranks: dict[str, Any]) -> None:
    compare(on_two_ranks["traffic"], 2)


def test_four_ranks_send_what_is_predicted() -> None:
    rows = run_ranks("traffic", 4, module=WORKERS, timeout=300, layouts=LAYOUTS[4], cases=CASES)
    compare(rows, 4)


def test_meters_average_over_all_ranks(on_two_ranks: dict[str, Any]) -> None:
    line = on_two_ranks["meters"]
    assert line["loss"] == 3.0
    assert line["joules"] == 8.0
    assert (line["phase_joules"]["startup"], line["phase_joules"]["training"]) == (4.0, 4.0)
    assert (line["seconds_split"]["alltoall"], line["slowest_rank"]) == (0.25, 0)
    assert line["comm"] == {"alltoall_bytes": 50.0, "alltoall_seconds": 0.5}
    assert line["model"] == {
        "0.time_constant_mean": 9.0, "time_constant_mean": 9.0,
        "0.time_constant_max": 16.0, "time_constant_max": 16.0,
        "1.load_cv": 0.5, "load_cv": 0.5, "1.load_max": 1.5, "load_max": 1.5,
        "1.dropped": 0.25, "dropped": 0.25,
    }  # fmt: skip
