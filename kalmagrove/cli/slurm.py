"""Runs as jobs of Slurm: submit them, tell how they are, wait for them.

Called by the Hydra launcher `slurm`, `kalmagrove jobs` and `kalmagrove sweep`. The batch script is
`launchers/templates/job.sbatch`; everything about a job lies in `RUN/slurm`, its script, its list
of runs and a copy of the code in `DIR/jobs/TIME`.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import kalmagrove
from kalmagrove.cli import launch, run_folder
from kalmagrove.cli.multirun import summary_of
from kalmagrove.config import ConfigError, KalmaGroveError, Slurm, Training
from kalmagrove.config.errors import writing
from kalmagrove.config.files import read_json
from kalmagrove.config.place import conf_dir

ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("BOOT_FAIL", "DEADLINE", "PREEMPTED"),
}
# Set by the job or process that submits, and wrong in the one that is submitted
INHERITED = (
    *("SLURM_", "SBATCH_", "SRUN_", "MASTER_ADDR", "MASTER_PORT"),
    *("KALMAGROVE_STOP_FILE", "KALMAGROVE_STARTED"),
)


@dataclass(frozen=True)
class Job:
    """A run that was given to Slurm. `job` is 12, or 12_3 in an array."""

    folder: Path
    job: str

    @property
    def state(self) -> str | None:
        """Slurm's word, PENDING for instance; None: it has forgotten the job."""
        command = ["scontrol", "--oneliner", "show", "job", self.job]
        try:
            shown = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise KalmaGroveError("Slurm's scontrol is not on the PATH") from None
        words = shown.stdout.split()
        if shown.returncode and "Invalid job id" not in shown.stderr:
            raise KalmaGroveError(f"scontrol does not answer: {shown.stderr.strip()}")
        return next((w[9:] for w in words if w.startswith("JobState=")), None)

    @property
    def goes_on(self) -> bool:
        return self.state not in (*ENDED, None)


def recorded(folder: Path) -> Job | None:
    """The job that a run's folder tells of; None: it was never submitted."""
    told = read_json(folder / "slurm" / "job.json")
    return None if told is None else Job(folder, told["job"])


def submit(
    runs: Sequence[Training], verb: str, at_once: int | None = None
) -> tuple[list[Job], list[Path]]:
    """Give runs to Slurm; those that it has already, and finished ones, are left as they are.

    Args:
        verb: `train` or `retrofit`.
        at_once: make one job array, of which so many run at the same time; None: a job a run.

    Returns:
        The jobs, also those of earlier submissions that go on; and the folders of finished runs.

    Raises:
        ConfigError: before anything is submitted, if a run cannot be, or sbatch is missing.
        KalmaGroveError: if sbatch refuses.
    """
    check()
    jobs, finished = [], []
    todo: dict[Path, Training] = {}
    for run in runs:
        folder = run_folder.choose(run)
        before = recorded(folder)
        if run_folder.finished(folder, run) is not None and verb == "train":
            finished.append(folder)
        elif before is not None and before.goes_on:
            print(f"{folder} is job {before.job} already", flush=True)
            jobs.append(before)
        else:
            todo[folder] = run
    shapes = {folder: shape(run) for folder, run in todo.items()}
    asked = [(run.cluster, run.launch) for run in todo.values()]
    if at_once and any(this != asked[0] for this in asked):
        rule = "makes one array, whose runs must have the same cluster.* and launch.*"
        raise ConfigError("hydra.launcher.at_once", at_once, rule, "use null: a job for each run")
    if not todo:
        return jobs, finished
    place = _place(next(iter(todo.values())))
    copy_code(place / "code")
    groups = [list(todo)] if at_once else [[folder] for folder in todo]
    for group in groups:
        for folder in group:
            _prepare(folder, todo[folder], shapes[folder])
        jobs += _submit_one(group, todo[group[0]], verb, place, at_once)
    return jobs, finished


def check() -> None:
    """ConfigError if nothing can be submitted from this machine."""
    if shutil.which("sbatch") is None:
        rule = "needs Slurm's sbatch, which is not on the PATH"
        raise ConfigError("hydra/launcher", "slurm", rule, "submit from a login node")


def _submit_one(
    folders: Sequence[Path], run: Training, verb: str, place: Path, at_once: int | None
) -> list[Job]:
    """Submit a job, or an array with one task for each folder, and write down its number."""
    name = "array" if at_once else folders[0].name
    script, listed = place / f"{name}.sbatch", place / f"{name}.runs"
    listed.write_text("".join(f"{folder}\n" for folder in folders))
    array = f"0-{len(folders) - 1}%{at_once}" if at_once else None
    script.write_text(batch_script(run, verb, listed, place / "code", array))
    number = _sbatch(script)
    jobs = []
    for index, folder in enumerate(folders):
        job = Job(folder, f"{number}_{index}" if at_once else number)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        facts = {"job": job.job, "submitted": now, "script": str(script), "verb": verb}
        (folder / "slurm" / "job.json").write_text(json.dumps(facts, indent=2) + "\n")
        print(f"{folder} is job {job.job}", flush=True)
        jobs.append(job)
    return jobs


