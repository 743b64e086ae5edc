"""The adapter to lm-eval: its requests in, a model's answers out, for all kinds of models.

lm-eval's tasks call it through `harness`; it is an `lm_eval.api.model.LM`, so that lm-eval's own
evaluator takes it too. All ranks are given all requests, compute their share and exchange answers.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows

from kalmagrove.data.progress import Reporter
from kalmagrove.evaluate.answers import Answers, key_of
from kalmagrove.evaluate.decode import greedy
from kalmagrove.evaluate.rows import Pair, batches, plan
from kalmagrove.evaluate.rows import Row as TokenRow
from kalmagrove.evaluate.scorer import Scorer
from kalmagrove.evaluate.subject import Subject
from kalmagrove.parallel import Group, all_gather_object, broadcast_object

LONG = "!"  # ends the name of a note that a request was too long
NEW_TOKENS = 256  # of a generated text, where its task says nothing

Computed = Iterator[dict[int, Any]]  # answers by the number of the request, a batch at a time


class SubjectLM(TemplateLM):
    """A subject as lm-eval's language model.

    `tokens` is kept between models that are asked the same.

    Attributes:
        asked, found: requests so far, and those among them that were answered on disk.
        truncated: requests that lost their beginning, as the model's length is less.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        autocast: bool = False,
        answers: Answers | None = None,
        group: Group | None = None,
        tokens: dict[Any, Any] | None = None,
        progress: Reporter | None = None,
    ) -> None:
        super().__init__()
        self.subject, self.codec = subject, subject.codec
        assert subject.length is not None
        self.max_length = max_length or subject.length
        self.scorer = Scorer(subject.model, batch_tokens, autocast)
        self._device = self.scorer.device
        self._answers = answers
        self._group = group or Group.alone()
        self._tokens = {} if tokens is None else tokens
        self._progress = progress or Reporter(False)
        self.rendered = False  # whether contexts are conversations of the chat template
        self.asked = self.found = self.truncated = 0
        self._known: dict[str, Any] = broadcast_object(
            dict(answers.known) if answers else {}, self._group
        )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation."""
        pairs = [request.args for request in requests]
        found = self._answered("loglikelihood", pairs, self._score_texts)
        return [(total, bool(likeliest)) for total, likeliest in found]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each text, in windows of the model's length."""
        texts = [request.args for request in requests]
        return self._answered("loglikelihood_rolling", texts, self._score_windows)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context up to a stop string."""
        return self._answered("generate_until", [r.args for r in requests], self._generate)

    def _answered(
        self, kind: str, asked: list[tuple[Any, ...]], compute: Callable[[list[Any]], Computed]
    ) -> list[Any]:
        """The answers in the order of the requests; equal requests are computed once."""
        keys = [key_of(kind, (self.rendered, *arguments)) for arguments in asked]
        missing: dict[str, tuple[Any, ...]] = {}
        for key, arguments in zip(keys, asked, strict=True):
            if key not in self._known:
                missing.setdefault(key, arguments)
        self.asked += len(set(keys))
        self.found += len(set(keys)) - len(missing)
        names = list(missing)
        new: dict[str, Any] = {}
        count = 0
        self._long: set[int] = set()
        self._progress.stage(kind.replace("_", " "), len(names))
        for part in compute(list(missing.values())):
            named = {names[number]: answer for number, answer in part.items()}
            named |= {names[number] + LONG: True for number in part if number in self._long}
            if self._answers is not None:
                self._answers.add(named)
            new |= named
            count += len(part)
            done = min(len(names), count * self._group.size)
            self._progress.update(done, f"{done:,} of {len(names):,} requests")
        for share in all_gather_object(new, self._group):
            self._known |= share
        self.truncated += sum(key + LONG in self._known for key in set(keys))
        return [self._known[key] for key in keys]

    def _share(self, items: Sequence[Any]) -> list[Any]:
        """This rank's part of work that is sorted by its length."""
        return list(items[self._group.rank :: self._group.size])

    def _score_texts(self, pairs: list[tuple[str, str]]) -> Computed:
        known = self._tokens.setdefault((self.codec.fingerprint, self.rendered), {})
        new = [pair for pair in pairs if pair not in known]
        known.update(zip(new, self.encode_pairs(new), strict=True))
        return self._score_tokens([known[pair] for pair in pairs])

    def _score_tokens(self, pairs: Sequence[Pair]) -> Computed:
        length = self.max_length
        self._long = {n for n, (a, b) in enumerate(pairs) if len(a) + len(b) - 1 > length}
        rows = plan(pairs, self.max_length, self.scorer.longest_shared)
        yield from self.scorer.score(self._share(rows))

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
        """Tokens of contexts and continuations, split where the context alone ends.

        Spaces at the end of a context are the continuation's, as in lm-eval.
        """
        moved = []
        for context, continuation in pairs:
            bare = context.rstrip()
            moved.append((bare, context[len(bare) :] + continuation))
        contexts = sorted({context for context, _ in moved if context})
        heads = dict(zip(contexts, self.codec.encode(contexts, self.rendered), strict=True))
        whole = self.codec.encode([a + b for a, b in moved if a], self.rendered)
        alone = iter(self.codec.encode_bare([b for a, b in moved if not a]))
        joined = iter(whole)
        found: list[Pair] = []
        for context, _ in moved:
            if not context:
                tokens = next(alone)
                begun = tokens[:1] == [self.codec.prefix]
                found.append((tokens[:1], tokens[1:]) if begun else ([self.codec.prefix], tokens))
                continue
            head, both = heads[context], next(joined)
            cut = len(head)
            if len(both) <= cut:  # the continuation melted into the context's last token
                same = zip(head, both, strict=False)
                cut = next((i for i, (a, b) in enumerate(same) if a != b), len(both) - 1)
                cut = max(1, min(cut, len(both) - 1))
            found.append((both[:cut] if len(both) <= len(head) else head, both[cut:]))
        return found

    def _score_windows(self, texts: list[tuple[str]]) -> Computed:
        """Windows do not overlap, and each begins with the last token of the one before."""
        windows: list[Pair] = []
        owners: list[int] = []
        for number, tokens in enumerate(self.codec.encode_bare([text for (text,) in texts])):
            for inputs, targets in get_rolling_token_windows(
                tokens, self.codec.prefix, self.max_length, 1
            ):
                context = len(inputs) - len(targets) + 1
                windows.append((inputs[:context], targets))
                owners.append(number)
        left = Counter(owners)
        sums = dict.fromkeys(range(len(texts)), 0.0)
        size, rank = self._group.size, self._group.rank  # a text is summed on one rank
        rows = plan(windows, self.max_length, merge=False)
        rows = [row for row in rows if owners[row.requests[0]] % size == rank]
        for part in self.scorer.score(rows):
            finished: dict[int, Any] = {}
            for window, (total, _) in part.items():
                owner = owners[window]
                sums[owner] += total
                left[owner] -= 1
                if left[owner] == 0:
                    finished[owner] = sums[owner]
            yield finished
        yield {number: 0.0 for number in sums if number not in left}  # empty texts

    def _generate(self, asked: list[tuple[str, dict[str, Any]]]) -> Computed:
        rows = self.codec.encode([context for context, _ in asked], self.rendered)
        by_settings: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, (_, settings) in enumerate(asked):
            until = settings.get("until") or ()
            until = (until,) if isinstance(until, str) else tuple(until)
            room = int(settings.get("max_gen_toks", NEW_TOKENS))
            by_settings.setdefault((room, until), []).append(number)
        for (room, until), numbers in by_settings.items():
            prompts = {n: rows[n] or [self.codec.prefix] for n in numbers}
            yield from self._generate_alike(prompts, room, until)

    def _generate_alike(
        self, prompts: dict[int, list[int]], room: int, until: tuple[str, ...]
    ) -> Computed:
        """Prompts that are continued by at most `room` tokens until the same strings."""
        room = min(room, max(1, self.max_length // 2))
        keep = self.max_length - room
        self._long |= {number for number, row in prompts.items() if len(row) > keep}
        rows = [TokenRow(row[-keep:], requests=[number]) for number, row in prompts.items()]
        rows.sort(key=lambda row: len(row.tokens), reverse=True)

        def stop(new: list[int]) -> bool:
            text = self.codec.decode(new)
            return any(end in text for end in until)

        for batch in batches(self._share(rows), self.scorer.batch_tokens, len(rows)):
            written = greedy(
                self.subject.model,
                self.scorer,
                [row.tokens for row in batch],
                max_new_tokens=room,
                eos=self.subject.ends,
                stop=stop,
                size=self.subject.size,
            )
            texts = [_cut(self.codec.decode(new), until) for new in written]
            yield {row.requests[0]: text for row, text in zip(batch, texts, strict=True)}

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        self.rendered = True
        return self.codec.render(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        return self.codec.fingerprint[:16]

    @property
    def eot_token_id(self) -> int:
        return self.codec.eos[0] if self.codec.eos else self.codec.prefix

    @property
    def prefix_token_id(self) -> int:
        return self.codec.prefix

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        encode = self.codec.encode_bare if add_special_tokens is False else self.codec.encode
        return encode([string])[0]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        for part in self._score_tokens([(a, b) for _, a, b in requests]):
            found |= part
        return [found[number] for number in range(len(requests))]


def _cut(text: str, until: tuple[str, ...]) -> str:
    """Up to the first stop string."""
    for end in until:
        text = text.split(end, 1)[0] if end else text
    return text
