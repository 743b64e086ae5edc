"""The model on a GPU against the model on the CPU, and the same commands there."""

import json
import math
from pathlib import Path

import pytest
import torch

from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import KAN, Grove, load
from kalmagrove.nn import Transformer, build_model
from kalmagrove.nn.backends import resolve_backend
from kalmagrove.nn.grove import GroveLayer
from kalmagrove.parallel import Groups
from tests.e2e.conftest import SMALL, run

pytestmark = pytest.mark.gpu
KINDS = [("hybrid", "kan"), ("ada", "grove"), ("mla", "moe"), ("softmax", "dense")]


def small_model(attention: str, ffn: str) -> Transformer:
    words = ["model=kan_tiny", f"attention={attention}", f"ffn={ffn}"]
    model = load(compose_tree("train", words)).with_vocab(500).model
    torch.manual_seed(0)
    return build_model(model, Groups.single())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize(("attention", "ffn"), KINDS)
def test_gpu_equals_cpu(attention: str, ffn: str) -> None:
    model, tokens = small_model(attention, ffn), torch.randint(0, 500, (2, 130))
    segments = (torch.arange(130) > 70).int().expand(2, -1)
    want = model(tokens, tokens.roll(-1, 1), segments).loss
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cuda()
    got = model(tokens.cuda(), tokens.roll(-1, 1).cuda(), segments.cuda()).loss
    got.backward()
    assert relative(got.detach(), want.detach()) < 1e-5
    for name, p in model.named_parameters():
        if name in grads and grads[name].norm() > 1e-6:
            assert relative(p.grad, grads[name]) < 2e-3, name


@pytest.mark.parametrize(("attention", "ffn"), KINDS)
def test_bf16_is_close_and_finite(attention: str, ffn: str) -> None:
    model, tokens = small_model(attention, ffn).cuda(), torch.randint(0, 500, (2, 130)).cuda()
    want = model(tokens, tokens).loss.item()
    model.bfloat16()
    loss = model(tokens, tokens).loss
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=2e-2)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_a_layer_of_groves_never_waits_for_the_gpu(backend: str) -> None:
    torch.manual_seed(0)
    body, device = KAN(edges=64, top_k=8, rank=16), torch.device("cuda")
    config = Grove(groves=8, top_g=2, kan=body)
    layer = GroveLayer(128, config, Groups.single(), resolve_backend(backend, device, body))
    layer.init_weights(0.02, 0.02)
    layer.bfloat16().to(device)
    x = torch.randn(2, 130, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    for mode in ("default", "error"):  # once to build and choose kernels, once to refuse
        torch.cuda.set_sync_debug_mode(mode)
        try:
            y, aux_loss = layer(x)
            (y.float().square().sum() + aux_loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert layer.edge.backend != "reference"


@pytest.mark.parametrize(
    "words",
    [
        ["zero=stage1", "engine.precision=bf16"],
        ["zero=stage2", "engine.precision=bf16", "engine.activation_checkpointing=true"],
        ["zero=stage3", "engine.precision=bf16"],
        ["zero=stage0", "engine.precision=fp32", "optim=muon"],
        ["zero=stage2", "engine.precision=bf16", "engine.compile=true", "optim=muon"],
    ],
    ids=" ".join,
)
def test_the_same_command_trains_resumes_and_generates(words: list[str], tmp_path: Path) -> None:
    source = f"data.source.paths=[{Path(json.__file__).parent}/*.py]"
    base = [*SMALL, source, f"data.cache={tmp_path}/cache", "name=gpu", "checkpoint.every=6"]
    first = run("train", *base, *words, "steps=12", cwd=tmp_path, timeout=500)
    assert first.returncode == 0, first.stdout + first.stderr
    summary = json.loads((tmp_path / "runs/gpu/summary.json").read_text())
    assert summary["machine"]["gpu"]
    assert summary["device_unit"] == "gpu"
    assert summary["usd"] is None, "the price of this GPU was not given"
    lines = [json.loads(x) for x in (tmp_path / "runs/gpu/ledger.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    words = ["generate", "run=runs/gpu", "prompt=def", "max_new_tokens=8"]
    assert run(*words, cwd=tmp_path).stdout.startswith("def")
