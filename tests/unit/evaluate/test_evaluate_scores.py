"""The adapter's numbers: against lm-eval's own model, against the formula, however batched."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from lm_eval.api.instance import Instance
from torch import nn

from kalmagrove.config import Suite
from kalmagrove.evaluate.harness import ask
from kalmagrove.evaluate.lm import SubjectLM
from kalmagrove.evaluate.rows import plan
from kalmagrove.evaluate.scorer import Scorer
from kalmagrove.evaluate.subject import Subject, open_model
from kalmagrove.evaluate.suites import prepare, quiet
from tests.evaluation import own_model, save_llama, tokenizer, write_twelve

pytestmark = pytest.mark.unit
CONTEXTS = ["The cat sees", "Question: is the dog red?\nAnswer:", "", "A river runs over the  "]
ENDS = [" the old house", " Yes", " No", " (A)", " (B)", " then the blue dog runs under the river"]
LONG = "the cat sees a river and a dog " * 40  # longer than the model's 256 tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def subject(llama: Path) -> Subject:
    return open_model(llama, "cpu")


@pytest.fixture(scope="module")
def reference(llama: Path) -> Any:
    """lm-eval's own adapter to the same files."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(llama), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture(scope="module")
def own() -> Subject:
    return Subject(own_model(), tokenizer(), "own", length=64)


def requests(kind: str = "loglikelihood") -> list[Instance]:
    pairs = [(context, end) for context in [*CONTEXTS, LONG] for end in ENDS]
    return [Instance(kind, {}, pair, i, ("t", i, 1)) for i, pair in enumerate(pairs)]


