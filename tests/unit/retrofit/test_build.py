"""From settings to a model that trains: what is replaced, how much trains, and how it is saved."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import CheckpointError, ConfigError
from kalmagrove.config.retrofit_run import Retrofit, retrofit_of
from kalmagrove.retrofit import find, load, save
from kalmagrove.retrofit.build import Built, build, model_folder
from kalmagrove.retrofit.feedforward import FamilyFeedForward
from kalmagrove.retrofit.flops import flops_per_token
from kalmagrove.retrofit.mlp import SwiGLU, matching_hidden
from kalmagrove.retrofit.model import LanguageModel

pytestmark = pytest.mark.unit
WIDTH, INNER, VOCAB = 24, 64, 96
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMOLLM2 = ["scratch=smollm2_135m", "data.tokenizer.kind=bpe", "last=5"]


def run_of(*words: str) -> Retrofit:
    return retrofit_of(compose_tree("retrofit", list(words)))


def smollm2(*words: str) -> Built:
    """With SmolLM2-135M's shape and vocabulary, without memory."""
    with torch.device("meta"):
        return build(run_of(*SMOLLM2, *words), 49152)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama as a folder, as an override."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(7)
    save(hf.LlamaForCausalLM(hf.LlamaConfig(**TINY)), folder)
    return f"base={folder}"


def weights(inner: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in inner.named_parameters()}


