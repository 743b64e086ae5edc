"""Small models and benchmark files for the tests of evaluation."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import zstandard

from kalmagrove.data.tokenizer import BPE
from kalmagrove.evaluate.suites import TASKS
from kalmagrove.nn import Transformer, build_model
from kalmagrove.parallel import Groups
from tests.unit.tiny_run import make_run

WORDS = ["the", "red", "blue", "old", "new", "cat", "dog", "house", "river", "runs", "under", "is"]
CLOSED = ["True", "False", "Yes", "No", "yes", "no", "valid", "invalid"]
SUBJECTS = 57


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


@cache
def tokenizer() -> BPE:
    rng = random.Random(0)
    texts = [
        f"Question: {sentence(rng, 12)}? Answer: (A) (B) {' '.join(CLOSED)}" for _ in range(99)
    ]
    return BPE.train(texts, 320)


def save_llama(folder: Path, seed: int = 0) -> Path:
    """A random Llama with its tokenizer, as a Hugging Face folder."""
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save(folder)
    return folder


def own_model(seed: int = 0) -> Transformer:
    """A KalmaGrove model whose weights are far from uniform."""
    torch.manual_seed(seed)
    model = build_model(make_run(model={"vocab_size": 320}).model, Groups.single())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def write(path: Path, content: str) -> None:
    """Plain or, for .zst, compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(raw) if path.suffix == ".zst" else raw)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def bbh_item(rng: random.Random, name: str, closed: list[str] | None) -> dict[str, str]:
    if name in ("dyck_languages", "multistep_arithmetic_two", "object_counting", "word_sorting"):
        target = {"d": ") ]", "m": "-35", "o": "7", "w": "blue cat"}[name[0]]
        return {"input": sentence(rng, 9), "target": target}
    if closed is not None:
        return {"input": sentence(rng, 9), "target": rng.choice(closed)}
    count = rng.randint(2, 5)
    options = "\n".join(f"({chr(65 + i)}) {sentence(rng, 2)}" for i in range(count))
    answer = f"({chr(65 + rng.randrange(count))})"
    return {"input": f"{sentence(rng, 9)}\nOptions:\n{options}", "target": answer}


def write_bbh(folder: Path, items: int = 3) -> Path:
    """Every task of BIG-Bench Hard, small, with cot-prompts of two examples."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    group = yaml.load((TASKS / "bbh_generate.yaml").read_text(), Loader)
    rng = random.Random(1)
    for task in group["task"]:
        name, closed = task["task"], task["dataset_kwargs"].get("choices")
        rows = [bbh_item(rng, name, closed) for _ in range(items + 2)]
        examples = json.dumps({"examples": rows[:items]})
        write(folder / f"bbh/{name}.json", examples)
        shots = "\n\n".join(
            f"Q: {row['input']}\nA: Let's think step by step.\nBlue. So the answer is "
            f"{row['target']}."
            for row in rows[items:]
        )
        write(folder / f"bbh/cot-prompts/{name}.txt", f"canary\n-----\nSort.\n\n{shots}\n")
    return folder


def write_twelve(folder: Path, items: int = 2) -> Path:
    """The files of the twelve benchmarks, as docs/evaluation.md describes them."""
    write_bbh(folder, items)
    rng = random.Random(2)

    def text() -> str:
        return sentence(rng, 6)

    def options(count: int) -> list[str]:
        return [sentence(rng, 1 + i) for i in range(count)]

    def answered(count: int, query: str = "Question: {}\n") -> dict[str, Any]:
        gold = rng.randrange(count)
        return {"query": query.format(text()), "choices": options(count), "gold": gold}

    def subject(name: str) -> dict[str, Any]:
        question = {"subject": name, "question": text(), "choices": options(4)}
        return question | {"answer": rng.randrange(4)}

    names = [path["task"] for path in _mmlu()]
    rows = {
        "mmlu/test.jsonl.zst": [subject(name) for name in names],
        "mmlu/dev.jsonl": [subject(name) for name in names for _ in range(5)],
        "arc_easy/arc_easy.jsonl.zst": [answered(4) for _ in range(items)],
        "arc_challenge/arc_challenge.jsonl": [answered(4) for _ in range(items)],
        "piqa/piqa.jsonl.zst": [answered(2) for _ in range(items)],
        "openbook_qa/openbook_qa.jsonl": [answered(4, "{}") for _ in range(items)],
        "boolq/boolq.jsonl.zst": [
            answered(2, "Passage: {0}\nQuestion: why?") | {"choices": ["no", "yes"]}
            for _ in range(items)
        ],
        "winogrande/winogrande.jsonl": [
            {"context_options": [text(), text()], "continuation": "runs.", "gold": i % 2}
            for i in range(items)
        ],
        "hellaswag/val.jsonl.zst": [
            {"context": f"{text()} [step] [title] cat", "label": 1, "endings": options(4)}
            for _ in range(items)
        ],
        "lambada_openai/lambada_openai.jsonl.zst": [
            {"context": text(), "continuation": "cat"} for _ in range(items)
        ],
        "gsm8k/test.jsonl.zst": [
            {"question": text(), "answer": f"<<1+{i}={i + 1}>>\n#### {i + 1}"} for i in range(7)
        ],
    }
    for name, found in rows.items():
        write(folder / name, lines(found))
    header = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    row = 'A,B,Why blue?,"red, cat","red, cat; dog","old house; new river",none\n'
    write(folder / "truthfulqa/TruthfulQA.csv.zst", "\ufeff" + header + row)
    return folder


def _mmlu() -> list[dict[str, Any]]:
    import yaml

    text = (TASKS / "mmlu.yaml").read_text().replace("!function ", "")
    found: list[dict[str, Any]] = yaml.safe_load(text)["task"]
    assert len(found) == SUBJECTS
    return found
