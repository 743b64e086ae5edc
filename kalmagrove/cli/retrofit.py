"""`kalmagrove retrofit`: other feed-forwards in a pretrained model, trained, saved, evaluated.

`retrofit_on_this_rank` is the whole program in one screen; the engine, data, ledger and checkpoints
are those of `kalmagrove train`.
"""

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.cli import launch, run_folder
from kalmagrove.cli.compose import hydra_app
from kalmagrove.cli.session import (
    already_finished,
    by_main,
    check_same_data,
    claim,
    rank_heartbeat,
    saved_tree,
    set_up_logging,
)
from kalmagrove.cli.supervise import supervise
from kalmagrove.config import KalmaGroveError, Suite
from kalmagrove.config.attempts import Attempt, heartbeat
from kalmagrove.config.retrofit_run import Retrofit, WarmStart, retrofit_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kalmagrove.data import Prepared
    from kalmagrove.parallel import Groups
    from kalmagrove.retrofit.build import Built
    from kalmagrove.track import Energy

RESULT = "arm.json"  # what `kalmagrove compare` reads
REPORT = "retrofit.json"  # what was replaced, and how well a warm start imitates


def main(argv: Sequence[str]) -> int:
    """Retrofit as `argv` says (overrides, `--config FILE`); returns the exit code."""
    if any(word.partition("=")[0] == "--config" for word in argv):
        return _start(checked(saved_tree(list(argv))), in_sweep=False)
    studies: dict[str, Path] = {}

    def task(run: Retrofit, in_sweep: bool) -> int:
        if in_sweep and run.study:
            studies[run.study] = Path(run.dir).expanduser() / run.study
        return _start(run, in_sweep)

    code = hydra_app("retrofit", argv, checked, task)
    for folder in studies.values() if code == 0 else ():
        from kalmagrove.cli import compare

        try:
            compare.show(folder)
        except KalmaGroveError as error:  # other processes may still work on the study
            print(f"no comparison yet: {error}")
    return code


def checked(tree: dict[str, Any]) -> Retrofit:
    run = retrofit_of(tree)
    _suites(run)
    return run.check_world(launch.world_size(run))


def _start(run: Retrofit, in_sweep: bool) -> int:
    if launch.launched(in_sweep):
        with rank_heartbeat(run, launch.world_size(run)) as beating:
            return retrofit_on_this_rank(run, beating.attempt)
    launch.check_here(run)
    folder = run_folder.choose(run)
    if _finished(folder, run):
        return _already(folder)
    world_size = launch.world_size(run)
    with heartbeat(folder, world_size, since=0.0 if in_sweep else None) as beating:
        if world_size == 1 and not run.launch.max_restarts:
            with launch.unlaunched():
                return retrofit_on_this_rank(run, beating.attempt, stay=in_sweep)
        code = supervise(run_folder.pinned(run, folder), world_size, beating, "retrofit")
    if code == 0 and not (folder / RESULT).exists():
        raise KalmaGroveError(
            f"the processes ended without an error, but {folder / RESULT} is not there; the same "
            "command continues"
        )
    return code


def _finished(folder: Path, run: Retrofit) -> bool:
    """Whether `run` is trained and evaluated as it says; ConfigError if another one was trained."""
    if run.checkpoint.resume == "never" or not (folder / RESULT).is_file():
        return False
    run_folder.same_settings(folder, run)
    evaluated = json.loads((folder / RESULT).read_text()).get("evaluation")
    return bool(evaluated == run.evaluation.model_dump(mode="json"))


def _already(folder: Path) -> int:
    print(f"{folder} is finished; again with checkpoint.resume=never, or change the configuration")
    return 0


def retrofit_on_this_rank(composed: Retrofit, attempt: Attempt, stay: bool = False) -> int:
    """The main path, on one process of the run; returns the exit code.

    stay: more runs follow in this process.
    """
    import torch

    from kalmagrove.data import prepare
    from kalmagrove.engine import connect, disconnect
    from kalmagrove.parallel import Groups
    from kalmagrove.track import Energy

    set_up_logging()
    _without_bars()
    for suite in _suites(composed):  # what is missing is missed before anything is trained
        _questions(suite, composed.evaluation.files, composed.evaluation.shots)
    prepared = prepare(composed.data, progress=launch.launched_rank() == 0)
    device = connect(composed)
    energy = Energy.of(device)
    groups = Groups.init(composed.parallel, device, composed.launch.timeout)
    check_same_data(composed, groups, prepared)
    folder, summary = claim(composed, groups)
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if summary is None or by_main(groups, lambda: _reclaim(folder)):
            _make(composed, folder, groups, prepared, energy, attempt)
            gc.collect()  # DeepSpeed's engine refers to itself; its memory is needed
            if device.type == "cuda":
                torch.cuda.empty_cache()
        elif groups.is_main:
            already_finished(folder, summary)
        result = _evaluate(composed, folder, groups, prepared)
        by_main(groups, lambda: _write_result(folder, composed, result))
    finally:
        if stay:  # also at a cap of the budget, after which the next run begins
            Groups.reset()
    if not stay:
        disconnect()
    return 0


