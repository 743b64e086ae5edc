"""Finding, swapping and freezing, on tiny models with random weights."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from kalmagrove.config.errors import ConfigError
from kalmagrove.retrofit import REBUILDERS, find, freeze, swap

pytestmark = pytest.mark.unit
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**TINY, "num_key_value_heads": 1}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**TINY, num_key_value_heads=2, head_dim=20),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=4, n_head=2, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**TINY),
    "gemma": lambda: hf.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**GROUPED, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**GROUPED),
    "phi": lambda: hf.PhiConfig(**TINY),
    "phi3": lambda: hf.Phi3Config(**GROUPED),
}
PATHS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


class Swish(nn.Module):
    """SwiGLU: a feed-forward of nothing but its weights."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def description(inner: int = 24) -> dict[str, Any]:
    return {"kind": "swish", "inner": inner}


def build(width: int, dtype: torch.dtype, device: torch.device, inner: int = 24) -> nn.Module:
    return Swish(width, inner).to(device=device, dtype=dtype)


@pytest.fixture(autouse=True)
def swish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REBUILDERS, "swish", lambda it, width: Swish(width, it["inner"]))


def make(name: str, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CONFIGS)
def test_finds_the_feed_forwards_of_each_family(name: str, device: str) -> None:
    model = make(name, device)
    found = find(model)
    assert found.path == PATHS.get(name, "model.layers")
    assert found.feed_forward == "mlp"
    assert (found.width, found.inner) == (16, 64 if name == "gpt2" else 40)
    assert found.feed_forwards() == [block.mlp for block in found.blocks]
    assert found.head is model.get_output_embeddings()
    assert found.tied == (name in ("llama", "gpt2", "gemma", "gemma2"))


def test_finding_leaves_training_modes_alone() -> None:
    model = make("gpt2").train()
    model.transformer.h[0].mlp.dropout.eval()
    find(model)
    assert model.transformer.h[0].mlp.training
    assert not model.transformer.h[0].mlp.dropout.training


