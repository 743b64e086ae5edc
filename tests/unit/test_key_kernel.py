"""The key kernels of ADA and their convolution."""

import pytest
import torch

from kalmagrove.nn.attention.key_kernel import CNNTaps, ODETaps, build_taps, convolve
from kalmagrove.parallel import Groups, Shard, TensorParallel

pytestmark = pytest.mark.unit


def some_kernel(kind: str, channels: int, taps: int, hidden: int = 8) -> CNNTaps | ODETaps:
    tp = TensorParallel.of(Groups.single())
    kernel = build_taps(kind, Shard("tp", 0, 0, channels, channels), taps, hidden, tp)
    kernel.init_weights()
    return kernel


def test_cnn_starts_as_the_identity() -> None:
    keys = torch.randn(2, 9, 5)
    assert torch.equal(convolve(keys, some_kernel("cnn", 5, 4)()), keys)


def test_ode_starts_as_its_exact_solution() -> None:
    taps = some_kernel("ode", 6, 4, 8)()
    want = torch.exp(-3.0 * torch.arange(4.0)).expand(6, 4)
    torch.testing.assert_close(taps, want, atol=1e-3, rtol=0)
    assert torch.equal(taps[:, 0], torch.ones(6))


def test_ode_follows_its_equation() -> None:
    """Against an Euler integration with very small steps in fp64."""
    torch.manual_seed(0)
    kernel = some_kernel("ode", 3, 4, 5).double()
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        h, path, steps = kernel.start_C.clone(), [kernel.start_C.clone()], 2000
        rate = 8 * torch.sigmoid(kernel.rate_C)
        for i in range(3 * steps):
            time = i / steps
            hidden = torch.tanh(kernel.w_in_HC @ h + kernel.w_time_H * time / 4 + kernel.bias_H)
            h = h + (kernel.w_out_CH @ hidden - rate * h) / steps
            if (i + 1) % steps == 0:
                path.append(h.clone())
        torch.testing.assert_close(kernel(), torch.stack(path, 1), atol=5e-3, rtol=0)


def test_ode_is_bounded_at_extreme_rates() -> None:
    kernel = some_kernel("ode", 3, 64, 5)
    torch.nn.init.constant_(kernel.rate_C, 100.0)
    torch.nn.init.normal_(kernel.w_out_CH)
    taps = kernel()
    assert taps.isfinite().all()
    assert taps.abs().max() < 10


def test_ode_gradient_reaches_every_parameter() -> None:
    kernel = some_kernel("ode", 4, 3, 6)
    torch.nn.init.normal_(kernel.w_out_CH, std=0.1)
    convolve(torch.randn(1, 8, 4), kernel()).square().sum().backward()
    for name, parameter in kernel.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_ode_gradcheck() -> None:
    kernel = some_kernel("ode", 2, 3, 2).double()
    torch.nn.init.normal_(kernel.w_out_CH, std=0.1)
    names = [name for name, _ in kernel.named_parameters()]

    def run(*values):
        return torch.func.functional_call(kernel, dict(zip(names, values, strict=True)), ())

    assert torch.autograd.gradcheck(run, tuple(kernel.parameters()))


@pytest.mark.parametrize("kind", ["cnn", "ode"])
def test_bf16_parameters_give_fp32_taps(kind: str) -> None:
    kernel = some_kernel(kind, 3, 4).bfloat16()
    assert kernel().dtype == torch.float32


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 11])
def test_convolution_is_torch_conv1d(tokens: int) -> None:
    keys, taps = torch.randn(2, tokens, 5), torch.randn(5, 4)
    padded = torch.nn.functional.pad(keys.mT, (3, 0))
    want = torch.nn.functional.conv1d(padded, taps.flip(1)[:, None], groups=5).mT
    torch.testing.assert_close(convolve(keys, taps), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 11])
def test_convolution_continues_from_a_tail(tokens: int) -> None:
    keys, taps = torch.randn(2, 7 + tokens, 5), torch.randn(5, 4)
    got = convolve(keys[:, 7:], taps, tail_BPC=keys[:, 4:7])
    torch.testing.assert_close(got, convolve(keys, taps)[:, 7:])
    for border in range(3, 9):
        segments = (torch.arange(7 + tokens) >= border).expand(2, -1).int()
        got = convolve(keys[:, 7:], taps, segments[:, 4:], keys[:, 4:7])
        torch.testing.assert_close(got, convolve(keys, taps, segments)[:, 7:])


@pytest.mark.parametrize("lengths", [(1, 2, 5), (1,), (2,), (3, 1, 1, 1)])
def test_convolution_stops_at_segments(lengths: tuple[int, ...]) -> None:
    keys, taps = torch.randn(2, sum(lengths), 5), torch.randn(5, 4)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    separate = torch.cat([convolve(part, taps) for part in keys.split(list(lengths), 1)], dim=1)
    torch.testing.assert_close(convolve(keys, taps, segments.expand(2, -1)), separate)
