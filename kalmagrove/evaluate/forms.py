"""Rows of benchmarks, local or from the hub, as questions of one shape each.

multiple choice: query, choices, gold. Two contexts: choices (the contexts), continuation, gold.
Open: query, target. A form gives None for a row that cannot be scored.
"""

import re
from typing import Any

from kalmagrove.evaluate.bbh import options_of

Doc = dict[str, Any]
Row = dict[str, Any]
LETTERS = "ABCD"
# The examples that TruthfulQA's authors put before every question (arXiv:2109.07958).
PRIMER = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""


def bbh_choice(row: Row, choices: list[str] | None = None) -> Doc | None:
    """BIG-Bench Hard with the options of the question, or with `choices` (Yes, No ...).

    None where the target is none of them: three items of the published files.
    """
    offered = list(choices) if choices else options_of(row["input"])
    if row["target"] not in offered:
        return None
    query = f"Q: {row['input']}\nA:"
    return {"query": query, "choices": offered, "gold": offered.index(row["target"])}


def bbh_open(row: Row, choices: list[str] | None = None) -> Doc:
    """BIG-Bench Hard as the model is asked to write the answer; `choices` count for guessing."""
    offered = list(choices) if choices else options_of(row["input"])
    return {"query": f"Q: {row['input']}\nA:", "target": row["target"], "choices": offered}


def cot_prompts(text: str) -> list[Row]:
    """The examples of a cot-prompts file, their reasoning left out."""
    body = text.split("-----", 1)[-1]
    found = re.findall(r"^Q: (.*?)\nA: .*?answer is (.*?)\.?\s*(?=\n\nQ: |\Z)", body, re.S | re.M)
    return [{"input": question, "target": answer} for question, answer in found]


def mmlu(row: Row) -> Doc:
    listed = "\n".join(f"{letter}. {c}" for letter, c in zip(LETTERS, row["choices"], strict=True))
    query = f"{row['question'].strip()}\n{listed}\nAnswer:"
    return {"query": query, "choices": list(LETTERS), "gold": row["answer"]}


def answered(row: Row) -> Doc:
    """query, choices, gold of MosaicML's evaluation files (ARC, PIQA, BoolQ); hub rows as well."""
    if "query" in row:
        query, choices, gold = row["query"].rstrip(), row["choices"], row["gold"]
    elif "goal" in row:  # PIQA
        query, choices, gold = (
            f"Question: {row['goal']}",
            [row["sol1"], row["sol2"]],
            row["label"],
        )
    elif "passage" in row:  # BoolQ
        query = f"Passage: {row['passage']}\nQuestion: {row['question']}?"
        choices, gold = ["no", "yes"], row["label"] if "label" in row else int(row["answer"])
    else:  # ARC
        query, choices = f"Question: {row['question']}", row["choices"]["text"]
        gold = row["choices"]["label"].index(row["answerKey"])
    return {"query": f"{query}\nAnswer:", "choices": list(choices), "gold": int(gold)}


def completed(row: Row) -> Doc:
    """A beginning and its possible ends: OpenBookQA and HellaSwag, local or from the hub."""
    if "query" in row:
        query, choices, gold = row["query"].rstrip(), row["choices"], row["gold"]
    elif "question_stem" in row:
        query, choices = row["question_stem"], row["choices"]["text"]
        gold = row["choices"]["label"].index(row["answerKey"].strip())
    else:
        context = row.get("context")
        if context is None:
            context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        query, gold = _wikihow(context), row["label"]
        choices = [_wikihow(ending) for ending in row["endings"]]
    return {"query": query, "choices": list(choices), "gold": int(gold)}


def _wikihow(text: str) -> str:
    """Without the marks that WikiHow left in HellaSwag."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def two_contexts(row: Row) -> Doc:
    """WinoGrande: which of two beginnings makes the end likelier."""
    if "context_options" in row:
        contexts, end, gold = row["context_options"], row["continuation"], row["gold"]
    else:
        before, _, end = row["sentence"].partition("_")
        contexts, gold = [before + row["option1"], before + row["option2"]], int(row["answer"]) - 1
    return {"choices": list(contexts), "continuation": end.strip(), "gold": int(gold)}


def last_word(row: Row) -> Doc:
    """LAMBADA."""
    if "context" in row:
        context, word = row["context"].rstrip(), row["continuation"].strip()
    else:
        context, _, word = row["text"].rpartition(" ")
    return {"query": context, "target": f" {word}"}


def grade_school(row: Row) -> Doc:
    """GSM8K; calculator marks <<...>> are left in, as in the published prompts."""
    return {"query": f"Question: {row['question']}\nAnswer:", "target": row["answer"]}


def truthful(row: Row) -> Doc:
    """TruthfulQA with one right answer, the best; the options in the order of the alphabet."""
    if "mc1_targets" in row:
        choices, marks = row["mc1_targets"]["choices"], row["mc1_targets"]["labels"]
        question, best = row["question"], choices[marks.index(1)]
    else:
        question, best = row["Question"], row["Best Answer"].strip()
        wrong = [answer.strip() for answer in row["Incorrect Answers"].split(";")]
        choices = [best, *(answer for answer in wrong if answer)]
    options = sorted(set(choices))
    return {"query": f"{PRIMER}Q: {question}\nA:", "choices": options, "gold": options.index(best)}
