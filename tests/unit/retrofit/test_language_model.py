"""The model that the engine trains has the loss and the gradients of transformers' own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

from kalmagrove.parallel import Groups
from kalmagrove.retrofit import find, freeze
from kalmagrove.retrofit.model import IGNORED, LanguageModel, positions

pytestmark = pytest.mark.unit
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**TINY, "num_key_value_heads": 1}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_layer=3,
        n_head=2,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**TINY),
    "gemma2": lambda: hf.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=4, final_logit_softcapping=2.0
    ),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=4),
    "phi": lambda: hf.PhiConfig(**TINY),
}
FAMILIES = list(CONFIGS)


def make(name: str = "llama") -> LanguageModel:
    torch.manual_seed(0)
    inner = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).train()
    return LanguageModel(inner, find(inner))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Taken away, by the names in the model of transformers."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix("inner.")] = parameter.grad
            parameter.grad = None
    return found


def rows(batch: int = 2, length: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens and targets, of which about half are left out."""
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(3, 64, (batch, length), generator=generator)
    targets_BT = torch.randint(3, 64, (batch, length), generator=generator)
    out_BT = torch.rand(batch, length, generator=generator) < 0.5
    return tokens_BT, targets_BT.masked_fill(out_BT, IGNORED)


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(name: str) -> None:
    model = make(name)
    tokens_BT, targets_BT = rows()
    count = int((targets_BT != IGNORED).sum())
    logits_BTV = model.inner(tokens_BT).logits.float()
    wanted = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)
    wanted.backward()
    expected = gradients(model)
    output = model(tokens_BT, targets_BT)
    output.loss.backward()
    torch.testing.assert_close(output.loss, wanted)
    assert torch.equal(output.nll, output.loss.detach())
    assert output.logits is None
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=key)
    normalized = model(tokens_BT, targets_BT, normalizer=2.0).loss
    torch.testing.assert_close(normalized, wanted * count / 2)
    # outside of training the model is that of transformers
    assert torch.equal(model.inner(tokens_BT).logits.float(), logits_BTV)


def test_only_positions_with_a_target_reach_the_head() -> None:
    model = make()
    tokens_BT, targets_BT = rows()
    seen: list[tuple[int, ...]] = []
    head = find(model.inner).head
    head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model(tokens_BT, targets_BT)
    model.inner(tokens_BT)
    assert seen == [(1, int((targets_BT != IGNORED).sum()), 64), (2, 12, 64)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("normalizer", [None, 3.0])
def test_rows_without_targets_give_zero(name: str, normalizer: float | None) -> None:
    model = make(name)
    tokens_BT, targets_BT = rows()
    output = model(tokens_BT, torch.full_like(targets_BT, IGNORED), normalizer=normalizer)
    output.loss.backward()
    assert output.loss.item() == 0
    for key, gradient in gradients(model).items():
        assert not gradient.any(), key  # NaN is true


SEGMENTS = [[0] * 5 + [1] * 6 + [2], [0] + [1] + [2] * 10]


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_stays_inside_documents(name: str) -> None:
    model = make(name)
    tokens_BT, targets_BT = rows()
    targets_BT[:, ::2] = tokens_BT[:, ::2]  # some in every document
    segments_BT = torch.tensor(SEGMENTS, dtype=torch.int32)
    logits = model.inner(tokens_BT, use_cache=False, position_ids=positions(segments_BT)).logits
    total = torch.zeros(())
    for row, own in enumerate(segments_BT):
        for number in own.unique():
            here = own == number
            alone = tokens_BT[row, here][None], targets_BT[row, here][None]
            torch.testing.assert_close(
                logits[row, here][None], model.inner(alone[0]).logits, rtol=1e-4, atol=1e-5
            )
            total = total + model(*alone, normalizer=1.0).loss.detach()
    together = model(tokens_BT, targets_BT, segments_BT, normalizer=1.0).loss
    torch.testing.assert_close(together.detach(), total, rtol=1e-5, atol=1e-5)
    apart = model(tokens_BT, targets_BT, normalizer=1.0).loss
    assert abs(together.item() - apart.item()) > 1e-2, "documents matter here"


def test_positions_count_from_each_document() -> None:
    segments_BT = torch.tensor([*SEGMENTS, [3] * 12], dtype=torch.int32)
    assert positions(segments_BT).tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0],
        [0, 0, *range(10)],
        list(range(12)),
    ]


@pytest.mark.parametrize("embeddings", ["tied", "frozen"])
def test_activation_checkpointing_changes_no_gradient(embeddings: Any) -> None:
    found = []
    for wanted in (False, True):
        model = make()
        inner: Any = model.inner
        freeze(inner, find(inner), [1, 2], embeddings)
        model.activation_checkpointing = wanted
        assert model.activation_checkpointing is wanted
        assert inner.is_gradient_checkpointing is wanted
        model(*rows()).loss.backward()
        found.append(gradients(model))
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, msg=key)
    model.activation_checkpointing = False
    assert not inner.is_gradient_checkpointing


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_below_the_cut_is_no_graph(name: str, checkpointing: bool) -> None:
    model = make(name)
    assert freeze(model.inner, find(model.inner), [2], "frozen").cut
    model.activation_checkpointing = checkpointing
    graphs = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda module, args, out: graphs.append(
                (out[0] if isinstance(out, tuple) else out).requires_grad
            )
        )
    model(*rows()).loss.backward()
    assert graphs[:3] == [False, False, True]
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    found = gradients(model)
    assert found
    assert not any(".0." in key or ".1." in key or "embed" in key for key in found)


def test_what_the_engine_asks_of_any_model() -> None:
    model = make()
    assert list(model.blocks) == list(find(model.inner).blocks)
    assert model.metrics() == {}
    assert model.traffic() is None
    model.balance(Groups.single())
    feed_forward = find(model.inner).feed_forwards()[1]
    feed_forward.metrics = {"out_of_range": torch.tensor(0.5)}  # type: ignore[assignment]
    assert model.metrics() == {"1.out_of_range": torch.tensor(0.5)}
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"inner"}, "nothing is registered twice"