ATTENTION = 2 * WIDTH * WIDTH + 2 * WIDTH * (WIDTH // 2)
OTHERS = 2 * ATTENTION + (2 * 2 + 1) * WIDTH + VOCAB * WIDTH  # two blocks, norms, tied embeddings
KAN = 2 * 3 * WIDTH * 12
TREE = "ffn={basis: chebyshev2, degree: 2, layers: two, hidden: 12}"


@pytest.mark.parametrize(
    ("words", "feed_forward", "kind"),
    [
        (["arm=kan", "ffn.hidden=12"], KAN, FamilyFeedForward),
        (["arm=matched", "ffn.hidden=12"], KAN, SwiGLU),
        (["arm=matched", "hidden=20"], 3 * WIDTH * 20, SwiGLU),
        (["arm=restart"], 3 * WIDTH * INNER, None),
        (["arm=finetuned"], 3 * WIDTH * INNER, None),
    ],
)
def test_what_is_replaced_and_trains(
    base: str, words: list[str], feed_forward: int, kind: type[nn.Module] | None
) -> None:
    run = run_of(base, "last=2", *words)
    before = weights(load(run.base or ""))
    built = build(run, VOCAB)
    assert built.blocks == (2, 3)
    assert built.trainable.trainable == 2 * feed_forward + OTHERS
    assert built.trainable.total == sum(p.numel() for p in built.inner.parameters())
    trains = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    assert trains == built.trainable.trainable
    for number, module in enumerate(find(built.inner).feed_forwards()):
        own = hf.models.llama.modeling_llama.LlamaMLP
        assert type(module) is (kind if kind and number > 1 else own)
    for name, value in weights(built.inner).items():
        inside = re.match(r"model\.layers\.[23]\.mlp\.", name)
        if inside and run.replace != "none":
            assert not torch.equal(value, before.get(name, torch.zeros(()))), name
        else:
            assert torch.equal(value, before[name]), name
    again = weights(build(run, VOCAB).inner)
    assert all(torch.equal(value, again[name]) for name, value in weights(built.inner).items())
    if run.replace != "none":
        other = weights(build(run_of(base, "last=2", "seed=1", *words), VOCAB).inner)
        assert [name for name in other if not torch.equal(other[name], again[name])]


def test_everything_or_nothing_trains(base: str) -> None:
    whole = build(run_of(base, "arm=pretrain", "last=1"), VOCAB).trainable
    assert whole.trainable == whole.total
    assert whole.blocks == (0, 1, 2, 3)
    nothing = build(run_of(base, "arm=untouched", "last=1"), VOCAB)
    assert (nothing.trainable.trainable, nothing.trainable.blocks) == (0, ())
    assert not any(p.requires_grad for p in nothing.model.parameters())


def test_restart_gives_fresh_weights_of_the_models_own_size(base: str) -> None:
    built = build(run_of(base, "arm=restart", "last=null", "blocks=[-1]"), VOCAB)
    fresh = find(built.inner).feed_forwards()[3]
    values = torch.cat([p.flatten() for p in fresh.parameters()])
    assert values.std().item() == pytest.approx(0.02, rel=0.05)
    with torch.no_grad():
        assert built.inner(torch.arange(9)[None]).logits.isfinite().all()


def test_the_articles_counts() -> None:
    """Those of SmolLM2-135M with the last five blocks."""
    assert smollm2("arm=restart").trainable.trainable == 46_012_608
    assert smollm2("arm=finetuned").trainable.trainable == 46_012_608
    kan = smollm2("arm=kan")
    assert kan.trainable.trainable == 39_377_088
    assert kan.trainable.total == 134_515_008 - (46_012_608 - 39_377_088)
    assert smollm2("arm=matched").trainable.trainable == 39_377_088
    for arm in ("kan_parallel", "kan_sequence"):
        more = smollm2(f"arm={arm}").trainable.trainable - 39_377_088
        assert 0 <= more <= 2 * 5, "two weights of a sum in each block"
    frozen = smollm2("arm=kan", "embeddings=frozen").trainable.trainable
    assert frozen == 39_377_088 - 49152 * 576


def test_a_match_that_is_not_exact_names_the_nearest(base: str) -> None:
    assert matching_hidden(576, 2 * 3 * 576 * 384) == 2 * 384
    words = ["arm=matched", "ffn.degree=3", "ffn.hidden=13"]  # 8 x 24 x 13 parameters
    with pytest.raises(ConfigError, match=r"no multiple of 3 x 24; use hidden=34 \(2448 parame"):
        build(run_of(base, "last=1", *words), VOCAB)


def test_a_larger_vocabulary_makes_room(base: str) -> None:
    run = run_of(base, "last=1", "ffn.hidden=12")
    built = build(run, 100)
    old = load(run.base or "").get_input_embeddings().weight
    table = built.inner.get_input_embeddings().weight
    assert table.shape == (128, WIDTH)
    assert torch.equal(table[:VOCAB], old)
    assert built.structure.head.weight is table, "still tied"
    assert built.inner.config.vocab_size == 128
    assert built.notes == ("the vocabulary grew from 96 to 128 ids",)
    assert built.inner(torch.tensor([[99]])).logits.shape == (1, 1, 128)
    assert torch.equal(table, build(run, 100).inner.get_input_embeddings().weight)
    frozen = build(run_of(base, "last=1", "ffn.hidden=12", "embeddings=frozen"), 100)
    assert "with embeddings=frozen the new ones keep random embeddings" in frozen.notes[0]
    assert build(run, 50).inner.config.vocab_size == VOCAB, "a smaller one changes nothing"


SCRATCH = ["scratch=llama_tiny", "data.tokenizer.kind=bpe", "arm=pretrain"]


def test_a_fresh_model_follows_tokenizer_and_seed() -> None:
    built = build(run_of(*SCRATCH), 300)
    assert built.inner.config.vocab_size == 320
    assert built.trainable.trainable == built.trainable.total
    same, other = (build(run_of(*SCRATCH, f"seed={seed}"), 300).inner for seed in (0, 1))
    table = built.inner.get_input_embeddings().weight
    assert torch.equal(same.get_input_embeddings().weight, table)
    assert not torch.equal(other.get_input_embeddings().weight, table)
    wide = build(run_of(*SCRATCH, "+scratch.vocab_size=1000"), 300)
    assert wide.inner.config.vocab_size == 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arm=kan", "last=null", "blocks=[4]"], "blocks=[4] must be from -4 to 3"),
        (["+scratch.vocab_size=100"], "scratch.vocab_size=100 must hold the tokenizer's 300 ids"),
        (["scratch.model_type=lama"], "scratch=lama is not understood by transformers"),
        (["scratch.model_type=bert"], "has no list of blocks"),
        (["arm=finetuned", "last=5"], "last=5 must be from 1 to the 4 blocks there are"),
    ],
)
def test_scratch_models_that_cannot_be(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(run_of(*SCRATCH, "last=1", *words), 300)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./here", "nobody/nothing"])
def test_a_base_that_cannot_be_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=f"base={name} cannot be loaded: .*; give a folder"):
        build(run_of(f"base={name}"), 10)


def test_kernels_that_cannot_run_are_refused(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"^backend=triton is not available: .*; use auto"):
        build(run_of(base, "last=1", "backend=triton"), VOCAB)
    built = build(run_of(base, "last=1", "arm=kan_sequence"), VOCAB)
    backends = {part.backend for part in built.inner.modules() if hasattr(part, "backend")}
    assert backends == {"reference"}


