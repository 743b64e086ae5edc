"""`kalmagrove evaluate`: a model's scores on a suite; several processes share the requests."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.cli import launch
from kalmagrove.cli.compose import hydra_app
from kalmagrove.config import ConfigError, Evaluate, KalmaGroveError, validate

if TYPE_CHECKING:
    from kalmagrove.parallel import Group


def main(argv: Sequence[str]) -> int:
    """Evaluate as `argv` says (Hydra overrides); returns the exit code."""

    def task(wanted: Evaluate, in_sweep: bool) -> int:
        return _start(wanted, argv, in_sweep)

    return hydra_app("evaluate", argv, lambda tree: validate(Evaluate, tree), task)


def _start(wanted: Evaluate, argv: Sequence[str], in_sweep: bool) -> int:
    nproc = _processes(wanted)
    if launch.launched_world_size() is None and nproc > 1:
        if in_sweep:
            raise ConfigError("nproc", nproc, "does not go with a sweep (-m)", "use nproc=1")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={nproc}", "--module", "kalmagrove", "evaluate", *argv]
        return launch.exit_code(subprocess.run(command, env=launch.environment()).returncode)
    return _evaluate(wanted)


def _processes(wanted: Evaluate) -> int:
    gpus = [] if wanted.device == "cpu" else launch.visible_gpus()
    if wanted.nproc == "auto":
        return max(1, len(gpus))
    if gpus and wanted.nproc > len(gpus):
        rule = f"must be at most the {len(gpus)} visible GPUs"
        raise ConfigError("nproc", wanted.nproc, rule, "use auto, or device=cpu")
    return wanted.nproc


def _evaluate(wanted: Evaluate) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        remedy = 'pip install "kalmagrove[eval]"'
        raise KalmaGroveError(f"evaluation needs lm-eval, which is missing; {remedy}")
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from kalmagrove.evaluate.harness import evaluate
    from kalmagrove.evaluate.report import results_table
    from kalmagrove.evaluate.subject import open_model
    from kalmagrove.evaluate.suites import prepare

    disable_progress_bar()
    with _joined() as group:
        suite = prepare(wanted.suite, wanted.files, wanted.shots)
        subject = open_model(wanted.run, _device(wanted), wanted.precision)
        name = re.sub(r"[^\w.-]+", "-", f"{subject.name}-{wanted.suite.name}")
        out = Path(wanted.out or f"evaluations/{name}")
        names = {"limit", "chat", "corpus", "corpus_documents", "batch_tokens", "max_length"}
        settings: dict[str, Any] = wanted.model_dump(include=names | {"precision"})
        results = evaluate(subject, suite, out=out, price=wanted.price, group=group, **settings)
        if group.rank == 0:
            _record(wanted, out, results)
            Console().print(results_table(results))
            _say(out, results)
    return 0


class _joined:  # noqa: N801
    """The group of all processes that a launcher started, while open."""

    def __enter__(self) -> "Group":
        from kalmagrove.parallel import Group

        if launch.launched_world_size() is None:
            return Group.alone()
        import torch.distributed as dist

        from kalmagrove.engine.connect import rendezvous

        os.environ.update(rendezvous(os.environ))
        dist.init_process_group("gloo")  # only answers travel, as Python objects
        assert dist.group.WORLD is not None
        return Group.of(dist.group.WORLD)

    def __exit__(self, *error: object) -> None:
        import torch.distributed as dist

        if dist.is_initialized() and error[0] is None:
            dist.destroy_process_group()


def _device(wanted: Evaluate) -> str:
    """Each of several processes takes the GPU of its local rank."""
    import torch

    alone = launch.launched_world_size() is None
    if alone or wanted.device != "auto" or not torch.cuda.is_available():
        return wanted.device
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def _record(wanted: Evaluate, out: Path, results: dict[str, Any]) -> None:
    """Send the figures to W&B."""
    from kalmagrove.track.sinks import open_sinks

    figures: dict[str, Any] = {"evaluate/average": results["average"]}
    for name, row in (results["tasks"] | results["groups"]).items():
        figures |= {f"evaluate/{name}/{m}": v["value"] for m, v in row["metrics"].items()}
    if results["bits_per_byte"]:
        figures["evaluate/bits_per_byte"] = results["bits_per_byte"]["bits_per_byte"]
    kept = {key: results[key] for key in ("seconds", "dollars", "fingerprint")}
    track = wanted.track.model_copy(update={"tensorboard": False, "trackio": False})
    for sink in open_sinks(track, out, out.name, wanted.model_dump(mode="json")):
        sink.close(figures | kept)


def _say(out: Path, results: dict[str, Any]) -> None:
    from kalmagrove.track import show_usd

    bits = results["bits_per_byte"]
    if bits is not None:
        print(
            f"{bits['bits_per_byte']:.4f} bits per byte on {bits['corpus']} "
            f"({bits['documents']:,} documents, {bits['bytes']:,} bytes)"
        )
    if results["truncated"]:
        print(
            f"{results['truncated']:,} of {results['requests']:,} requests were longer than "
            f"max_length={results['max_length']} and lost their beginning"
        )
    print(
        f"{results['seconds']:.1f} s, {show_usd(results['dollars'])}, "
        f"{results['requests_from_disk']:,} of {results['requests']:,} requests from disk; "
        f"{out}/results.json"
    )
