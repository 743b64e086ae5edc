"""DeepSpeed's launcher for the ranks of one machine, with an end that is quick and leaves none.

`python -m kalmagrove.engine.launcher --save SECONDS ...`, the rest as for
`deepspeed.launcher.launch`. That one asks its ranks to end one after another and gives each 30
seconds, which a rank that waits for a dead one uses up; and if it is killed itself, its ranks go on
with nobody to end them.
"""

import argparse
import base64
import json
import os
import sys

import psutil

from kalmagrove.engine.signals import LAUNCHER_VARIABLE, stop_with

GRACE = 10.0  # seconds for the rest, once a rank has died


def main() -> None:
    """Start the ranks and wait for them; exits with the code of the first that failed."""
    from deepspeed.launcher import launch

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--save", type=float, required=True)
    parser.add_argument("--world_info", required=True)
    own, _ = parser.parse_known_args()
    sys.argv[1:] = sys.argv[3:]
    ranks = len(json.loads(base64.urlsafe_b64decode(own.world_info))["localhost"])
    stop_with(os.getppid())
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    launch.terminate_process_tree = lambda _: end_all(ranks, own.save)
    launch.main()


def end_all(ranks: int, save: float) -> None:
    """End the children of this process and theirs: first asked, then killed.

    Args:
        ranks: that were started. If one is gone the others wait for it and cannot save; else they
            have `save` seconds for that.
    """
    everyone = psutil.Process().children(recursive=True)
    mine = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    for process in mine:
        process.terminate()
    psutil.wait_procs(mine, timeout=save if len(mine) == ranks else GRACE)
    for process in everyone:
        if process.is_running():
            process.kill()
    psutil.wait_procs(mine, timeout=GRACE)


if __name__ == "__main__":
    main()
