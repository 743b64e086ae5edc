"""Layouts: what cannot be split is refused early, with the nearest that can."""

from typing import Any

import pytest
from tiny_run import make_run

from kalmagrove.config import ConfigError, Run
from kalmagrove.config.layout import nearest_layout

pytestmark = pytest.mark.unit


HOMES = {
    **dict.fromkeys(("ada", "softmax", "mla"), ("model", "attention")),
    **dict.fromkeys(("dense", "moe", "kan", "grove"), ("model", "ffn")),
    **dict.fromkeys(("tp", "cp", "ep", "sequence"), ("parallel",)),
}


def run(kinds: str = "softmax dense", **changes: Any) -> Run:
    """Sizes that 2 and 4 divide, but for `changes` (dots written as __)."""
    attention, ffn = kinds.split()
    model = make_run().model.model_dump()
    model["attention"]["pattern"], model["ffn"]["pattern"] = [attention], [ffn]
    model["d_model"] = 16
    model["attention"]["ada"]["heads"] = model["attention"]["mla"]["heads"] = 4
    model["attention"]["softmax"] |= {"heads": 4, "kv_heads": 4}
    model["ffn"]["moe"] |= {"experts": 12, "shared_hidden": 8}
    model["ffn"]["kan"]["rank"] = model["ffn"]["grove"]["kan"]["rank"] = 4
    model["ffn"]["grove"]["groves"] = 12
    sections: dict[str, Any] = {
        "model": model,
        "data": {"seq_len": 16},
        "batch": {"tokens": 3840, "micro": 1},
        "parallel": {},
    }
    for key, value in changes.items():
        *home, last = key.split("__")
        node = sections
        for part in (*HOMES.get(key.split("__")[0], ()), *home):
            node = node.setdefault(part, {})
        node[last] = value
    return make_run(**sections)


@pytest.mark.parametrize("attention", ["ada", "softmax", "mla"])
@pytest.mark.parametrize("ffn", ["dense", "moe", "kan", "grove"])
@pytest.mark.parametrize("layout", [(4, 1, 1), (2, 2, 1), (4, 4, 1), (1, 4, 1), (2, 1, 4)])
def test_what_divides_is_allowed(attention: str, ffn: str, layout: tuple[int, int, int]) -> None:
    tp, cp, ep = layout
    ep = ep if ffn in ("moe", "grove") else 1
    one = run(f"{attention} {ffn}", tp=tp, cp=cp, ep=ep, sequence=tp > 1)
    assert one.check_world(16).data_parallel(16) == 16 // tp // cp


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "ada dense",
        {"tp": 4, "ada__heads": 2},
        "tp=4 must divide model.attention.ada.heads=2; try 2",
    ),
    (
        "softmax dense",
        {"tp": 3, "softmax__kv_heads": 2},
        "tp=3 must divide model.attention.softmax.heads=4; try 2",
    ),
    (
        "softmax dense",
        {"tp": 4, "softmax__kv_heads": 2},
        "tp=4 must divide model.attention.softmax.kv_heads=2; try 2",
    ),
    (
        "mla dense",
        {"tp": 4, "mla__heads": 6},
        "tp=4 must divide model.attention.mla.heads=6; try 2",
    ),
    (
        "softmax dense",
        {"tp": 4, "dense__hidden": 6},
        "tp=4 must divide model.ffn.dense.hidden=6; try 2",
    ),
    ("softmax kan", {"tp": 4, "kan__rank": 6}, "tp=4 must divide model.ffn.kan.rank=6; try 2"),
    (
        "softmax grove",
        {"tp": 4, "grove__kan__rank": 6},
        "tp=4 must divide model.ffn.grove.kan.rank=6; try 2",
    ),
    (
        "softmax moe",
        {"tp": 4, "moe__shared_hidden": 6},
        "tp=4 must divide model.ffn.moe.shared_hidden=6; try 2",
    ),
    (
        "softmax dense",
        {"tp": 4, "model__vocab_size": 34},
        "tp=4 must divide model.vocab_size=34; try 2",
    ),
    (
        "softmax dense",
        {"tp": 4, "model__vocab_size": None, "model__vocab_multiple": 2},
        "tp=4 must divide model.vocab_multiple=2; try 2",
    ),
    (
        "softmax dense",
        {"ep": 2},
        "ep=2 splits groves and experts, of which model.ffn.pattern has none; try 1",
    ),
    ("softmax grove", {"ep": 8}, "ep=8 must divide model.ffn.grove.groves=12; try 6 or 12"),
    ("softmax moe", {"ep": 5}, "ep=5 must divide model.ffn.moe.experts=12; try 4 or 6"),
    ("softmax moe", {"ep": 24}, "ep=24 must divide model.ffn.moe.experts=12; try 12"),
    ("softmax dense", {"cp": 3}, "cp=3 must divide data.seq_len=16; try 2 or 4"),
    (
        "ada dense",
        {"cp": 8},
        "cp=8 leaves a rank 2 tokens of data.seq_len=16, fewer than the 3 that "
        "model.attention.ada.taps looks back; try 4",
    ),
    (
        "softmax grove",
        {"tp": 4, "cp": 8},
        "tp=4 must divide data.seq_len / parallel.cp = 2 where tokens go to groves or "
        "experts; try 2",
    ),
    (
        "softmax moe",
        {"tp": 4, "cp": 16},
        "tp=4 must divide data.seq_len / parallel.cp = 1 where tokens go to groves or "
        "experts; try 1",
    ),
    (
        "softmax dense",
        {"tp": 4, "cp": 8, "sequence": True},
        "tp=4 must divide data.seq_len / parallel.cp = 2 where parallel.sequence=true; try 2",
    ),
    (
        "softmax dense",
        {"sequence": True},
        "sequence=True splits norms and residuals over the ranks of parallel.tp, which "
        "is 1; use parallel.sequence=false or a larger parallel.tp",
    ),
    (
        "softmax dense",
        {"tp": 2, "optim__kind": "muon"},
        "tp=2 splits the matrices that optim.kind=muon must see whole; try 1",
    ),
]


