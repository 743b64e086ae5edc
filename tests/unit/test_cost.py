"""Device-seconds and dollars: exact, and unknown where a price is."""

from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from kalmagrove.config import Price, Track, validate
from kalmagrove.track import Cost, Spent, show_usd
from kalmagrove.track.cost import Stored

pytestmark = pytest.mark.unit

CONF = Path(__file__).parents[2] / "conf"


def price(**figures: float | None) -> Price:
    return validate(Price, {"name": "test", "basis": "a test", **figures})


def test_gpus_are_counted_on_gpu_and_cores_on_cpu() -> None:
    both = price(usd_per_gpu_hour=2.0, usd_per_core_hour=0.04)
    assert Cost.of(both, "cuda", world_size=4, threads=64) == Cost(4, "gpu", 2.0)
    assert Cost.of(both, "cpu", world_size=4, threads=64) == Cost(64, "core", 0.04)


def test_dollars_are_device_hours_times_price() -> None:
    cost = Cost(8, "gpu", 2.69)
    assert cost.device_seconds(1800) == 14400
    assert cost.usd(14400) == Decimal("10.76")
    assert Cost(1, "gpu", 0.1).usd(3 * 3600) == Decimal("0.3"), "not 0.30000000000000004"


def test_an_unknown_price_is_unknown_forever_and_never_zero() -> None:
    unknown = Cost(2, "core", None)
    assert unknown.usd(3600) is None
    spent = Spent().plus(unknown, 10)
    assert spent == Spent(20.0, None, 10.0)
    assert spent.plus(Cost(2, "core", 0.04), 3600) == Spent(7220.0, None, 3610.0)
    assert show_usd(spent.usd) == "-"


def test_a_price_of_zero_is_a_known_price() -> None:
    assert Spent().plus(Cost(2, "core", 0.0), 10).usd == 0


def test_sessions_at_different_prices_add_up() -> None:
    spent = Spent().plus(Cost(1, "gpu", 2.0), 1800).plus(Cost(4, "gpu", 3.0), 3600)
    assert spent == Spent(1800 + 14400, Decimal(13), 5400)


def test_energy_and_storage_have_prices_of_their_own() -> None:
    cost = Cost(1, "gpu", 2.0, usd_per_kwh=0.3, usd_per_gb_month=0.1)
    month = 365.2425 / 12 * 24 * 3600
    assert cost.usd(3600, joules=7.2e6) == Decimal("2.6")
    assert cost.usd(3600, joules=0.0, byte_seconds=5e9 * month) == Decimal("2.5")
    assert cost.usd(3600, joules=None) is None, "energy has a price, and nobody measured it"
    assert Cost(1, "gpu", 2.0).usd(3600, joules=None) == 2
    assert Spent().plus(cost, 3600, joules=7.2e6).usd == Decimal("2.6")


def test_what_is_stored_counts_from_when_it_was_seen(tmp_path: Path) -> None:
    stored = Stored(tmp_path, 10.0)
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert stored.byte_seconds(20.0) == 0
    stored.look(20.0)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"x" * 50)
    assert (stored.bytes, stored.byte_seconds(22.0)) == (100, 200)
    stored.look(22.0)
    assert (stored.bytes, stored.byte_seconds(24.0)) == (150, 500)


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (Decimal("0.125"), "$0.13"),
        (2.675, "$2.68"),  # the decimal digits decide, not the binary fraction below them
        (1.005, "$1.01"),
        (0.0049, "<$0.01"),
        (0.005, "$0.01"),
        (0, "$0.00"),
        (1234567.891, "$1,234,567.89"),
        (None, "-"),
    ],
)
def test_shown_to_the_cent(amount: Decimal | float | None, shown: str) -> None:
    assert show_usd(amount) == shown


@pytest.mark.parametrize("file", sorted((CONF / "price").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_price_file_states_name_and_basis(file: Path) -> None:
    known = validate(Price, yaml.safe_load(file.read_text()))
    assert known.name == file.stem
    assert len(known.basis) > 10
    if known.usd_per_gpu_hour or known.usd_per_core_hour:
        assert "assumption" in known.basis


def test_track_files_are_valid() -> None:
    for file in sorted((CONF / "track").glob("*.yaml")):
        tree = yaml.safe_load(file.read_text())
        tree.pop("defaults", None)
        validate(Track, tree)
