"""From a task's answers to its items and figures.

lm-eval's task objects judge the answers; this keeps what they say of every item and sums it up.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

Item = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """A task's items, and its figures as results.json has them."""

    items: list[Item]
    summary: dict[str, Any]


def judge(task: Any) -> Scored:
    """Items and figures of a task whose requests are answered."""
    task.apply_filters()
    by_item: dict[int, list[Any]] = defaultdict(list)
    for request in task.instances:
        by_item[request.doc_id].append(request)
    primary = next(iter(task.aggregation()))
    means = {name for name in task.aggregation() if _is_mean(task, name)} - {"parse_failure"}
    chosen = next(iter(task.instances[0].filtered_resps))
    items: list[Item] = []
    values: dict[str, list[Any]] = defaultdict(list)
    for number in sorted(by_item):
        requests = sorted(by_item[number], key=lambda request: request.idx)
        doc = requests[0].doc
        answers = [request.filtered_resps[chosen] for request in requests]
        metrics = task.process_results(doc, answers)
        for name, value in metrics.items():
            if name in task.aggregation():
                values[name].append(value)
        score = metrics.get(primary) if primary in means else None
        items.append(
            {"id": number, "correct": int(score) if score in (0, 1) else score}
            | _describe(task, doc, requests, answers, primary)
            | {"metrics": {name: value for name, value in metrics.items() if name in means}}
        )
    random, majority = _baselines(task, [by_item[number][0].doc for number in sorted(by_item)])
    failures = values.pop("parse_failure", None)
    return Scored(
        items,
        {
            "n": len(items),
            "primary": primary,
            "metrics": {name: _aggregate(task, name, found) for name, found in values.items()},
            "random": random,
            "majority": majority,
            "parse_failures": None if failures is None else sum(failures) / len(failures),
            "shots": task.config.num_fewshot or 0,
        },
    )


def _describe(
    task: Any, doc: dict[str, Any], requests: list[Any], answers: list[Any], primary: str
) -> Item:
    """Target and choice of an item, and what they come from."""
    kind = task.OUTPUT_TYPE
    if kind == "multiple_choice":
        choices = task.doc_to_choice(doc)
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        totals = np.array([total for total, _ in answers[: len(choices)]])
        lengths = {"acc_norm": [len(c) for c in choices], "acc_bytes": [_bytes(c) for c in choices]}
        pick = int(np.argmax(totals / np.array(lengths.get(primary, 1.0))))
        if not task.multiple_input and isinstance(gold, int):
            gold = choices[gold]
        return {
            "target": gold,
            "choice": pick if task.multiple_input else choices[pick],
            "parsed": None,
            "log_likelihoods": [round(float(total), 6) for total in totals],
        }
    if kind == "generate_until":
        parsed = answers[0] != "[invalid]"
        text = requests[0].resps[0]
        return {
            "target": task.doc_to_target(doc),
            "choice": answers[0] if parsed else None,
            "parsed": parsed,
            "text": text,
        }
    total, likeliest = answers[0] if kind == "loglikelihood" else (answers[0], None)
    return {
        "target": task.doc_to_target(doc),
        "choice": None,
        "parsed": None,
        "log_likelihoods": [round(float(total), 6)],
        "likeliest": likeliest,
    }


def _is_mean(task: Any, name: str) -> bool:
    return getattr(task.aggregation().get(name), "__name__", "") == "mean"


def _aggregate(task: Any, name: str, found: list[Any]) -> dict[str, float | None]:
    """A metric over the items, and the standard error of a mean."""
    value = float(task.aggregation()[name](found))
    error = None
    if _is_mean(task, name) and len(found) > 1:
        error = float(np.std(found, ddof=1) / math.sqrt(len(found)))
    return {"value": value if math.isfinite(value) else None, "stderr": error}


def _baselines(task: Any, docs: list[dict[str, Any]]) -> tuple[float, float]:
    """Accuracy of guessing one of the options, and of always giving the most frequent answer.

    The answer of a question with options is its place among them (a letter, "Yes"), else the text.
    """
    guess, golds = [], []
    for doc in docs:
        if task.OUTPUT_TYPE == "multiple_choice":
            gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            guess.append(1 / len(task.doc_to_choice(doc)))
        else:
            gold = task.doc_to_target(doc)
            options = doc.get("choices") or []
            guess.append(1 / len(options) if options else 0.0)
        golds.append(str(gold))
    most = Counter(golds).most_common(1)[0][1]
    return sum(guess) / len(guess), most / len(golds)


def _bytes(text: str) -> int:
    return len(text.encode())


def summarize_group(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of several tasks: the mean over tasks, and `weighted` by their items."""
    each = list(tasks.values())
    names = [n for n in each[0]["metrics"] if all(n in t["metrics"] for t in each)]
    items = sum(task["n"] for task in each)

    def means(values: list[float | None]) -> dict[str, float | None]:
        if any(value is None for value in values):
            return {"value": None, "weighted": None}
        known = [value for value in values if value is not None]
        sums = sum(v * t["n"] for v, t in zip(known, each, strict=True))
        return {"value": sum(known) / len(known), "weighted": sums / items}

    failures = [task["parse_failures"] for task in each]
    return {
        "tasks": list(tasks),
        "n": items,
        "primary": each[0]["primary"],
        "metrics": {
            name: means([task["metrics"][name]["value"] for task in each]) for name in names
        },
        "random": means([task["random"] for task in each])["value"],
        "majority": means([task["majority"] for task in each])["value"],
        "parse_failures": means(failures)["value"],
    }
