"""Saving and loading swapped models, by `load` and by the Auto classes of transformers."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from kalmagrove.config.errors import CheckpointError, ConfigError
from kalmagrove.retrofit import REBUILDERS, find, freeze, load, save, swap

pytestmark = pytest.mark.unit
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=True),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**TINY),
    "gemma2": lambda: hf.Gemma2Config(**TINY, num_key_value_heads=1, head_dim=8),
    "qwen3": lambda: hf.Qwen3Config(**TINY, num_key_value_heads=1, head_dim=8),
}
LAST = [1, 2]


class Squash(nn.Module):
    """One hidden layer with a buffer that is not saved and a marked parameter."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.register_buffer("shift", torch.linspace(-1, 1, inner), persistent=False)
        self.up.weight.kind = "matrix"  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.tanh(self.up(x) + self.shift))


@pytest.fixture(autouse=True)
def squash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REBUILDERS, "squash", lambda it, width: Squash(width, it["inner"]))


def build(width: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return Squash(width, 24).to(device=device, dtype=dtype)


def swapped(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()
    return swap(model, LAST, build, {"kind": "squash", "inner": 24}).model


@pytest.fixture(name="ids_BT")
def ids() -> Tensor:
    return torch.arange(10).view(2, 5) + 3


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_loaded_models_give_the_same_logits(name: str, tmp_path: Path, ids_BT: Tensor) -> None:
    model = swapped(name)
    wanted = model(ids_BT).logits
    save(model, tmp_path / "one")
    for read in (load, hf.AutoModelForCausalLM.from_pretrained):
        got = read(tmp_path / "one")
        assert not got.training
        assert isinstance(got, type(model).__mro__[2])
        assert [isinstance(m, Squash) for m in find(got).feed_forwards()] == [False, True, True]
        assert torch.equal(got(ids_BT).logits, wanted)
        assert find(got).tied == find(model).tied
    tokens = got.generate(ids_BT, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(tokens[:, :5], ids_BT)
    assert tokens.shape == (2, 8)
    # a loaded model, or one that a trainer saves, is written the same way
    got.save_pretrained(tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    configs = [(tmp_path / folder / "config.json").read_text() for folder in ("one", "two")]
    assert configs[0] == configs[1]
    assert torch.equal(load(tmp_path / "two")(ids_BT).logits, wanted)


def test_the_config_keeps_the_base_apart(tmp_path: Path) -> None:
    model = swapped()
    save(model, tmp_path)
    held = json.loads((tmp_path / "config.json").read_text())
    assert held["model_type"] == "kalmagrove_retrofit"
    assert held["base"]["model_type"] == "llama"
    assert held["base"]["architectures"] == ["LlamaForCausalLM"]
    assert held["kalmagrove"] == model.config.kalmagrove
    assert held["kalmagrove"]["blocks"] == LAST
    config = hf.AutoConfig.from_pretrained(tmp_path)
    assert config.kalmagrove == held["kalmagrove"]
    assert type(config.unwrap()) is hf.LlamaConfig


def test_what_no_file_holds_is_rebuilt(tmp_path: Path) -> None:
    save(swapped(), tmp_path)
    module = find(load(tmp_path)).feed_forwards()[2]
    assert torch.equal(module.shift, torch.linspace(-1, 1, 24))
    assert module.up.weight.kind == "matrix"


def test_an_untrained_model_can_be_made_of_the_config(tmp_path: Path) -> None:
    save(swapped(), tmp_path)
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(tmp_path))
    assert isinstance(find(model).feed_forwards()[2], Squash)


@torch.no_grad()
def test_dtype_is_kept_or_changed(tmp_path: Path, ids_BT: Tensor) -> None:
    model = swapped(dtype=torch.bfloat16)
    save(model, tmp_path)
    got = load(tmp_path)
    assert {p.dtype for p in got.parameters()} == {torch.bfloat16}
    assert torch.equal(got(ids_BT).logits, model(ids_BT).logits)
    got = load(tmp_path, torch.float32)
    assert {p.dtype for p in got.parameters()} == {torch.float32}
    for wide, narrow in zip(got.parameters(), model.parameters(), strict=True):
        assert torch.equal(wide, narrow.float())


@torch.no_grad()
def test_swapped_models_are_copied_and_pickled(ids_BT: Tensor) -> None:
    model = swapped()
    for got in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(got) is type(model)
        assert torch.equal(got(ids_BT).logits, model(ids_BT).logits)


@torch.no_grad()
def test_an_untied_head_stays_untied(tmp_path: Path, ids_BT: Tensor) -> None:
    model = swapped()
    freeze(model, find(model), LAST, "head_only")
    model.lm_head.weight.mul_(2)
    save(model, tmp_path)
    got = load(tmp_path)
    assert not find(got).tied
    assert torch.equal(got(ids_BT).logits, model(ids_BT).logits)


@torch.no_grad()
def test_a_model_that_is_not_swapped_stays_plain(tmp_path: Path, ids_BT: Tensor) -> None:
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    got = load(tmp_path)
    assert type(got) is hf.LlamaForCausalLM
    assert torch.equal(got(ids_BT).logits, model(ids_BT).logits)


@torch.no_grad()
def test_shards_are_read(tmp_path: Path, ids_BT: Tensor) -> None:
    model = swapped()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert torch.equal(load(tmp_path)(ids_BT).logits, model(ids_BT).logits)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="has no model-00002"):
        load(tmp_path)


@torch.no_grad()
def test_kan_feed_forwards_come_back(tmp_path: Path, ids_BT: Tensor) -> None:
    description = {"kind": "kan", "config": {"kind": "family", "basis": "legendre", "hidden": 8}}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()

    def kan(width: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return REBUILDERS["kan"](description, width).to(device=device, dtype=dtype)

    swap(model, LAST, kan, description)
    save(model, tmp_path)
    got = load(tmp_path)
    assert torch.equal(got(ids_BT).logits, model(ids_BT).logits)
    kinds = [
        [getattr(p, "kind", None) for p in find(m).feed_forwards()[2].parameters()]
        for m in (model, got)
    ]
    assert kinds[0] == kinds[1]
    assert {"reference"} == backends(got)
    assert {"triton"} == backends(load(tmp_path, backend="triton"))
    with pytest.raises(ConfigError, match="backend=cuda must be one of"):
        load(tmp_path, backend="cuda")


def backends(model: Any) -> set[str]:
    return {part.backend for part in model.modules() if hasattr(part, "backend")}


def test_backends_need_kan_feed_forwards(tmp_path: Path) -> None:
    save(swapped(), tmp_path)
    with pytest.raises(ConfigError, match="needs a model with KAN feed-forwards"):
        load(tmp_path, backend="triton")


def test_kan_descriptions_have_no_other_keys() -> None:
    description = {"kind": "kan", "config": {"kind": "family"}, "backend": "triton"}
    with pytest.raises(ConfigError, match="the keys kind and config alone"):
        REBUILDERS["kan"](description, 16)


def fast_tokenizer() -> Any:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4}
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_tokenizers_travel_with_the_model(tmp_path: Path) -> None:
    model = swapped()
    save(model, tmp_path / "one", fast_tokenizer())
    save(model, tmp_path / "two", tmp_path / "one")
    for folder in ("one", "two"):
        tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer("two one")["input_ids"] == [4, 3]
    with pytest.raises(ConfigError, match="must be a folder with one of tokenizer"):
        save(model, tmp_path / "three", tmp_path / "nowhere")
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        (None, "has no kalmagrove.version"),
        ({"version": 2}, "kalmagrove.version=2 must be 1; load it with the release"),
        ({"feed_forward": None}, "lacks feed_forward"),
        ({"description": {"kind": "unheard"}}, "description.kind=unheard must be one of"),
        ({"path": "model.floors"}, "kalmagrove.path=model.floors is not in the model"),
        (
            {"description": {"kind": "squash", "inner": 25}},
            "mismatched_keys: model.layers.1.mlp.down.weight, ",
        ),
        ({"blocks": [2]}, "missing_keys: model.layers.1.mlp"),
    ],
)
@pytest.mark.parametrize("read", [load, hf.AutoModelForCausalLM.from_pretrained])
def test_records_that_cannot_be_loaded(read: Any, record: Any, rule: str, tmp_path: Path) -> None:
    save(swapped(), tmp_path)
    path = tmp_path / "config.json"
    held = json.loads(path.read_text())
    held["kalmagrove"] = record and {
        key: value for key, value in {**held["kalmagrove"], **record}.items() if value is not None
    }
    path.write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match=rule):
        read(tmp_path)


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path)
    save(swapped(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load(tmp_path)


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="must not be a file"):
        save(swapped(), tmp_path / "file")
    with pytest.raises(ConfigError, match="must be the class that AutoModelForCausalLM"):
        save(hf.LlamaModel(CONFIGS["llama"]()), tmp_path / "folder")
    with pytest.raises(ConfigError, match="upload the folder"):
        swapped().save_pretrained(tmp_path / "folder", push_to_hub=True)