@torch.no_grad()
@pytest.mark.parametrize("arm", ["matched", "kan", "kan_parallel", "kan_sequence", "restart"])
def test_what_is_saved_is_loaded(base: str, arm: str, tmp_path: Path) -> None:
    words = ["ffn.hidden=12"] if arm in ("matched", "kan") else []
    built = build(run_of(base, "last=2", f"arm={arm}", *words), VOCAB)
    ids_BT = torch.arange(20).view(2, 10)
    wanted = built.inner.eval()(ids_BT).logits
    save(built.inner, model_folder(tmp_path))
    for read in (load, hf.AutoModelForCausalLM.from_pretrained):
        got = read(tmp_path / "model")
        assert torch.equal(got(ids_BT).logits, wanted)
        assert type(find(got).feed_forwards()[3]) is type(find(built.inner).feed_forwards()[3])


def test_a_retrofitted_base_is_trained_on_but_not_replaced_again(base: str, tmp_path: Path) -> None:
    save(build(run_of(base, "last=1", "ffn.hidden=12"), VOCAB).inner, tmp_path)
    own = f"base={tmp_path}"
    for arm in ("kan", "matched", "restart"):
        with pytest.raises(ConfigError, match=r"is retrofitted already; use replace=none"):
            build(run_of(own, "last=1", f"arm={arm}"), VOCAB)
    built = build(run_of(own, "last=1", "arm=finetuned"), VOCAB)
    assert built.trainable.parts["feed_forward"] == KAN


def test_a_warm_start_imitates(base: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sample = [torch.randint(0, VOCAB, (8, 32), generator=generator) for _ in range(8)]
    words = [base, "last=2", "ffn.hidden=48", "warm_start.tokens=2048"]
    built = build(run_of(*words), VOCAB, sample)
    assert sorted(built.fits) == [2, 3]
    for report in built.fits.values():
        assert report.r2_after > max(report.r2_before, 0.0) + 0.3
        assert report.rows + report.held_out_rows == 8 * 8 * 32
    assert all(p.device.type == "cpu" for p in built.inner.parameters())
    assert not any(module._forward_hooks for module in find(built.inner).feed_forwards())
    cold = build(run_of(*words, "warm_start.tokens=null"), VOCAB)
    assert cold.fits == {}


def counted(built: Built, seq_len: int) -> tuple[float, float]:
    """FLOPs of a token as torch counts them, forward and backward."""
    tokens_BT = torch.randint(0, VOCAB, (2, seq_len))
    found = []
    model = built.model.train()
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens_BT, tokens_BT).loss
    found.append(forward.get_total_flops() / tokens_BT.numel())
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    found.append(backward.get_total_flops() / tokens_BT.numel())
    return found[0], found[1]


@pytest.mark.parametrize("embeddings", ["frozen", "tied", "head_only"])
@pytest.mark.parametrize("arm", ["restart", "kan", "kan_sequence", "kan_parallel", "pretrain"])
def test_flops_are_those_that_torch_counts(base: str, arm: str, embeddings: str) -> None:
    words = ["ffn.hidden=12"] if arm in ("matched", "kan") else []
    run = run_of(base, "last=2", f"arm={arm}", f"embeddings={embeddings}", *words)
    built = build(run, VOCAB)
    built.inner.set_attn_implementation("eager")
    forward, backward = counted(built, 16)
    # eager attention computes the whole square, as many products as causal rows of 31
    flops = flops_per_token(built.inner, built.structure, 31)
    assert flops.forward == pytest.approx(forward, rel=0.01)
    assert flops.backward == pytest.approx(backward, rel=0.01)
    assert flops.training == flops.forward + flops.backward


def test_flops_of_a_model_of_the_usual_size() -> None:
    """Causal attention: half the square."""
    built = smollm2("arm=restart", "embeddings=frozen")
    flops = flops_per_token(built.inner, built.structure, 1024)
    maps = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) + 49152 * 576
    assert flops.forward == 2 * maps + 30 * 4 * 576 * 1025 / 2
    assert flops.backward < 0.5 * flops.forward
    blocks = flops.forward - 2 * 49152 * 576
    assert flops.repeated == pytest.approx(blocks * len(built.blocks) / 30)
    assert flops.hardware(True) == flops.training + flops.repeated
    assert flops.hardware(False) == flops.training


def test_adopted_weights_are_those_given(base: str) -> None:
    from kalmagrove.retrofit.build import adopt

    built = build(run_of(base, "last=1", "ffn.hidden=12"), VOCAB)
    given = {name: torch.full_like(p, 0.25) for name, p in built.model.named_parameters()}
    adopt(built.inner, given)
    assert isinstance(built.model, LanguageModel)
    assert all((p == 0.25).all() for p in built.inner.parameters())
    assert built.structure.head.weight is built.structure.embeddings.weight