def shape(run: Training) -> tuple[int, int]:
    """Machines, and ranks on each.

    Raises:
        ConfigError: if the run names no cluster with Slurm, or its processes do not fit.
    """
    if run.cluster is None or run.cluster.slurm is None:
        name = run.cluster and run.cluster.name
        rule = "must be one with a section `slurm`, for hydra/launcher=slurm"
        raise ConfigError("cluster", name, rule, "see docs/clusters.md")
    ranks, node = launch.world_size(run), run.cluster.gpus_per_node
    if ranks > run.cluster.gpus or (ranks > node and ranks % node):
        rule = f"must be at most cluster.gpus={run.cluster.gpus}, and whole machines of {node}"
        raise ConfigError("launch.nproc", ranks, rule)
    return max(1, ranks // node), min(ranks, node)


def batch_script(
    run: Training, verb: str, listed: Path, code: Path, array: str | None = None
) -> str:
    """The text for sbatch. listed: a file with the runs' folders, one a line."""
    nodes, ranks = shape(run)
    assert run.cluster is not None
    assert run.cluster.slurm is not None
    slurm = run.cluster.slurm
    options = {
        "job-name": listed.stem,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "nodes": nodes,
        "ntasks-per-node": ranks,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.mem,
        "gres": slurm.gres and f"{slurm.gres}:{ranks}",
        "time": slurm.time,
        "signal": f"B:USR1@{run.launch.reserve}",  # the batch shell alone: it would kill ranks
        "array": array,
        "output": listed.with_suffix(".out"),
    }
    lines = [f"--{key}={value}" for key, value in options.items() if value is not None]
    lines += ["--requeue", "--open-mode=append", *slurm.extra]
    setup = [f"module load {shlex.quote(module)}" for module in slurm.modules]
    setup += [f"export {key}={shlex.quote(value)}" for key, value in slurm.env.items()]
    words = {
        "OPTIONS": "\n".join(f"#SBATCH {line}" for line in lines),
        "RUNS": shlex.quote(str(listed)),
        "RESTARTS": str(slurm.restarts),
        "RESERVE": str(run.launch.reserve),
        "CPUS": str(slurm.cpus_per_task),
        "CODE": shlex.quote(str(code)),
        "SETUP": "\n".join(setup),
        "START": _start(slurm, nodes, ranks, verb),
    }
    text = (templates() / "job.sbatch").read_text(encoding="utf-8")
    for key, value in words.items():
        text = text.replace(f"@{key}@", value)
    return text


def _start(slurm: Slurm, nodes: int, ranks: int, verb: str) -> str:
    python = shlex.quote(slurm.python or sys.executable)
    inside = f"{slurm.container} " if slurm.container else ""
    job = f'kalmagrove {verb} --config "$RUN/slurm/config.yaml"'
    if slurm.start == "srun":
        out = '--output="$LOGS/rank-%t.log"'
        return f"srun --kill-on-bad-exit=1 {out} {inside}{python} -m {job}"
    # A shell on each machine, as it alone knows its number.
    host_file = (
        'scontrol show hostnames "$SLURM_JOB_NODELIST" | '
        f'sed "s/$/ slots={ranks}/" >"$LOGS/hostfile"\n'
    )
    deepspeed = (
        f'{inside}{python} -m deepspeed.launcher.runner --hostfile "$LOGS/hostfile" --no_ssh '
        f"--node_rank $SLURM_NODEID --master_addr $MASTER_ADDR --master_port $MASTER_PORT "
        f'--enable_each_rank_log "$LOGS" --no_local_rank --module {job}'
    )
    cpus = ranks * slurm.cpus_per_task
    return (
        f"{host_file}export RUN LOGS\n"
        f"SRUN_CPUS_PER_TASK={cpus} srun --kill-on-bad-exit=1 --nodes={nodes} --ntasks={nodes} "
        f'--ntasks-per-node=1 --output="$LOGS/node-%n.log" bash -c {shlex.quote(deepspeed)}'
    )


def templates() -> Path:
    """The folder of templates: inside the installed package, or in the repository."""
    package = Path(kalmagrove.__file__).resolve().parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "launchers" / "templates"


def copy_code(target: Path) -> None:
    """Copy the running code, so that a job which starts later or again does the same."""
    import kalmagrove_kernels
    from kalmagrove.track.summary import code_version

    unneeded = shutil.ignore_patterns("__pycache__")
    packages = [Path(m.__file__ or "").resolve().parent for m in (kalmagrove, kalmagrove_kernels)]
    for package in packages:
        shutil.copytree(package, target / package.name, ignore=unneeded)
    beside = {"kalmagrove/conf": conf_dir(), "kalmagrove/templates": templates()}
    if not (packages[1] / "csrc").is_dir():  # in the repository
        beside["kalmagrove_kernels/csrc"] = packages[1].parent / "csrc"
    for name, folder in beside.items():
        shutil.copytree(folder, target / name, dirs_exist_ok=True)
    (target / "COMMIT").write_text(code_version() + "\n")


def wait(jobs: Sequence[Job], poll: float, say: Callable[[str], None] = print) -> dict[Path, str]:
    """Until all jobs have ended, saying what changes; what went wrong, by the run's folder.

    poll: seconds between questions to Slurm.
    """
    known: dict[Job, str] = {}
    try:
        while True:
            for job in jobs:
                if known.get(job) in (*ENDED, "forgotten"):
                    continue
                state = job.state or "forgotten"
                if state != known.get(job):
                    say(f"{datetime.now():%H:%M:%S} job {job.job} {job.folder.name}: {state}")
                known[job] = state
            if all(state in (*ENDED, "forgotten") for state in known.values()):
                break
            time.sleep(poll)
    except KeyboardInterrupt:
        say("the jobs go on; `kalmagrove jobs` tells of them, follows and cancels them")
        raise
    return {job.folder: text for job in jobs if (text := failure(job, known[job])) is not None}


def cancel(job: Job, now: bool = False) -> str:
    """Have a job that goes on save and end, and not be queued again; says which.

    now: without saving.

    Raises:
        KalmaGroveError: if scancel refuses.
    """
    (job.folder / "slurm" / "cancel").touch()
    saving = job.state == "RUNNING" and not now
    # The batch script hears USR1 and asks the ranks to save and leave.
    words = ["--batch", "--signal=USR1"] if saving else []
    done = subprocess.run(["scancel", *words, job.job], capture_output=True, text=True)
    if done.returncode:
        raise KalmaGroveError(f"scancel {job.job}: {done.stderr.strip()}")
    return f"job {job.job} {'saves and ends' if saving else 'is cancelled'}"


def failure(job: Job, state: str) -> str | None:
    """Why the ended job is not a finished run, in one line; None: it is one."""
    status = summary_of(job.folder).get("status")
    if status == "done" and state in ("COMPLETED", "forgotten"):
        return None
    return f"job {job.job} {state}, the run is {status or 'not begun'}: {last_words(job.folder)}"


def rank_logs(folder: Path) -> list[Path]:
    """Of the newest try, rank 0's first."""
    tries = sorted((folder / "slurm").glob("*.*/started"), key=lambda path: path.stat().st_mtime)
    logs = tries[-1].parent.glob("*.log") if tries else []
    return sorted(logs, key=lambda log: int((re.findall(r"rank-?(\d+)", log.name) or ["99999"])[0]))


def last_words(folder: Path) -> str:
    """The last error of a run's ranks, else the last line of its batch script."""
    logs = rank_logs(folder)
    for mark in ("kalmagrove: ", "Error"):
        for log in logs:
            said = [line for line in _lines(log) if mark in line]
            if said:
                return f"{said[-1].strip()} ({log})"
    log = folder / "slurm" / "batch.log"
    return f"{(_lines(log) or ['nothing was written'])[-1]} ({log})"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _place(run: Training) -> Path:
    """A new folder for what belongs to a submission."""
    base = Path(run.dir).expanduser().resolve() / "jobs"
    for number in range(1, 1000):
        place = base / f"{datetime.now():%Y-%m-%dT%H-%M-%S}{'' if number == 1 else f'-{number}'}"
        with writing("dir", run.dir), suppress(FileExistsError):
            place.mkdir(parents=True)
            return place
    raise ConfigError("dir", run.dir, "has a thousand submissions of this second")


def _prepare(folder: Path, run: Training, of: tuple[int, int]) -> None:
    """The run's frozen configuration, and nothing left of an earlier job."""
    slurm = folder / "slurm"
    slurm.mkdir(parents=True, exist_ok=True)
    for name in ("cancel", "progress"):
        (slurm / name).unlink(missing_ok=True)
    processes = run.launch.model_copy(update={"nproc": of[0] * of[1]})
    checkpoint = run.checkpoint
    if checkpoint.resume == "never":  # the folder is new; a job that is queued again resumes
        checkpoint = checkpoint.model_copy(update={"resume": "auto"})
    change = {"launch": processes, "cluster": None, "checkpoint": checkpoint}
    run_folder.write_config(
        slurm / "config.yaml", run_folder.pinned(run, folder).model_copy(update=change)
    )


def _sbatch(script: Path) -> str:
    """Submit; returns the job's number. Also from inside a job, whose variables are left out."""
    env = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(INHERITED)}
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise KalmaGroveError(f"sbatch refuses {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
