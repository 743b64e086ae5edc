"""Micro-batches: order, ranks, resuming, masks, segments and the held-out rows."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from kalmagrove import config
from kalmagrove.config import CheckpointError, ConfigError, DataError
from kalmagrove.data import build_batches, prepare, val_batches
from kalmagrove.data.loader import Rows
from kalmagrove.data.store import TokenStore

pytestmark = pytest.mark.unit
T, MICRO = 16, 2


@pytest.fixture(scope="module", params=["text", "messages"])
def prepared(request, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(150):
        text = " ".join(rng.choice(["grove", "edge", "kalma", "tree"], 12)) + f" {i}"
        turns = [("user", "grow"), ("assistant", text)] * int(rng.integers(1, 3))
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append(json.dumps({"text": text, "messages": messages}))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    source = {"kind": "jsonl", "paths": [str(tmp_path / "a.jsonl")], "key": request.param}
    tree = {"name": "t", "source": source, "format": request.param, "val_fraction": 0.2}
    tree |= {"tokenizer": {"vocab_size": 280}, "cache": str(tmp_path), "workers": 1}
    return prepare(config.validate(config.Data, tree), progress=False)


def make_run(prepared, rows=8, seed=0, seq_len=T, max_tokens=None, aware=False):
    source = {"kind": "stdlib"}
    data = {"name": "t", "source": source, "seq_len": seq_len, "document_aware": aware}
    return config.Run.model_construct(
        steps=10,
        seed=seed,
        data=config.validate(config.Data, data),
        batch=config.Batch(tokens=rows * seq_len, micro=MICRO),
        eval=config.Eval(micro=3, max_tokens=max_tokens),
    )


def steps(prepared, run, dp, count, loaders=None):
    """The rows of each global step, in their global order, and the sum of each one's targets."""
    loaders = loaders or [build_batches(prepared, run, rank, dp) for rank in range(dp)]
    found = []
    for _ in range(count):
        micro = [next(x) for _ in range(run.rows_per_step // (MICRO * dp)) for x in loaders]
        targets = sum(int((batch["targets"] != -100).sum()) for batch in micro)
        assert all(b["normalizer"] * len(micro) == pytest.approx(targets) for b in micro)
        found.append(torch.cat([batch["tokens"] for batch in micro]))
    return torch.stack(found)


def test_the_global_order_does_not_depend_on_ranks(prepared):
    run = make_run(prepared, rows=16)
    alone = steps(prepared, run, 1, 40)
    for dp in (2, 4):
        assert torch.equal(steps(prepared, run, dp, 40), alone)
    assert not torch.equal(steps(prepared, make_run(prepared, rows=16, seed=1), 1, 40), alone)


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order(prepared):
    rows = Rows(prepared.train, T, prepared.tokenizer.eot, False).whole
    run = make_run(prepared)
    count = 2 * rows // 8
    seen = steps(prepared, run, 1, count).reshape(-1, T).numpy()
    everything = np.asarray(prepared.train.tokens[: rows * T]).reshape(rows, T)
    first, second = seen[:rows], seen[rows : 2 * rows]
    np.testing.assert_array_equal(np.unique(first, axis=0), np.unique(everything, axis=0))
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, everything.tolist()))
    assert not np.array_equal(first[: len(second)], second)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (4, 1), (1, 4), (2, 4)])
