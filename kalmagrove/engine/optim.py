"""The optimizer of a run, from `conf/optim`; `build_engine` hands it to DeepSpeed.

Only torch code: DeepSpeed's FusedAdam and CPUAdam compile for a minute at their first use.
"""

import torch
from torch import nn

from kalmagrove.config import Optim
from kalmagrove.engine.muon import Muon
from kalmagrove.engine.param_groups import parameter_groups


def build_optimizer(model: nn.Module, optim: Optim, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (fused on GPU), Muon or SGD over the model's parameter groups."""
    groups = parameter_groups(model, optim)
    if optim.kind == "adamw":
        return torch.optim.AdamW(
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=device.type == "cuda"
        )
    if optim.kind == "muon":
        return Muon(groups, lr=optim.lr, momentum=optim.momentum, betas=optim.betas, eps=optim.eps)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
