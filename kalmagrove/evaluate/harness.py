"""A model's scores on a suite: `evaluate`, for scripts and for `kalmagrove evaluate`.

    subject = open_model("runs/latest")            # or Subject(model, tokenizer, name)
    results = evaluate(subject, "bbh", files="benchmarks", out="evaluations/mine")

lm-eval's tasks make the requests and judge the answers; `lm` computes them.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kalmagrove.config import ConfigError, Price, Suite
from kalmagrove.data.progress import Reporter
from kalmagrove.evaluate import suites
from kalmagrove.evaluate.answers import Answers
from kalmagrove.evaluate.bits import bits_per_byte
from kalmagrove.evaluate.codec import digest
from kalmagrove.evaluate.items import Scored, judge, summarize_group
from kalmagrove.evaluate.lm import SubjectLM
from kalmagrove.evaluate.report import facts_of, write_results
from kalmagrove.evaluate.subject import Subject
from kalmagrove.parallel import Group, all_gather_object, barrier

Results = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a suite is asked; see `evaluate`."""

    shots: int | None = None
    limit: int | None = None
    chat: bool | Literal["auto"] = "auto"
    corpus: str | None = None
    corpus_documents: int | None = None
    batch_tokens: int | None = None
    max_length: int | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    progress: bool = True


def evaluate(
    subject: Subject,
    suite: Suite | suites.Prepared | str,
    *,
    files: str | Path | None = None,
    out: str | Path | None = None,
    price: Price | None = None,
    group: Group | None = None,
    **settings: Any,
) -> Results:
    """The scores of `subject`; with `out` also written there, as results.json and items/.

    Args:
        suite: a name of `conf/suite`, a `Suite`, or what `suites.prepare` made of one: to ask many
            models the same, prepare once.
        files: the folder with the tasks' files; None: datasets of the hub.
        out: a folder for results and answers; evaluating the same model again continues there.
        group: the ranks that share the work, each with the model; all call this.
        settings: shots: examples before a question; None: as the tasks say. limit: first items of
            every task. chat: whether to use the chat template; auto: as the subject says. corpus:
            file for bits per byte, or val; corpus_documents: only the first ones. batch_tokens:
            tokens in a forward pass. max_length: tokens the model sees. precision: auto is bf16 on
            GPU, also for fp32 weights. progress: on stderr.

    Returns:
        What results.json holds, and the items of each task under `items`.

    Raises:
        ConfigError: for a setting that cannot work.
        DataError: for a file or dataset that is missing or damaged.
        KalmaGroveError: if `out` cannot be written.
    """
    chosen, world, began = Settings(**settings), group or Group.alone(), time.monotonic()
    if isinstance(suite, suites.Prepared):
        for key, value in (("files", files), ("shots", chosen.shots)):
            if value is not None:
                raise ConfigError(key, value, "is for suites.prepare", "it made this suite")
    else:
        suite = suites.prepare(suite, files, chosen.shots)
    chat = subject.chat if chosen.chat == "auto" else chosen.chat
    if chat and not subject.codec.has_template:
        raise ConfigError("chat", True, f"needs a chat template; {subject.name} has none")
    half = {"bf16": True, "fp32": False, "auto": subject.device.type == "cuda"}[chosen.precision]
    autocast = half and next(subject.model.parameters()).dtype == torch.float32
    length = chosen.max_length or subject.length
    fingerprint = digest(subject.fingerprint(), autocast, length)
    folder = None if out is None else Path(out).expanduser()
    answers = Answers(folder / "answers", fingerprint, world.rank) if folder else None
    with Reporter(chosen.progress and world.rank == 0) as reporter:
        lm = SubjectLM(
            subject,
            batch_tokens=chosen.batch_tokens,
            max_length=length,
            autocast=autocast,
            answers=answers,
            group=world,
            tokens=suite.tokens,
            progress=reporter,
        )
        scored = ask(lm, suite.tasks, chosen.limit, bool(chat))
        bits = None
        if chosen.corpus is not None:
            bits = bits_per_byte(lm, chosen.corpus, chosen.corpus_documents)
    if answers is not None:
        answers.close()
    results: Results = {
        "model": subject.name,
        "fingerprint": fingerprint,
        "suite": suite.name,
        "tasks": {name: found.summary for name, found in scored.items()},
        **_groups(suite, scored),
        "bits_per_byte": bits,
        "chat": bool(chat),
        "limit": chosen.limit,
        "max_length": length,
        "truncated": lm.truncated,
        "requests": lm.asked,
        "requests_from_disk": lm.found,
        "tokens": sum(all_gather_object(lm.scorer.tokens, world)),
        **facts_of(lm.device, world.size, price, time.monotonic() - began),
    }
    if folder is not None and world.rank == 0:
        write_results(folder, results, {name: found.items for name, found in scored.items()})
    barrier(world)
    return results | {"items": {name: found.items for name, found in scored.items()}}


def ask(lm: Any, tasks: dict[str, Any], limit: int | None, chat: bool) -> dict[str, Scored]:
    """Have `lm` answer the tasks' requests, and judge the answers. Any lm-eval model will do."""
    requests: dict[str, list[Any]] = defaultdict(list)
    template: Callable[..., str] | None = lm.apply_chat_template if chat else None
    with suites.quiet():
        for task in tasks.values():
            task.set_fewshot_seed(suites.SEED)
            task.build_all_requests(
                limit=limit, apply_chat_template=chat, chat_template=template, tokenizer_name=""
            )
            for request in task.instances:
                requests[request.request_type].append(request)
    for kind, some in requests.items():
        for request, answer in zip(some, getattr(lm, kind)(some), strict=True):
            request.resps = [answer]
    return {name: judge(task) for name, task in tasks.items()}


def _groups(suite: suites.Prepared, scored: dict[str, Scored]) -> dict[str, Any]:
    """Entries of several tasks, and the mean of the entries' first metrics."""
    groups = {}
    entries = []
    for entry, names in suite.members.items():
        summaries = {name: scored[name].summary for name in names}
        if len(names) > 1:
            groups[entry] = summarize_group(summaries)
        entries.append(groups[entry] if len(names) > 1 else summaries[names[0]])
    firsts = [entry["metrics"][entry["primary"]]["value"] for entry in entries]
    average = None if any(value is None for value in firsts) else sum(firsts) / len(firsts)
    return {"groups": groups, "average": average}
