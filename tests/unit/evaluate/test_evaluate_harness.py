"""Whole evaluations: what they leave, limits, chat, stopping and going on, kinds of models."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kalmagrove.cli import main
from kalmagrove.config import CheckpointError, ConfigError, DataError, Price, Suite
from kalmagrove.evaluate.harness import evaluate
from kalmagrove.evaluate.report import results_table
from kalmagrove.evaluate.scorer import Scorer
from kalmagrove.evaluate.subject import Subject, checksum, open_model
from kalmagrove.evaluate.suites import Prepared, prepare
from tests.evaluation import own_model, save_llama, tokenizer, write_bbh, write_twelve

pytestmark = pytest.mark.unit
QUIET: dict[str, Any] = {"progress": False, "chat": False}
SOME = Suite(name="some", tasks=("bbh/navigate", "bbh/snarks", "bbh_generate/navigate"))
PRICE = Price(name="p", usd_per_core_hour=3600.0, basis="a dollar a core-second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "llama")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bbh(tmp_path_factory.mktemp("files"), items=4)


@pytest.fixture(scope="module")
def some(files: Path) -> Prepared:
    return prepare(SOME, files)


@pytest.fixture
def subject(folder: Path) -> Subject:
    return open_model(folder, "cpu")


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two results, but for what was spent on them."""
    for key in ("model", "fingerprint", "suite", "tasks", "groups", "average", "items"):
        assert one[key] == other[key], key


def test_what_an_evaluation_leaves(subject: Subject, some: Prepared, tmp_path: Path) -> None:
    results = evaluate(subject, some, out=tmp_path, price=PRICE, **QUIET)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept == {key: value for key, value in results.items() if key != "items"}
    assert kept["model"] == "llama"
    assert kept["dollars"] > 0
    assert kept["seconds"] > 0
    assert kept["versions"]["lm-eval"]
    assert kept["commit"]
    task = kept["tasks"]["bbh_snarks"]
    assert task["n"] == 4
    assert set(task["metrics"]) == {"acc", "acc_norm", "acc_bytes"}
    assert task["parse_failures"] is None
    for name, summary in kept["tasks"].items():
        text = (tmp_path / "items" / f"{name}.jsonl").read_text()
        items = [json.loads(line) for line in text.splitlines()]
        assert items == results["items"][name]
        assert [item["id"] for item in items] == list(range(4))
        right = [item["correct"] for item in items]
        assert set(right) <= {0, 1}
        score = summary["metrics"][summary["primary"]]
        assert score["value"] == sum(right) / 4
        spread = math.sqrt(sum((r - score["value"]) ** 2 for r in right) / 3)
        assert score["stderr"] == pytest.approx(spread / 2)
    snarks = results["items"]["bbh_snarks"]
    options = [len(item["log_likelihoods"]) for item in snarks]
    assert task["random"] == pytest.approx(sum(1 / count for count in options) / 4)
    targets = [item["target"] for item in snarks]
    assert task["majority"] == max(map(targets.count, targets)) / 4
    for item in snarks:
        best = item["log_likelihoods"].index(max(item["log_likelihoods"]))
        assert item["choice"] == f"({chr(65 + best)})"
        assert item["correct"] == (item["choice"] == item["target"])


def test_the_table_has_a_line_for_each_task_and_group(subject: Subject, files: Path) -> None:
    results = evaluate(subject, "bbh", files=files, limit=1, **QUIET)
    assert results_table(results).row_count == 23 + 1
    group = results["groups"]["bbh"]
    scores = [task["metrics"]["acc"]["value"] for task in results["tasks"].values()]
    assert group["metrics"]["acc"]["value"] == pytest.approx(sum(scores) / 23)
    assert results["average"] == group["metrics"]["acc"]["value"]