def _without_bars() -> None:
    """transformers shows a bar for every file, on every rank."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _reclaim(folder: Path) -> bool:
    """Whether a trained run's model is missing: it was stopped before that was written."""
    from kalmagrove.retrofit.build import model_folder

    if (model_folder(folder) / "config.json").is_file():
        return False
    run_folder.claim(folder)
    return True


def _make(
    run: Retrofit,
    folder: Path,
    groups: "Groups",
    prepared: "Prepared",
    energy: "Energy",
    attempt: Attempt,
) -> None:
    """Build, train and save the model."""
    from kalmagrove.engine import find_checkpoints
    from kalmagrove.retrofit.build import build

    begun = by_main(groups, lambda: bool(find_checkpoints(folder)))
    warm = run.warm_start.tokens is not None and not begun  # else the checkpoint has the weights
    given = run if warm else run.model_copy(update={"warm_start": WarmStart()})
    sample = _sample(prepared, run) if warm else []
    built = build(given, prepared.tokenizer.size, sample, groups.device)
    by_main(groups, lambda: _report(folder, run, built, keep=begun))
    if run.train == "none":
        by_main(groups, lambda: run_folder.settle(folder, run, prepared.tokenizer))
        by_main(groups, lambda: _export(folder, built.inner, None))
    else:
        _train(run, folder, groups, prepared, built, energy, attempt)