def test_resumed_equals_uninterrupted_at_any_number_of_ranks(prepared, before, after):
    run = make_run(prepared)
    whole = steps(prepared, run, 1, 90)
    loaders = [build_batches(prepared, run, rank, before) for rank in range(before)]
    steps(prepared, run, before, 37, loaders)
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)
    assert states[0]["samples"] == 37 * 8
    resumed = [build_batches(prepared, run, rank, after) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(states[0])
    assert torch.equal(steps(prepared, run, after, 53, resumed), whole[37:])


def test_a_position_on_other_data_is_refused(prepared):
    state = build_batches(prepared, make_run(prepared), 0, 1).state_dict()
    other = build_batches(prepared, make_run(prepared, seed=3, seq_len=32), 0, 1)
    with pytest.raises(CheckpointError, match=r"data\.seq_len was 16, is 32; seed was 0, is 3"):
        other.load_state_dict(state)
    same = build_batches(prepared, make_run(prepared), 0, 1)
    with pytest.raises(CheckpointError, match=r"data \(its tokens\) was elsewhere"):
        same.load_state_dict(state | {"data": "elsewhere"})


def test_a_position_inside_a_step_is_refused(prepared):
    batches = build_batches(prepared, make_run(prepared), 0, 1)
    next(batches)
    with pytest.raises(CheckpointError, match="2 of 8 rows"):
        batches.state_dict()


def test_targets_are_the_next_tokens_that_are_learned(prepared):
    batch = next(build_batches(prepared, make_run(prepared), 0, 1))
    tokens, targets = batch["tokens"], batch["targets"]
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.shape == targets.shape == (MICRO, T)
    assert "segments" not in batch
    inner = targets[:, :-1]
    kept = inner != -100
    assert torch.equal(inner[kept], tokens[:, 1:][kept])
    if prepared.manifest.format == "text":
        assert kept.all()
        assert batch["normalizer"] == MICRO * T
    else:
        forbidden = [prepared.tokenizer.eot, *list(prepared.tokenizer.markers.values())[:3]]
        assert not torch.isin(targets, torch.tensor(forbidden)).any()
        assert 0 < kept.float().mean() < 1


def test_data_shorter_than_a_row_or_a_step(prepared):
    with pytest.raises(ConfigError, match=r"data\.seq_len=100000 is longer than the data"):
        build_batches(prepared, make_run(prepared, seq_len=100_000), 0, 1)
    rows = Rows(prepared.train, T, 0, False).whole
    run = make_run(prepared, rows=rows // 8 * 8 + 16)
    with pytest.warns(UserWarning, match=f"its {rows} rows"):
        batches = build_batches(prepared, run, 0, 1)
    next(batches)
    with pytest.raises(ConfigError, match=r"batch\.tokens"):
        build_batches(prepared, make_run(prepared), 0, 3)


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_every_held_out_token_is_predicted_once(prepared, dp):
    run = make_run(prepared)
    ranks = [val_batches(prepared, run, rank, dp) for rank in range(dp)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [batch for group in zip(*ranks, strict=True) for batch in group]
    assert all(batch["normalizer"] == 1.0 for batch in batches)
    assert {tuple(batch["tokens"].shape) for batch in batches} == {(3, T)}
    targets = torch.cat([batch["targets"].reshape(-1) for batch in batches])
    tokens = np.asarray(prepared.val.tokens)[1:]
    learned = prepared.val.learned
    expected = tokens if learned is None else tokens[np.asarray(learned)[1:] == 1]
    np.testing.assert_array_equal(targets[targets != -100], expected)
    assert len(expected) == prepared.manifest.val.targets
    assert [b["tokens"].tolist() for b in ranks[0]] == [b["tokens"].tolist() for b in ranks[0]]


def test_evaluation_can_be_capped(prepared):
    run = make_run(prepared, max_tokens=5 * T + 3)
    targets = torch.cat([b["targets"] for b in val_batches(prepared, run, 0, 1)])
    full = torch.cat([b["targets"] for b in val_batches(prepared, make_run(prepared), 0, 1)])
    assert torch.equal(targets[:5], full[:5])
    assert (targets[5:] == -100).all()


def test_segments_count_the_documents_of_a_row():
    offsets = np.array([0, 3, 4, 9, 16, 21])
    tokens = np.arange(21)
    rows = Rows(TokenStore(tokens, offsets, None), 8, 0, aware=True)
    batch = rows.read([0, 1, 2], 1.0)
    assert batch["segments"].dtype == torch.int32
    assert batch["segments"].tolist() == [
        [0, 0, 0, 1, 2, 2, 2, 2],
        [0, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 1, 1, 1],  # the last three are padding
    ]
    assert batch["targets"][2].tolist() == [17, 18, 19, 20, -100, -100, -100, -100]


def test_segments_follow_documents_of_a_real_cache(prepared):
    batches = build_batches(prepared, make_run(prepared, aware=True), 0, 1)
    for _ in range(20):
        batch = next(batches)
        starts = (batch["tokens"] == prepared.tokenizer.eot).int()
        starts[:, 0] = 0
        assert torch.equal(batch["segments"], starts.cumsum(1).int())


def test_importing_data_needs_no_heavy_library():
    heavy = {"datasets", "transformers", "pyarrow"}
    code = f"import sys, kalmagrove.data; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_token_outside_the_vocabulary_is_named_before_the_model_sees_it(prepared):
    bad = np.array(prepared.train.tokens)
    bad[5 * T + 3] = prepared.vocab_size
    rows = Rows(TokenStore(bad, prepared.train.offsets, None), T, 0, False, prepared.vocab_size)
    assert rows.read([4], 1.0)["tokens"].shape == (1, T)
    said = r"row 5 holds token (\d+), of a vocabulary of \1; .*prepare verify=true"
    with pytest.raises(DataError, match=said):
        rows.read([4, 5], 1.0)
    for batches in (build_batches, val_batches):
        loader = batches(prepared, make_run(prepared), 0, 1)
        assert loader._rows._vocab == prepared.vocab_size
