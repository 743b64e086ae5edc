"""BIG-Bench Hard (arXiv:2210.09261): options in a question, and the answer in a generated text.

Used by `forms` and named in the task files.
"""

import re
from collections.abc import Iterable
from typing import Any

from lm_eval.api.filter import Filter

FAILED = "[invalid]"  # lm-eval's mark of a text without an answer
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
BRACKETS = r"[\[\](){}<>](?:\s*[\[\](){}<>])*"


def options_of(question: str) -> list[str]:
    """The options that stand under "Options:": ["(A)", "(B)"], or ["valid", "invalid"]; or none."""
    _, found, listed = question.rpartition("Options:")
    if not found:
        return []
    letters = re.findall(r"^\s*(\([A-Z]\))", listed, re.M)
    return letters or [text.strip() for text in re.findall(r"^\s*- (.+)$", listed, re.M)]


def parse_answer(text: str, doc: dict[str, Any]) -> str | None:
    """The answer in a generated text, written like the target; None if there is none.

    What follows the last "answer is" is searched if that occurs, else the whole text. Lettered
    questions want the first "(B)", "B)" or "B." or an answer that is only "B"; those with closed
    answers the first of them as a word, in either case; else the kind of the target decides:
    a number, brackets, or the first line.
    """
    marked = re.split(r"answer is:?", text, flags=re.I)
    text = marked[-1].strip()
    choices = doc["choices"]
    if choices and choices[0].startswith("("):
        letters = "".join(choice[1] for choice in choices)
        found = re.search(rf"\(([{letters}])\)|\b([{letters}])[).:]|^([{letters}])\W*$", text)
        return f"({next(filter(None, found.groups()))})" if found else None
    if choices:
        words = "|".join(sorted(map(re.escape, choices), key=len, reverse=True))
        found = re.search(rf"\b({words})\b", text, re.I)
        if found is None:
            return None
        return next(c for c in choices if c.lower() == found[1].lower())
    target = doc["target"]
    if re.fullmatch(NUMBER, target):
        found = re.search(NUMBER, text)
        return found[0].replace(",", "") if found else None
    if re.fullmatch(BRACKETS, target):
        found = re.match(BRACKETS, text)
        return " ".join(re.sub(r"\s", "", found[0])) if found else None
    line = text.split("\n")[0].strip().rstrip(".").replace(",", " ")
    return " ".join(line.split()) or None


class AnswerFilter(Filter):
    """Generated texts to answers, FAILED where none is found."""

    def apply(self, resps: Iterable[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
        pairs = zip(resps, docs, strict=True)
        return [[parse_answer(text, doc) or FAILED for text in texts] for texts, doc in pairs]


class NumberFilter(Filter):
    """GSM8K: the number after "####", else the last one in the text."""

    def apply(self, resps: Iterable[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
        return [[last_number(text) or FAILED for text in texts] for texts in resps]


def last_number(text: str) -> str | None:
    marked = re.search(rf"####\s*\$?({NUMBER})", text)
    found = [marked[1]] if marked else re.findall(NUMBER, text)
    return found[-1].replace(",", "") if found else None


def score_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval's `process_results` of the tasks whose answers are generated."""
    answer = results[0]
    return {
        "exact_match": float(answer == doc["target"]),
        "parse_failure": float(answer == FAILED),
    }


def score_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The same for GSM8K, whose target is a solution with the number at its end."""
    right, answer = last_number(doc["target"]), results[0]
    same = answer != FAILED and right is not None and float(answer) == float(right)
    return {"exact_match": float(same), "parse_failure": float(answer == FAILED)}