def _sample(prepared: "Prepared", run: Retrofit) -> "list[torch.Tensor]":
    """The first rows of the training data, for a warm start."""
    from kalmagrove.data import build_batches

    assert run.warm_start.tokens is not None
    batches = build_batches(prepared, run, 0, 1)
    rows = -(-run.warm_start.tokens // run.data.seq_len)
    return [next(batches)["tokens"] for _ in range(-(-rows // run.batch.micro))]


def _report(folder: Path, run: Retrofit, built: "Built", *, keep: bool) -> None:
    """Say what was done to the model, and write it down; `keep`: unless that was done before."""
    if keep and (folder / REPORT).is_file():
        return
    trainable = built.trainable
    fits = {str(number): asdict(fit) for number, fit in built.fits.items()}
    tree = {
        "blocks": list(built.blocks),
        "replace": run.replace,
        "path": f"{built.structure.path}.*.{built.structure.feed_forward}",
        "trainable": asdict(trainable),
        "warm_start": fits,
        "notes": list(built.notes),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(tree, indent=1) + "\n")
    parts = ", ".join(f"{name} {count:,}" for name, count in trainable.parts.items() if count)
    if run.replace != "none":
        blocks = ", ".join(map(str, built.blocks))
        count = len(built.structure.blocks)
        print(f"{folder.name}: replace={run.replace} in blocks {blocks} of {count}")
    print(f"trains {trainable.trainable:,} of {trainable.total:,} parameters ({parts})")
    for number, fit in built.fits.items():
        print(f"warm start, block {number}: R^2 {fit.r2_before:.3f} -> {fit.r2_after:.3f}")
    for note in built.notes:
        print(f"note: {note}")


def _train(
    run: Retrofit,
    folder: Path,
    groups: "Groups",
    prepared: "Prepared",
    built: "Built",
    energy: "Energy",
    attempt: Attempt,
) -> None:
    """As `kalmagrove train` does, and the model in the format of Hugging Face."""
    from kalmagrove.data import build_batches, val_batches
    from kalmagrove.engine import build_engine, check_room, fit, resume, whole_weights
    from kalmagrove.retrofit.flops import flops_per_token
    from kalmagrove.track import build_meters

    batches = build_batches(prepared, run, groups.dp.rank, groups.dp.size)
    held_out = val_batches(prepared, run, groups.dp.rank, groups.dp.size)
    flops = flops_per_token(built.inner, built.structure, run.data.seq_len)
    engine = build_engine(built.model, run, groups)
    meters = build_meters(
        run,
        folder,
        groups,
        params_total=built.trainable.total,
        params_active=built.trainable.total,
        flops_per_token=flops.training,
        forward_flops_per_token=flops.forward,
        hardware_flops_per_token=flops.hardware(run.engine.activation_checkpointing),
        val_bytes_per_token=prepared.val_bytes_per_token,
        val_split_tokens=prepared.manifest.val.targets,
        baselines={"unigram_nats": prepared.unigram_nats, "bigram_nats": prepared.bigram_nats},
        energy=energy,
        attempt=attempt,
    )
    state = resume(engine, batches, meters, run, folder)
    check_room(engine, state.folder, state.step)
    by_main(groups, lambda: run_folder.settle(folder, run, prepared.tokenizer))
    fit(engine, batches, held_out, meters, state, run)
    weights = whole_weights(engine)
    by_main(groups, lambda: _export(folder, built.inner, weights))


def _export(folder: Path, inner: Any, weights: "dict[str, torch.Tensor] | None") -> None:
    """The model with its tokenizer under `model/`, whole or not at all."""
    from kalmagrove.retrofit import save
    from kalmagrove.retrofit.build import adopt, model_folder

    final = model_folder(folder)
    partial = final.with_name(".model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if weights is not None:
        adopt(inner, weights)
    save(inner, partial, folder / "tokenizer")
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)


def _evaluate(
    run: Retrofit, folder: Path, groups: "Groups", prepared: "Prepared"
) -> dict[str, Any]:
    """Scores of the saved model, in `evaluation/SUITE`; what `arm.json` says of the run."""
    from kalmagrove.evaluate.harness import evaluate
    from kalmagrove.evaluate.subject import open_model

    wanted = run.evaluation
    summary = run_folder.done(folder, run) or {}
    subject = open_model(folder, str(groups.device), run.engine.precision)
    if run.train == "none":
        summary = _facts(groups, prepared, _held_out_nats(run, groups, prepared, subject.model))
    for suite in _suites(run):
        results = evaluate(
            subject,
            _questions(suite, wanted.files, wanted.shots),
            out=folder / "evaluation" / suite.name,
            price=run.price,
            group=groups.world,
            limit=(wanted.limits or {}).get(suite.name, wanted.limit),
            chat=wanted.chat,
            batch_tokens=wanted.batch_tokens,
            precision=run.engine.precision,
        )
        if groups.is_main:
            _show_scores(results)
    return summary


def _held_out_nats(
    run: Retrofit, groups: "Groups", prepared: "Prepared", inner: "nn.Module"
) -> float:
    """Of the held-out split, of a model that was not trained: nats a target token."""
    import torch

    from kalmagrove.data import val_batches
    from kalmagrove.engine import mean_nats
    from kalmagrove.retrofit import find
    from kalmagrove.retrofit.model import IGNORED, LanguageModel

    model = LanguageModel(inner, find(inner)).eval()

    @torch.no_grad()
    def eval_loss(batch: dict[str, Any]) -> "tuple[torch.Tensor, torch.Tensor]":
        moved = {k: v.to(groups.device) for k, v in batch.items() if torch.is_tensor(v)}
        loss = model(**moved, normalizer=1.0).loss
        return loss.double(), (moved["targets"] != IGNORED).sum()

    held_out = val_batches(prepared, run, groups.dp.rank, groups.dp.size)
    return mean_nats(eval_loss, held_out, groups)[0]


def _facts(groups: "Groups", prepared: "Prepared", nats: float) -> dict[str, Any]:
    """What a summary says of a model that trains nothing."""
    from kalmagrove.track.summary import bits_per_byte, code_version, machine, versions

    return {
        "val_loss_nats": nats,
        "val_bits_per_byte": bits_per_byte(nats, prepared.val_bytes_per_token),
        "machine": machine(groups.device),
        "commit": code_version(),
        "versions": versions(),
    }


def _write_result(folder: Path, run: Retrofit, summary: dict[str, Any]) -> None:
    """`arm.json`, last of all: with it the run is finished."""
    report = json.loads((folder / REPORT).read_text())
    trainable, machine = report["trainable"], summary.get("machine", {})
    tree = {
        "arm": run.arm_name,
        "seed": run.seed,
        "trainable_parameters": trainable["trainable"],
        "total_parameters": trainable["total"],
        "peak_bytes": summary.get("peak_memory"),
        "tokens_per_second": summary.get("tokens_per_s"),
        "usd": summary.get("usd"),
        "train_seconds": summary.get("device_seconds"),
        "val_nats": summary.get("val_loss_nats"),
        "bits_per_byte": summary.get("val_bits_per_byte"),
        "device": machine.get("gpu") or machine.get("cpu"),
        "steps": summary.get("steps", 0),
        "tokens": summary.get("tokens", 0),
        "commit": summary.get("commit"),
        "versions": summary.get("versions"),
        "evaluation": run.evaluation.model_dump(mode="json"),
    }
    partial = folder / f".{RESULT}"
    partial.write_text(json.dumps(tree, indent=1) + "\n")
    partial.replace(folder / RESULT)
    print(f"{folder / 'model'}: the model, for kalmagrove.retrofit.load and AutoModelForCausalLM")


def _suites(run: Retrofit) -> list[Suite]:
    """What is evaluated; ConfigError for a suite that is not there."""
    from kalmagrove.evaluate.suites import load_suite

    tasks = run.evaluation.tasks
    return [
        *(load_suite(name) for name in run.evaluation.suites),
        *([Suite(name="tasks", tasks=tasks)] if tasks else []),
    ]


@cache
def _questions(suite: Suite, files: str | None, shots: int | None) -> Any:
    """Of a suite, read once a process."""
    from kalmagrove.evaluate import suites

    return suites.prepare(suite, files, shots)


def _show_scores(results: dict[str, Any]) -> None:
    from rich.console import Console

    from kalmagrove.evaluate.report import results_table

    Console().print(results_table(results))
