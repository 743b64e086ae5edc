"""Tokenizers, the loss mask of conversations, and n-gram baselines."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from kalmagrove.data import chat, ngram, tokenizer
from kalmagrove.data.rows import Document, Where
from kalmagrove.data.tokenizer import BPE, EOT, Auto

pytestmark = pytest.mark.unit

TEXTS = ["the grove of the kalma, the tree of the grove\n" * 3, "def f(x):\n    return x + 1\n"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the grove?"},
    {"role": "assistant", "content": "\n\nTrees  🌲, x<|end|>y?"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": " of the tree"},
]
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def bpe() -> BPE:
    return BPE.train(TEXTS, 300)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "héllo wörld",
        "日本語 🌲\u200d\u0301",
        "\x00\x7f\r\n\t  x",
        f"a {EOT} b<|user|>",
        TEXTS[1],
    ],
)
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert not {bpe.eot, *bpe.markers.values()} & set(ids)


def test_bpe_training_is_deterministic_and_survives_a_save(bpe, tmp_path):
    again = BPE.train(TEXTS, 300)
    bpe.save(tmp_path)
    loaded = tokenizer.load("bpe", tmp_path)
    assert again.fingerprint == bpe.fingerprint == loaded.fingerprint
    assert loaded.size == bpe.size <= 300
    assert BPE.train(TEXTS[:1], 300).fingerprint != bpe.fingerprint


def test_long_texts_are_cut_without_a_trace(bpe, monkeypatch):
    text = "".join(TEXTS) * 20 + "\n\n\n  end"
    whole = bpe.encode(text)
    monkeypatch.setattr(tokenizer, "PIECE", 50)
    assert len(tokenizer._cut(text)) > 10
    assert bpe.encode(text) == whole


def documents(*contents):
    return [Document(c, str(c).encode(), Where("", i)) for i, c in enumerate(contents)]


def test_text_is_learned_whole(bpe):
    (encoded,) = chat.encode(bpe, documents("héllo"))
    assert encoded.tokens.tolist() == [bpe.eot, *bpe.encode("héllo")]
    assert encoded.learned is None


def test_only_answers_are_learned(bpe):
    (encoded,) = chat.encode(bpe, documents(CHAT))
    learned = encoded.tokens[encoded.learned == 1].tolist()
    assert bpe.decode(learned) == "\n\nTrees  🌲, x<|end|>y?<|end|> of the tree<|end|>"
    assert learned.count(bpe.markers["end"]) == 2  # the one in the text is text
    assert bpe.decode(encoded.tokens.tolist()) == EOT + "".join(
        f"<|{m['role']}|>{m['content']}<|end|>" for m in CHAT
    )
    answers = [m["content"] for m in CHAT if m["role"] == "assistant"]
    assert encoded.text_bytes == sum(len(a.encode()) for a in answers)


@pytest.fixture(scope="module")
def folder(bpe, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    bpe.save(path)
    return path


def test_auto_reads_what_bpe_wrote(bpe, folder):
    auto = Auto.fetch(str(folder), chat=True)
    assert (auto.size, auto.eot, auto.markers) == (bpe.size, bpe.eot, None)
    clean = [m | {"content": m["content"].replace("<|end|>", "")} for m in CHAT]
    ours, theirs = (chat.encode(t, documents(clean))[0] for t in (bpe, auto))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.learned, theirs.learned)
    assert auto.encode(f"a {EOT}") == bpe.encode(f"a {EOT}")


def test_a_template_is_masked_exactly(folder):
    auto = Auto.fetch(str(folder), chat=True)
    auto._inner.chat_template = CHATML
    clean = [m | {"content": m["content"].replace("<|end|>", "")} for m in CHAT]
    encoded, refused = chat.encode(auto, documents(clean, CHAT))
    assert "special token" in refused
    learned = encoded.tokens[encoded.learned == 1].tolist()
    assert auto.decode(learned) == "Trees  🌲, xy?<|end|>of the tree<|end|>"
    prompt = auto.encode_batch([auto.render(clean[:2], prompt=True)], specials=True)[0]
    assert encoded.tokens[1 : 1 + len(prompt)].tolist() == prompt  # as it will be in use
    assert auto.decode(encoded.tokens.tolist()) == EOT + auto.render(clean, prompt=False)


def test_a_template_that_rewrites_history_is_refused(folder):
    auto = Auto.fetch(str(folder), chat=True)
    auto._inner.chat_template = "{{ messages | length }}" + CHATML
    (refused,) = chat.encode(auto, documents([*CHAT[:2], CHAT[4], *CHAT[3:]]))
    assert "rewrites earlier turns" in refused


def test_auto_without_template_gets_markers(folder, tmp_path):
    auto = Auto.fetch(str(folder), chat=False)
    auto._inner.chat_template = None
    auto.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    marked = Auto.fetch(str(tmp_path), chat=True)
    (encoded,) = chat.encode(marked, documents(CHAT))
    learned = encoded.tokens[encoded.learned == 1].tolist()
    assert marked.decode(learned) == "\n\nTrees  🌲, x<|end|>y?<|end|> of the tree<|end|>"


def naive(train, val, vocab, train_mask, val_mask):
    pairs = [(a, b) for a, b, m in zip(train, train[1:], train_mask[1:], strict=False) if m]
    held = [(a, b) for a, b, m in zip(val, val[1:], val_mask[1:], strict=False) if m]
    ones, twos = Counter(b for _, b in pairs), Counter(pairs)
    followers, preceders = defaultdict(set), defaultdict(set)
    for a, b in pairs:
        followers[a].add(b)
        preceders[b].add(a)
    n1, n2 = (sum(c == k for c in twos.values()) for k in (1, 2))
    d = n1 / (n1 + 2 * n2)

    def bigram(a, b):
        lower = (len(preceders[b]) + 1) / (len(twos) + vocab)
        total = sum(c for (x, _), c in twos.items() if x == a)
        if total == 0:
            return lower
        return max(twos[a, b] - d, 0) / total + d * len(followers[a]) / total * lower

    for a in range(vocab):
        assert sum(bigram(a, b) for b in range(vocab)) == pytest.approx(1)
    uni = -sum(math.log((ones[b] + 1) / (len(pairs) + vocab)) for _, b in held) / len(held)
    return uni, -sum(math.log(bigram(a, b)) for a, b in held) / len(held)


@pytest.mark.parametrize("masked", [False, True])
def test_ngram_baselines_against_a_naive_count(masked):
    rng = np.random.default_rng(0)
    vocab = 9
    train, val = (rng.zipf(1.5, n).clip(1, vocab) - 1 for n in (60, 40))
    train[train == 7] = 0  # a context that occurs in the held-out split alone
    val[3] = 7
    masks = [(rng.random(len(x)) < 0.6).astype(np.uint8) for x in (train, val)]
    if not masked:
        masks = [np.ones_like(x) for x in (train, val)]
    found = ngram.fit(train, val, vocab, *(masks if masked else ()))
    expected = naive(train.tolist(), val.tolist(), vocab, *masks)
    assert (found.unigram_nats, found.bigram_nats) == pytest.approx(expected)
    assert ngram.fit(train, val, vocab, cap=20).train_tokens == 20