def test_the_rate_of_texts_without_an_answer(
    subject: Subject, some: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = iter(["Yes", "perhaps", "the answer is no", "?"])

    def written(model: Any, scorer: Any, rows: list[list[int]], **_: Any) -> list[list[int]]:
        return [tokenizer().encode(next(texts)) for _ in rows]

    monkeypatch.setattr("kalmagrove.evaluate.lm.greedy", written)
    only = Prepared("x", {"g": some.tasks["bbh_generate_navigate"]}, {"g": ("g",)})
    results = evaluate(subject, only, **QUIET)
    summary, items = results["tasks"]["g"], results["items"]["g"]
    assert summary["parse_failures"] == 0.5
    assert sorted(item["parsed"] for item in items) == [False, False, True, True]
    assert {item["choice"] for item in items} == {"Yes", "No", None}
    assert summary["metrics"].keys() == {"exact_match"}
    assert summary["random"] == 0.5
    assert all(not item["correct"] for item in items if not item["parsed"])


def test_a_limit_takes_the_first_items(subject: Subject, some: Prepared) -> None:
    whole, part = (evaluate(subject, some, limit=limit, **QUIET) for limit in (None, 2))
    for name, items in part["items"].items():
        assert [item["target"] for item in items] == [
            item["target"] for item in whole["items"][name][:2]
        ]
    assert part["limit"] == 2


def test_it_goes_on_where_it_was_stopped(
    subject: Subject, some: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    stop_at = 0
    read = Scorer._read

    def counted(self: Scorer, batch: Any) -> Any:
        passes.append(len(batch))
        if len(passes) == stop_at:
            raise KeyboardInterrupt
        return read(self, batch)

    def asked(out: Path | None = None) -> dict[str, Any]:
        passes.clear()
        return evaluate(subject, some, out=out, batch_tokens=1, **QUIET)

    monkeypatch.setattr(Scorer, "_read", counted)
    plain, whole = asked(), len(passes)
    stop_at = 6  # two are the scorer's trial, three are answered
    with pytest.raises(KeyboardInterrupt):
        asked(tmp_path)
    assert not (tmp_path / "results.json").exists()
    (file,) = (tmp_path / "answers").iterdir()
    done = len(file.read_bytes().splitlines())
    with file.open("ab") as answers:
        answers.write(b'["torn')
    stop_at = 0
    results = asked(tmp_path)
    assert results["requests_from_disk"] == done > 0
    assert len(passes) == whole - 3, "only what was left is computed"
    same(results, plain)
    again = asked(tmp_path)
    assert again["requests_from_disk"] == again["requests"]
    assert len(passes) == 2, "no question is asked again"
    same(again, plain)
    with torch.no_grad():
        next(subject.model.parameters())[5, 3] += 1e-3
    other = evaluate(subject, some, out=tmp_path, **QUIET)
    assert other["requests_from_disk"] == 0, "another model's answers are not read"
    assert other["fingerprint"] != plain["fingerprint"]


def test_a_checksum_sees_order_and_bits() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        one = torch.tensor([0, 1, 1, 0]).to(dtype)
        assert checksum(one) == checksum(one.reshape(2, 2).clone())
        assert checksum(one) != checksum(one.roll(1))
    tiny = torch.zeros(3)
    assert checksum(tiny) != checksum(tiny - 0.0 * 1 + 1e-45)


def test_chat(folder: Path, some: Prepared) -> None:
    subject = open_model(folder, "cpu")
    assert subject.chat, "the tokenizer has a template"
    talked = evaluate(subject, some, chat="auto", limit=2, progress=False)
    plain = evaluate(subject, some, **QUIET, limit=2)
    assert talked["chat"]
    assert not plain["chat"]
    pairs = zip(talked["items"]["bbh_snarks"], plain["items"]["bbh_snarks"], strict=True)
    assert all(a["log_likelihoods"] != b["log_likelihoods"] for a, b in pairs)
    text = subject.codec.render([{"role": "user", "content": "Q"}], True)
    assert text == "<|endoftext|><|user|>Q<|end|><|assistant|>"
    names = ("<|endoftext|>", "<|user|>", "Q", "<|end|>", "<|assistant|>")
    own = Subject(subject.model, tokenizer(), "own").codec
    rendered = own.encode([own.render([{"role": "user", "content": "Q"}], True)], rendered=True)
    assert rendered == subject.codec.encode([text])
    assert "".join(tokenizer().decode([token]) for token in rendered[0]) == "".join(names)
    bare = AutoTokenizer.from_pretrained(folder)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="chat=True needs a chat template; llama has none"):
        evaluate(Subject(subject.model, bare, "llama"), some, chat=True, progress=False)


def test_bits_per_byte(subject: Subject, some: Prepared, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = ["The cat sees a river. " * 60, "Ein rotes H\u00e4uschen", "third"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = evaluate(subject, some, limit=1, corpus=str(corpus), corpus_documents=2, **QUIET)[
        "bits_per_byte"
    ]
    size = sum(len(text.encode()) for text in texts[:2])
    assert (found["documents"], found["bytes"]) == (2, size)
    assert found["bits_per_byte"] == pytest.approx(
        found["nats_per_token"] * found["tokens"] / math.log(2) / size
    )
    uniform = math.log2(320) * found["tokens"] / size
    assert 0.5 * uniform < found["bits_per_byte"] < 3 * uniform
    with pytest.raises(ConfigError, match="corpus=val needs a run of KalmaGrove"):
        evaluate(subject, some, limit=1, corpus="val", **QUIET)
    with pytest.raises(DataError, match="matches no file"):
        evaluate(subject, some, limit=1, corpus=str(tmp_path / "none.txt"), **QUIET)


def test_a_model_in_memory_of_either_kind(some: Prepared, files: Path, tmp_path: Path) -> None:
    own = Subject(own_model(), tokenizer(), "own", length=200)
    results = evaluate(own, some, out=tmp_path, **QUIET)
    assert results["model"] == "own"
    same(evaluate(own, some, **QUIET), results)

    class Plain(torch.nn.Module):  # nothing but tokens to logits
        def __init__(self) -> None:
            super().__init__()
            self.inner = own_model()

        def forward(self, tokens: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.inner(tokens).logits)

    bare = Subject(Plain(), tokenizer(), "bare", length=200)
    found = evaluate(bare, some, **QUIET)
    for name in ("bbh_navigate", "bbh_snarks"):
        for mine, theirs in zip(found["items"][name], results["items"][name], strict=True):
            assert mine["log_likelihoods"] == pytest.approx(theirs["log_likelihoods"], abs=1e-4)


def test_models_are_recognised(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(folder)
    assert open_model(tmp_path / "run", "cpu").name == "run"
    with pytest.raises(CheckpointError, match="holds no model; name the folder of a run"):
        open_model(tmp_path)
    with pytest.raises(CheckpointError, match="holds no model"):
        open_model(tmp_path / "none")


def test_the_command_tells_mistakes_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for words, code, message in [
        ([f"files={tmp_path}"], 1, f"kalmagrove: files={tmp_path} lacks bbh/boolean_expressions"),
        (["suite=nope"], 2, "kalmagrove: suite=nope is not an option; try bbh, bbh_generate, tw"),
        (["limit=0"], 2, "kalmagrove: limit=0 should be greater than 0"),
        (["suite.tasks=[]"], 2, "kalmagrove: suite.tasks=() should"),
    ]:
        assert main(["evaluate", f"run={folder}", "device=cpu", *words]) == code
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(message)


def test_a_prepared_suite_is_as_it_was_prepared(subject: Subject, some: Prepared) -> None:
    with pytest.raises(ConfigError, match=r"shots=2 is for suites.prepare; it made this suite"):
        evaluate(subject, some, shots=2, **QUIET)


def test_the_twelve(subject: Subject, tmp_path: Path) -> None:
    results = evaluate(subject, "twelve", files=write_twelve(tmp_path), limit=1, **QUIET)
    assert len(results["tasks"]) == 90
    assert set(results["groups"]) == {"mmlu", "bbh"}
    singles = [name for name in results["tasks"] if not name.startswith(("mmlu_", "bbh_"))]
    rows = [results["tasks"][name] for name in singles] + list(results["groups"].values())
    firsts = [row["metrics"][row["primary"]]["value"] for row in rows]
    assert len(firsts) == 12
    assert results["average"] == pytest.approx(sum(firsts) / 12)
    assert results["truncated"] > 0
    again = evaluate(subject, "twelve", files=tmp_path, limit=1, out=tmp_path / "out", **QUIET)
    again = evaluate(subject, "twelve", files=tmp_path, limit=1, out=tmp_path / "out", **QUIET)
    assert again["requests_from_disk"] == again["requests"] == results["requests"]
    assert again["truncated"] == results["truncated"], "of a request from disk it is known too"
