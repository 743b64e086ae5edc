"""Ten training losses of a few debug configurations, as they were: a change of numbers is seen.

After a change meant to move them, `python -m tests.golden.test_golden` writes the file anew,
and the commit says why they moved.
"""

import json
from pathlib import Path

import pytest
import torch

from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import load
from kalmagrove.engine.optim import build_optimizer
from kalmagrove.engine.schedule import lr_factor
from kalmagrove.nn import build_model
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.e2e
LOSSES = Path(__file__).with_name("losses.json")
STEPS = 10
CONFIGS = {
    "hybrid kan": ["attention=hybrid", "ffn=kan"],
    "ada grove": ["attention=ada", "ffn=grove"],
    "ada_paper kan, straight-through": [
        "attention=ada_paper",
        "ffn=kan",
        "model.ffn.kan.routing=straight_through",
    ],
    "mla moe": ["attention=mla", "ffn=moe"],
    "softmax dense, muon": ["attention=softmax", "ffn=dense", "optim=muon"],
    "ode chebyshev": [
        "attention=ada",
        "ffn=kan",
        "model.attention.ada.kernel=ode",
        "model.ffn.kan.edge.basis=chebyshev2",
    ],
}


def ten_losses(words: list[str]) -> list[float]:
    """Losses on a fixed stream of tokens with structure to learn, on the CPU in fp32."""
    base = ["model=kan_tiny", "model.layers=2", f"steps={STEPS}", "optim.lr=3e-3"]
    run = load(compose_tree("train", [*base, *words])).with_vocab(128)
    groups = Groups.single()
    torch.manual_seed(run.seed)
    model = build_model(run.model, groups)
    optimizer = build_optimizer(model, run.optim, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(STEPS):
        start = torch.randint(0, 128, (4, 1), generator=generator)
        rows = (start + 3 * torch.arange(49)) % 128
        loss = model(rows[:, :-1], rows[:, 1:]).loss
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(step, STEPS, run.schedule)
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        model.balance(groups)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_the_file(name: str) -> None:
    golden = json.loads(LOSSES.read_text())
    assert set(golden) == set(CONFIGS)
    losses = ten_losses(CONFIGS[name])
    assert losses == pytest.approx(golden[name], rel=1e-3), "see this file's first lines"
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    LOSSES.write_text(json.dumps({n: ten_losses(w) for n, w in CONFIGS.items()}, indent=1) + "\n")