@pytest.mark.parametrize(("kinds", "changes", "message"), REFUSED)
def test_what_cannot_be_split_is_refused(kinds: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(kinds, **changes)
    assert str(error.value) == f"parallel.{message}"


def test_only_what_the_layers_use_counts() -> None:
    assert run("softmax kan", tp=4, dense__hidden=7, ada__heads=2)
    assert run("softmax grove", tp=4, grove__kan__rank=7, grove__shared=False)
    assert run("softmax dense", cp=8)
    assert run("ada dense", cp=8, ada__taps=3)
    assert run("ada dense", cp=16, ada__kernel="none")
    both = {"model__ffn__pattern": ["grove", "moe"], "model__layers": 2, "moe__experts": 8}
    assert run("softmax grove", ep=4, **both)
    with pytest.raises(ConfigError, match=r"ep=6 must divide model.ffn.moe.experts=8; try 4$"):
        run("softmax grove", ep=6, **both)


def test_a_vocabulary_that_the_tokenizer_decides_splits_over_tp() -> None:
    wide = run(tp=4, model__vocab_size=None, model__vocab_multiple=12)
    assert wide.with_vocab(101).model.vocab_size == 108


def test_the_layout_must_go_over_the_processes() -> None:
    grove = run("softmax grove", tp=4, ep=4)
    grove.check_world(4)
    grove.check_world(8)
    with pytest.raises(ConfigError) as error:
        grove.check_world(6)
    assert str(error.value) == (
        "parallel.tp x parallel.cp=4 must divide the number of processes=6; "
        "try parallel.tp=2 parallel.ep=3, or 4 or 8 processes"
    )
    with pytest.raises(ConfigError, match=r"cp=8 must .* processes=4; try parallel.tp=2, or 8 "):
        run(tp=4, cp=2).check_world(4)
    with pytest.raises(ConfigError, match=r"ep=4 must .* processes=2; try parallel.ep=2, or 4 "):
        run("softmax moe", ep=4).check_world(2)
    with pytest.raises(ConfigError, match=r"processes=3; try parallel.tp=1 parallel.sequence=fal"):
        run(tp=2, sequence=True).check_world(3)


def test_tokens_divide_over_the_ranks_that_read_different_rows() -> None:
    four = run(tp=2, cp=2, batch__tokens=32)
    assert four.check_world(8).accumulation(four.data_parallel(8)) == 1
    with pytest.raises(ConfigError, match=r"data-parallel ranks=4 = 64; try 64$"):
        four.check_world(16)


def test_the_nearest_layout_is_one_over_which_the_batch_divides() -> None:
    lone = run(tp=4, batch__tokens=16)
    assert nearest_layout(lone, 4) == lone.parallel
    with pytest.raises(ConfigError, match=r"processes=2; try parallel.tp=2, or 4 processes$"):
        lone.check_world(2)
    layout = nearest_layout(lone, 8)
    assert (layout.tp, layout.cp) == (4, 2), "tp=4 alone would leave two ranks one row"


def test_layouts_have_folders_of_their_own() -> None:
    layouts: list[dict[str, int]] = [{}, {"tp": 2}, {"cp": 2}, {"tp": 4}]
    assert len({run(name=None, **layout).run_name for layout in layouts}) == 4
