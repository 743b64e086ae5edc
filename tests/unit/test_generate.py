"""Generation: prompts of different lengths in lock step, seeds, nucleus, end of text."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kalmagrove.config import ConfigError
from kalmagrove.evaluate.generate import generate, sample

pytestmark = pytest.mark.unit


class Letters:
    """a, b, c ... are 0, 1, 2 ...; the end of text is the last of `size` tokens."""

    def __init__(self, size: int = 12) -> None:
        self.size, self.eot = size, size - 1

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 97 for c in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join("." if t == self.eot else chr(97 + t) for t in tokens)


class Recurrent(nn.Module):
    """A small GRU as language model: its text depends on all that it read. Vocabulary padded to
    16.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 8)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 16)
        self.calls: list[torch.Tensor] = []
        nn.init.normal_(self.head.weight, std=3.0)
        with torch.no_grad():
            self.head.bias[12:] += 100.0  # padding is the likeliest, were it allowed

    def init_cache(self, batch: int, max_tokens: int) -> dict:
        return {"h": torch.zeros(1, batch, 8), "room": max_tokens}

    def forward(self, tokens, targets=None, segments=None, normalizer=None, cache=None):
        assert not self.training
        self.calls.append(tokens)
        cache["room"] -= tokens.shape[1]
        assert cache["room"] >= 0
        out, cache["h"] = self.gru(self.embedding(tokens), cache["h"])
        return SimpleNamespace(logits=self.head(out))


class Successor(Recurrent):
    """After letter n comes n + 1, surely; after the end of text comes a."""

    def forward(self, tokens, targets=None, segments=None, normalizer=None, cache=None):
        self.calls.append(tokens)
        logits = torch.full((*tokens.shape, 16), -50.0)
        return SimpleNamespace(logits=logits.scatter(-1, ((tokens + 1) % 12)[..., None], 50.0))


def write(prompts, model=None, **options):
    settings = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": 0} | options
    return generate(model or Recurrent(), Letters(), prompts, **settings)


def test_greedy_follows_the_model() -> None:
    assert write(["", "c", "abc"], Successor(), temperature=0.0, max_new_tokens=5) == [
        "abcde", "defgh", "defgh",
    ]  # fmt: skip


def test_text_ends_at_the_end_of_text() -> None:
    assert write(["i", ""], Successor(), temperature=0.0, max_new_tokens=6) == ["jk", "abcdef"]
    assert write(["i"], Successor(), temperature=0.0, max_new_tokens=6, stop_at_eot=False) == [
        "jk.abc"
    ]


def test_short_prompts_are_prefilled_and_long_ones_forced() -> None:
    model = Successor()
    write(["ab", "abcgg"], model, temperature=0.0, max_new_tokens=2)
    fed = torch.cat(model.calls, dim=1)
    assert model.calls[0].shape == (2, 3)
    assert fed[1, :6].tolist() == [11, 0, 1, 2, 6, 6]
    assert fed[0, :4].tolist() == [11, 0, 1, 2]


def test_the_last_token_is_not_fed() -> None:
    model = Successor()
    write([""], model, temperature=0.0, max_new_tokens=3)
    assert len(model.calls) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_a_prompt_does_not_see_its_batch(temperature: float) -> None:
    prompts = ["", "a", "abcdefg", "kk", "cab"]
    together = write(prompts, temperature=temperature)
    for prompt, text in zip(prompts, together, strict=True):
        assert write([prompt], temperature=temperature) == [text]
    assert write(prompts[::-1], temperature=temperature) == together[::-1]


def test_the_seed_decides() -> None:
    one = write(["ab"], temperature=2.0, max_new_tokens=20)
    assert write(["ab"], temperature=2.0, max_new_tokens=20) == one
    assert write(["ab"], temperature=2.0, max_new_tokens=20, seed=1) != one


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    model = Recurrent()
    before = torch.get_rng_state()
    write(["ab"], model)
    assert torch.equal(torch.get_rng_state(), before)


def test_repeated_prompts_get_texts_of_their_own() -> None:
    texts = write(["ab"] * 4, temperature=2.0, max_new_tokens=20)
    assert len(set(texts)) == 4


def test_padding_is_never_drawn() -> None:
    for temperature in (0.0, 5.0):
        (text,) = write(["a"], temperature=temperature, max_new_tokens=200, stop_at_eot=False)
        assert len(text) == 200
        assert set(text) <= set("abcdefghijk.")


def test_training_mode_is_restored() -> None:
    model = Recurrent().train()
    write(["a"], model)
    assert model.training


def test_nothing_to_do() -> None:
    assert write([]) == []
    assert write(["a", "b"], max_new_tokens=0) == ["", ""]


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_new_tokens", -1), ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1)],
)
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        write(["a"], **{key: value})


def test_sampling_follows_the_softmax() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).expand(4000, -1)
    uniform = (torch.arange(4000) + 0.5).double() / 4000
    counts = torch.bincount(sample(logits, uniform, 2.0, 1.0), minlength=4) / 4000
    torch.testing.assert_close(counts, torch.softmax(logits[0] / 2.0, 0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.05, [0]), (0.5, [0]), (0.51, [0, 2]), (0.8, [0, 2]), (0.81, [0, 2, 1])]
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[int]) -> None:
    probabilities = torch.tensor([0.5, 0.15, 0.3, 0.05], dtype=torch.float64)
    logits = probabilities.log().expand(2000, -1)
    uniform = (torch.arange(2000) + 0.5).double() / 2000
    drawn = sample(logits, uniform, 1.0, top_p - 1e-9 if top_p in (0.5, 0.8) else top_p)
    counts = torch.bincount(drawn, minlength=4) / 2000
    want = torch.zeros(4, dtype=torch.float64)
    want[kept] = probabilities[kept] / probabilities[kept].sum()
    torch.testing.assert_close(counts.double(), want, atol=1e-3, rtol=0)


def test_extreme_uniform_numbers_stay_inside_the_nucleus() -> None:
    logits = torch.tensor([[0.0, 5.0, -200.0]]).expand(2, -1)
    uniform = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert sample(logits, uniform, 1.0, 1.0).tolist() == [1, 0]
