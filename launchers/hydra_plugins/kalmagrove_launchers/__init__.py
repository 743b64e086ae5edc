"""Hydra launchers: `hydra/launcher=slurm`, a job of Slurm for each run of a sweep, and
`hydra/launcher=deepspeed`, several runs at once on this machine.
"""
