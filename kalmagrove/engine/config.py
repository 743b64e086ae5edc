"""The DeepSpeed configuration of a run: the only place that spells DeepSpeed's keys."""

from typing import Any

import torch

from kalmagrove.config import ConfigError, Training
from kalmagrove.parallel import Groups


def resolve_precision(run: Training, device: torch.device) -> torch.dtype:
    """The parameters' dtype: auto is bf16 on GPU and fp32 elsewhere.

    Raises:
        ConfigError: for bf16 (also when auto chose it) with zero.stage=0.
    """
    asked = run.engine.precision
    if asked == "auto":
        asked = "bf16" if device.type == "cuda" else "fp32"
    if asked == "bf16" and run.zero.stage == 0:
        raise ConfigError(
            "zero.stage",
            0,
            "gives a wrong gradient norm with bf16 in DeepSpeed",
            "use zero.stage=1 or engine.precision=fp32",
        )
    return torch.bfloat16 if asked == "bf16" else torch.float32


def deepspeed_config(
    run: Training, groups: Groups, dtype: torch.dtype, parameters: int
) -> dict[str, Any]:
    """Settings for `deepspeed.initialize`.

    Gradients are accumulated in fp32 whatever the parameters' dtype, in which DeepSpeed reduces
    them. Without ZeRO the engine clips by itself, because DeepSpeed does not report the norm there.

    Args:
        parameters: number of the model's elements; no communication bucket is larger.
    """
    zero = run.zero
    bucket = min(zero.bucket, parameters)
    bucket += bucket % 2  # NCCL wants pairs of 2-byte elements
    tree: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.batch.micro,
        "gradient_accumulation_steps": run.accumulation(groups.dp.size),
        "gradient_clipping": run.optim.clip if zero.stage else 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": zero.overlap_comm,
            "stage3_param_persistence_threshold": zero.persist,
        },
    }
    if dtype == torch.bfloat16:
        tree["bf16"] = {"enabled": True, "check_grad_overflow": True}
        tree["data_types"] = {"grad_accum_dtype": "fp32"}
    return tree
