"""A retrofit on several processes is that of one, at any ZeRO stage, with frozen weights."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from tests.dist.harness import Ranks
from tests.dist.retrofit_workers import FROZEN
from tests.evaluation import sentence, tokenizer

pytestmark = pytest.mark.dist
WORDS = [
    "data=jsonl",
    "data.seq_len=16",
    "data.val_fraction=0.2",
    "batch={tokens: 256, micro: 2}",
    "eval={every: 1000, micro: 4, max_tokens: 512}",
    "steps=6",
    "checkpoint={every: 3, keep: 2}",
    "optim=sgd",
    "optim.lr=0.05",
    "schedule=constant",
    "schedule.warmup=2",
    "engine.precision=fp32",
    "zero.persist=0",
    "zero.bucket=500",
    "track={every: 1, wandb: disabled, console: off}",
    "price=cpu",
    "last=1",
]
# embeddings, what takes the place of the feed-forward
KINDS = {
    "frozen": ["embeddings=frozen", "ffn.hidden=8"],
    "tied": ["embeddings=tied", "arm=matched", "hidden=8"],
}


def save_base(folder: Path) -> Path:
    """A random Llama with tied embeddings, and its tokenizer."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retrofits")


@pytest.fixture(scope="module")
def said(place: Path) -> dict[str, str]:
    """What failed, after all runs; they lie in `one` and `two`, by the number of processes."""
    base = save_base(place / "base")
    rng = random.Random(3)
    rows = [{"text": sentence(rng, rng.randint(5, 40))} for _ in range(300)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [*WORDS, f"base={base}", f"data.source.paths=[{place}/data.jsonl]"]
    alone: dict[str, Any] = {kind: {"words": words} for kind, words in KINDS.items()}
    alone["untouched"] = {"words": ["arm=untouched"]}
    both: dict[str, Any] = {"untouched": alone["untouched"]}
    for stage in (1, 2, 3):
        for kind, words in KINDS.items():
            both[f"{kind}-{stage}"] = {"words": [*words, f"zero.stage={stage}"]}
    both["tied-3"]["words"] += ["engine.activation_checkpointing=true"]
    bf16 = [*KINDS["frozen"], "zero.stage=2", "engine.precision=bf16"]
    both |= {"bf16-2": {"words": bf16}, "bf16-2-2": {"words": bf16, "start": "bf16-2"}}
    for kind, first, then in (
        ("frozen", 2, 2),
        ("frozen", 3, 3),
        ("tied", 3, 3),
        ("frozen", 2, 3),
        ("tied", 3, 1),
    ):
        words = [*KINDS[kind], f"zero.stage={then}"]
        both[f"{kind}-{first}-{then}"] = {"words": words, "start": f"{kind}-{first}"}
    both["changed"] = {**both["frozen-2-2"], "change": str(base)}
    found = []
    for name, ranks, runs in (("one", 1, alone), ("two", 2, both)):
        words = [*common, f"dir={place / name}", f"data.cache={place / 'cache'}"]
        worker = Ranks(
            "retrofits", ranks, module="tests.dist.retrofit_workers", common=words, runs=runs
        )
        found.append(worker.result(timeout=240))
    assert found[0] == {}
    return dict(found[1])


def steps(folder: Path) -> list[list[float]]:
    """[loss, gradient norm] of every step in the ledger."""
    lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return [[line["loss"], line["grad_norm"]] for line in lines if line["event"] == "step"]


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_train_as_one(said: Any, place: Path, kind: str, stage: int) -> None:
    one, two = place / "one" / kind, place / "two" / f"{kind}-{stage}"
    assert len(steps(one)) == 6
    close(steps(two), steps(one))
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert found.keys() == expected.keys()
    base = load_file(place / "base" / "model.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        if ".layers.0." in name and name != FROZEN:
            assert torch.equal(value, base[name]), f"{name} is frozen"
    moved = [name for name in found if name in base and not torch.equal(found[name], base[name])]
    assert ("model.embed_tokens.weight" in moved) == (kind == "tied")
    summaries = [json.loads((folder / "arm.json").read_text()) for folder in (one, two)]
    close(*([summary["val_nats"]] for summary in summaries))
    for key in ("trainable_parameters", "total_parameters", "steps", "tokens", "arm"):
        assert summaries[0][key] == summaries[1][key], key


@pytest.mark.parametrize("name", ["frozen-2-2", "frozen-3-3", "tied-3-3", "bf16-2-2"])
def test_resumed_is_bit_for_bit(said: Any, place: Path, name: str) -> None:
    whole, part = place / "two" / name.rpartition("-")[0], place / "two" / name
    assert steps(part) == steps(whole)[3:]
    written = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, part)]
    assert written[0] == written[1]


def test_bf16_trains_alike(said: Any, place: Path) -> None:
    close(steps(place / "two" / "bf16-2"), steps(place / "one" / "frozen"), 2e-2)
    written = load_file(place / "two" / "bf16-2" / "model" / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["frozen-2-3", "tied-3-1"])
def test_another_stage_continues(said: Any, place: Path, name: str) -> None:
    kind = name.partition("-")[0]
    close(steps(place / "two" / name), steps(place / "one" / kind)[3:])


def test_another_base_is_refused(said: Any, place: Path) -> None:
    assert set(said) == {"changed"}
    assert "the weights that do not train differ (has the base model changed?)" in said["changed"]
    assert not (place / "two" / "changed" / "arm.json").exists()


def test_what_does_not_train_is_measured_alike(said: Any, place: Path) -> None:
    one, two = (
        json.loads((place / name / "untouched" / "arm.json").read_text()) for name in ("one", "two")
    )
    assert two["val_nats"] == pytest.approx(one["val_nats"], rel=1e-5)
    assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-5)
    assert (one["trainable_parameters"], one["steps"], one["usd"]) == (0, 0, None)