class Attention(nn.Module):
    """Attention that takes one input: only running it tells it from a feed-forward."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def test_attention_of_one_input_is_told_apart_by_running_it() -> None:
    model = make("llama")
    for block in model.model.layers:
        block.self_attn = Attention()
    assert find(model).feed_forward == "mlp"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lambda: hf.BertConfig(**TINY, is_decoder=True), "1 linear weights"),
        (lambda: hf.MixtralConfig(**GROUPED, num_local_experts=2), "mlp has no linear weights"),
        (lambda: hf.Qwen2MoeConfig(**GROUPED, num_experts=2), "mlp holds several experts"),
        (
            lambda: hf.OPTConfig(
                vocab_size=64,
                hidden_size=16,
                ffn_dim=40,
                num_hidden_layers=2,
                num_attention_heads=2,
                word_embed_proj_dim=16,
            ),
            "fc1 has 1 linear weights",
        ),
        (
            lambda: hf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2),
            "mlp takes 2 inputs",
        ),
    ],
    ids=["bert", "mixtral", "qwen2_moe", "opt", "bloom"],
)
def test_other_models_are_refused_with_reasons(config: Any, named: str) -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config())
    with pytest.raises(ConfigError, match=named) as caught:
        find(model)
    assert "model=" + type(model).__name__ in str(caught.value)
    assert "; use a dense decoder" in str(caught.value)


def test_a_model_without_a_head_is_refused() -> None:
    with torch.device("meta"):
        model = hf.LlamaModel(hf.LlamaConfig(**GROUPED))
    with pytest.raises(ConfigError, match="must be a causal language model"):
        find(model)


def test_one_odd_block_is_refused() -> None:
    model = make("llama")
    model.model.layers[2].mlp = nn.Linear(16, 16)
    with pytest.raises(ConfigError, match=r"2\.mlp has 1 linear weights"):
        find(model)


def test_blocks_are_selected_by_number_or_from_the_end() -> None:
    found = find(make("llama"))
    assert found.select(last=2) == (2, 3)
    assert found.select([3, -4]) == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"last": 5}, "must be from 1 to the 4"),
        ({"last": 0}, "must be from 1 to the 4"),
        ({"blocks": [4]}, "must be from -4 to 3"),
        ({"blocks": [3, -1]}, r"must not repeat \[3\]"),
        ({"blocks": []}, "at least one"),
        ({}, "only one of them"),
        ({"blocks": [1], "last": 1}, "only one of them"),
    ],
)
def test_blocks_that_cannot_be_selected(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        find(make("llama")).select(**arguments)


@pytest.fixture(name="ids_BT")
def ids() -> Tensor:
    return torch.arange(10).view(2, 5) + 3


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_restore_gives_back_every_bit(name: str, ids_BT: Tensor) -> None:
    model = make(name)
    kind, config = type(model), model.config.to_dict()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = model(ids_BT).logits
    swapped = swap(model, [1, 3], build, description())
    assert isinstance(model, kind)
    assert [isinstance(m, Swish) for m in find(model).feed_forwards()] == [False, True] * 2
    assert model.config.kalmagrove["blocks"] == [1, 3]
    assert model.config.kalmagrove["description"] == description()
    assert not torch.equal(model(ids_BT).logits, before)
    with pytest.raises(ConfigError, match="swapped already"):
        swap(model, [0], build, description())

    assert swapped.restore() is model
    assert type(model) is kind
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert torch.equal(model(ids_BT).logits, before)
    with pytest.raises(ConfigError, match="already restored"):
        swapped.restore()


def test_swapping_keeps_dtype_and_mode() -> None:
    model = make("llama").to(torch.bfloat16).train()
    swap(model, [3], build, description())
    assert model.model.layers[3].mlp.up.weight.dtype == torch.bfloat16
    assert model.model.layers[3].mlp.training


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"kind": "unheard"}, "description.kind=unheard must be one of"),
        ({"kind": "swish", "inner": object}, "must be made of JSON values"),
        ({"kind": "swish", "inner": 25}, "these tensors differ: down.weight"),
    ],
)
def test_descriptions_that_cannot_rebuild(wrong: dict[str, Any], rule: str) -> None:
    model = make("llama")
    with pytest.raises(ConfigError, match=rule):
        swap(model, [3], build, wrong)
    assert type(model) is hf.LlamaForCausalLM
    assert getattr(model.config, "kalmagrove", None) is None


def test_smollm2_trains_46_012_608_parameters() -> None:
    config = hf.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    structure = find(model)
    last = structure.select(last=5)
    swap(model, last, lambda *place: build(*place, inner=1536), description(1536))
    got = freeze(model, structure, last)
    assert got.parts == {
        "attention": 5 * (2 * 576 * 576 + 2 * 576 * 192),
        "feed_forward": 5 * 3 * 576 * 1536,
        "norms": (5 * 2 + 1) * 576,  # two of each block and the one after the last
        "embeddings": 49152 * 576,
    }
    assert got.trainable == sum(got.parts.values()) == 46_012_608
    assert got.total == 134_515_008
    assert freeze(model, structure, last, "frozen").trainable == 46_012_608 - 49152 * 576
    assert freeze(model, structure, last, norms="frozen").trainable == 46_012_608 - 11 * 576
    assert freeze(model, structure, last, norms="all").trainable == 46_012_608 + 50 * 576


def graphs(model: Any, structure: Any, ids_BT: Tensor) -> list[tuple[bool, bool]]:
    """Of each block: whether its input and its output carry a graph."""
    seen = []

    def note(_: Any, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        seen.append((args[0].requires_grad, output.requires_grad))

    handles = [block.register_forward_hook(note) for block in structure.blocks]
    model(ids_BT, labels=ids_BT).loss.backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "phi"])
def test_frozen_blocks_carry_no_graph(name: str, ids_BT: Tensor) -> None:
    model = make(name)
    structure = find(model)
    swap(model, [2, 3], build, description())
    got = freeze(model, structure, [2, 3], "frozen")
    assert got.cut
    # even where something else makes the embeddings' output ask for gradients
    model.enable_input_require_grads()
    seen = graphs(model, structure, ids_BT)
    assert seen[2:] == [(False, True), (True, True)]
    assert [p.requires_grad for p in structure.blocks[:2].parameters()].count(True) == 0
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    model.disable_input_require_grads()
    assert graphs(model, structure, ids_BT)[:2] == [(False, False)] * 2


def test_a_trained_tied_embedding_gets_both_of_its_gradients(ids_BT: Tensor) -> None:
    model = make("llama")
    structure = find(model)
    weight = structure.embeddings.weight
    model(ids_BT, labels=ids_BT).loss.backward()
    wanted, weight.grad = weight.grad, None
    freeze(model, structure, [3], "frozen")
    got = freeze(model, structure, [3], "tied")  # takes the cut of the call before away
    assert not got.cut
    assert graphs(model, structure, ids_BT)[0] == (True, True)
    torch.testing.assert_close(weight.grad, wanted)


@pytest.mark.parametrize("embeddings", ["frozen", "tied"])
def test_checkpointing_changes_no_gradient(embeddings: Any, ids_BT: Tensor) -> None:
    grads = []
    for checkpointing in (False, True):
        model = make("llama").train()
        structure = find(model)
        freeze(model, structure, [2, 3], embeddings)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_norms_below_keep_the_backward_pass_going(ids_BT: Tensor) -> None:
    model = make("llama")
    structure = find(model)
    assert not freeze(model, structure, [3], "frozen", "all").cut
    graphs(model, structure, ids_BT)
    assert structure.blocks[0].input_layernorm.weight.grad is not None


def test_training_the_head_alone_unties_it(ids_BT: Tensor) -> None:
    model = make("llama")
    structure = find(model)
    with torch.no_grad():
        before = model(ids_BT).logits
    got = freeze(model, structure, [3], "head_only")
    assert got.cut
    assert "is now a copy" in got.notes[0]
    assert got.parts["head"] == 64 * 16
    assert "embeddings" not in got.parts
    model.tie_weights()  # must not tie it again
    assert structure.head.weight is not structure.embeddings.weight
    assert torch.equal(model(ids_BT).logits, before)
    graphs(model, structure, ids_BT)
    assert structure.embeddings.weight.grad is None
    assert structure.head.weight.grad is not None
    assert freeze(model, structure, [3], "head_only").notes == ()


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("qwen2", {}, "embeddings=tied must be frozen or head_only"),
        ("llama", {"embeddings": "thawed"}, "embeddings=thawed must be one of"),
        ("llama", {"norms": "some"}, "norms=some must be one of"),
    ],
)
def test_options_that_cannot_be(name: str, options: Any, rule: str) -> None:
    model = make(name)
    with pytest.raises(ConfigError, match=rule):
        freeze(model, find(model), [3], **options)