def close(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> None:
    assert [f[0] for f in found] == pytest.approx([w[0] for w in wanted], abs=1e-4)
    assert [f[1] for f in found] == [w[1] for w in wanted]


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_log_likelihoods_are_those_of_lm_eval(
    subject: Subject, reference: Any, batch_tokens: int
) -> None:
    lm = SubjectLM(subject, batch_tokens=batch_tokens)
    assert lm.scorer.longest_shared > 0, "shared contexts are tested too"
    with quiet():
        wanted = reference.loglikelihood(requests())
    close(lm.loglikelihood(requests()), wanted)
    assert lm.truncated == len(ENDS), "what does not fit is told"


def test_rolling_log_likelihoods_are_those_of_lm_eval(subject: Subject, reference: Any) -> None:
    texts = [LONG, "The cat.", LONG[: len(LONG) // 2], "The cat."]
    asked = [Instance("loglikelihood_rolling", {}, (t,), 0, ("t", 0, 1)) for t in texts]
    # lm-eval's own begins the tokens as the tokenizer says: with none here
    with quiet():
        wanted = reference.loglikelihood_rolling(asked)
    found = SubjectLM(subject, batch_tokens=600).loglikelihood_rolling(asked)
    assert found == pytest.approx(wanted, abs=1e-3)


def test_generated_texts_are_those_of_lm_eval(subject: Subject, reference: Any) -> None:
    settings = {"until": ["a"], "max_gen_toks": 12, "do_sample": False}
    pairs = [(context, settings) for context in CONTEXTS if context]
    pairs += [("cat", {"until": [], "max_gen_toks": 5, "do_sample": False}), (LONG, settings)]
    asked = [Instance("generate_until", {}, pair, 0, ("t", 0, 1)) for pair in pairs]
    with quiet():
        wanted = reference.generate_until(asked)
    for batch_tokens in (1, 10_000):
        assert SubjectLM(subject, batch_tokens=batch_tokens).generate_until(asked) == wanted
    assert any(wanted), "something was written"


def test_whole_tasks_score_as_with_lm_evals_model(
    subject: Subject, reference: Any, tmp_path: Path
) -> None:
    from lm_eval.evaluator import evaluate

    entries = ("bbh/navigate", "bbh/snarks", "arc_easy", "winogrande", "lambada")
    some = Suite(name="some", tasks=(*entries, "bbh_generate/snarks"))
    tasks = prepare(some, write_twelve(tmp_path)).tasks
    found = ask(SubjectLM(subject), tasks, None, False)
    again = ask(reference, tasks, None, False)
    for name in tasks:
        for mine, theirs in zip(found[name].items, again[name].items, strict=True):
            for key in {"log_likelihoods"} & mine.keys():
                assert mine.pop(key) == pytest.approx(theirs.pop(key), abs=1e-4)
            assert mine == theirs
    with quiet():
        judged = evaluate(SubjectLM(subject), {"tasks": tasks, "groups": {}}, bootstrap_iters=0)
    for name in tasks:
        summary = found[name].summary
        key = next(key for key in judged["results"][name] if key.startswith(summary["primary"]))
        assert judged["results"][name][key] == summary["metrics"][summary["primary"]]["value"]


def test_an_own_models_log_likelihood_is_the_formula(own: Subject) -> None:
    context, end = "The cat sees", " the old house"
    tokens = [tokenizer().eot, *tokenizer().encode(context + end)]
    cut = 1 + len(tokenizer().encode(context))
    with torch.no_grad():
        logits = own.model(torch.tensor([tokens[:-1]])).logits[0]
    logs = F.log_softmax(logits, -1)[range(cut - 1, len(tokens) - 1), tokens[cut:]]
    asked = [Instance("loglikelihood", {}, (context, end), 0, ("t", 0, 1))]
    ((total, likeliest),) = SubjectLM(own).loglikelihood(asked)
    assert total == pytest.approx(float(logs.sum()), abs=1e-4)
    assert likeliest == (logits[cut - 1 :].argmax(-1).tolist() == tokens[cut:])


def test_batches_do_not_change_an_own_model(own: Subject) -> None:
    one, many = (SubjectLM(own, batch_tokens=size) for size in (1, 100_000))
    close(many.loglikelihood(requests()), one.loglikelihood(requests()))
    settings = {"until": ["\n"], "max_gen_toks": 9}
    asked = [Instance("generate_until", {}, (c, settings), 0, ("t", 0, 1)) for c in CONTEXTS]
    assert many.generate_until(asked) == one.generate_until(asked)


WINDOW = hf.MistralConfig(
    vocab_size=320,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=40,
    max_position_embeddings=256,
    sliding_window=40,
    initializer_range=0.3,
)
POSITIONS = hf.GPT2Config(
    vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3
)


@pytest.mark.parametrize("config", [WINDOW, POSITIONS], ids=lambda config: config.model_type)
def test_other_architectures_share_contexts_too(config: Any) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    shared, plain = (SubjectLM(Subject(model, tokenizer(), "x")) for _ in range(2))
    assert shared.scorer.longest_shared == (40 if config is WINDOW else 4096)
    plain.scorer.longest_shared = 0
    close(shared.loglikelihood(requests()), plain.loglikelihood(requests()))
    assert shared.scorer.tokens < plain.scorer.tokens


def test_shared_contexts_are_computed_once() -> None:
    context = list(range(1, 30))
    pairs = [(context, [40, 50 + i, 60]) for i in range(4)] + [(context, [70])]
    shared, single = plan(pairs, 100, 100), plan(pairs, 100)
    assert [len(row.tokens) for row in shared] == [29 + 4 * 2]
    assert shared[0].branches == (29, 2, 2, 2, 2)
    assert sorted(len(row.tokens) for row in single) == [31, 31, 31, 31], "one holds the short one"
    one_word = [(context, [40 + i]) for i in range(4)]
    assert [len(row.tokens) for row in plan(one_word, 100)] == [29]
    assert sum(len(row.places) for row in shared) == 13


class Unmasked(nn.Module):
    """Takes a mask and ignores it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return self.inner(input_ids=input_ids)


def test_a_model_without_a_cache_writes_the_same(subject: Subject) -> None:
    settings = {"until": ["\n"], "max_gen_toks": 9}
    asked = [Instance("generate_until", {}, (c, settings), 0, ("t", 0, 1)) for c in CONTEXTS]
    bare = Subject(Unmasked(subject.model), subject.tokenizer, "bare", length=256)
    assert SubjectLM(bare).generate_until(asked) == SubjectLM(subject).generate_until(asked)


def test_a_model_that_ignores_masks_gets_plain_rows(subject: Subject) -> None:
    assert Scorer(subject.model).longest_shared > 0
    assert Scorer(Unmasked(subject.model)).longest_shared == 0


def test_the_model_is_left_as_it_was(subject: Subject) -> None:
    subject.model.train()
    SubjectLM(subject).loglikelihood(requests()[:2])
    assert subject.model.training
    subject.model.eval()
    assert not subject.model.lm_head._forward_pre_hooks
