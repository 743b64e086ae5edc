"""Questions: the local formats, rows of the hub, options and answers of BIG-Bench Hard, shots."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from kalmagrove.cli.compose import conf_dir
from kalmagrove.config import ConfigError, DataError, Suite
from kalmagrove.evaluate import forms
from kalmagrove.evaluate.bbh import last_number, options_of, parse_answer, score_number
from kalmagrove.evaluate.suites import TASKS, load_suite, prepare
from tests.evaluation import write_twelve

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twelve(tmp_path_factory.mktemp("files"), items=2)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def prompts(suite: Any, name: str, **settings: Any) -> list[tuple[str, Any]]:
    task = suite.tasks[name]
    task.set_fewshot_seed(0)
    task.build_all_requests(**settings)
    return [request.args for request in task.instances]


def test_every_suite_and_every_task_file_is_read(files: Path) -> None:
    suites = {path.stem for path in (conf_dir() / "suite").glob("*.yaml")}
    assert suites == {"bbh", "bbh_generate", "twelve"}
    entries = {entry for name in suites for entry in load_suite(name).tasks}
    assert entries == {path.stem for path in TASKS.glob("*.yaml")}
    counts = {"bbh": 23, "bbh_generate": 27, "twelve": 57 + 23 + 10}
    for name, count in counts.items():
        suite = prepare(name, files)
        assert (suite.name, len(suite.tasks)) == (name, count)
    members = {entry: len(names) for entry, names in suite.members.items()}
    assert (members["mmlu"], members["bbh"], members["piqa"], len(members)) == (57, 23, 1, 12)


def test_prompts(files: Path) -> None:
    suite = prepare("twelve", files)
    context, end = prompts(suite, "bbh_snarks")[0]
    assert context.startswith("Q: ")
    assert "\nOptions:\n(A) " in context
    assert (context[-3:], end) == ("\nA:", " (A)")
    mmlu, letter = prompts(suite, "mmlu_anatomy")[3]
    assert mmlu.startswith("The following are multiple choice questions (with answers) about anat")
    assert (mmlu.count("Answer:"), letter) == (6, " D")
    first, second = prompts(suite, "winogrande")[:2]
    assert first[1] == second[1] == " runs."
    assert first[0] != second[0]
    assert "[" not in prompts(suite, "hellaswag")[0][0]
    shots, settings = prompts(suite, "gsm8k")[0]
    assert shots.count("####") == 5
    assert settings["max_gen_toks"] == 256
    assert prompts(suite, "lambada")[0][1] == " cat"
    truthful = prompts(suite, "truthfulqa")
    assert [end for _, end in truthful] == [" new river", " old house", " red, cat"]


def test_shots_of_bbh_are_answers_without_reasoning(files: Path) -> None:
    context, _ = prompts(prepare("bbh", files, shots=2), "bbh_snarks")[0]
    assert context.count("\nA: (") == 2
    assert "step by step" not in context
    with pytest.raises(ConfigError, match=r"shots=3 is more than the examples of bbh_\w+: 2; try"):
        prepare("bbh", files, shots=3)


def test_a_part_of_a_group_and_a_task_file_of_ones_own(files: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        (TASKS / "piqa.yaml").read_text().replace("task: piqa", "task: mine")
        # with another prompt
        + "target_delimiter: ' => '\n"
    )
    suite = prepare(Suite(name="x", tasks=("bbh/snarks", str(mine))), files)
    assert list(suite.tasks) == ["bbh_snarks", "mine"]
    assert prompts(suite, "mine")[0][1].startswith(" => ")
    for entry, message in [
        ("bbh/nope", "suite.tasks=bbh/nope is no task of bbh; try boolean_expressions, "),
        ("nope", "suite.tasks=nope has no local files; lm-eval's own tasks come from the hub"),
    ]:
        with pytest.raises(ConfigError) as error:
            prepare(Suite(name="x", tasks=(entry,)), files)
        assert str(error.value).startswith(message)
    with pytest.raises(ConfigError, match="suite=nope is not an option; try bbh, bbh_generate"):
        load_suite("nope")


def test_missing_and_damaged_files_are_one_line(files: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^files=\S+ lacks bbh/boolean_expressions.json \(or with"):
        prepare("bbh", tmp_path)
    arc = Suite(name="arc", tasks=("arc_easy",))
    for name, content, message in [
        ("arc_easy.jsonl", b'{"query": 1\n', r"arc_easy.jsonl cannot be read \(JSONDecodeError"),
        ("arc_easy.jsonl", b'{"query": "q"}\n', "row 1 is no answered question .KeyError: 'choi"),
        ("arc_easy.jsonl", b"", "holds no question"),
        ("arc_easy.jsonl.zst", None, "is damaged: it ends inside a zstd frame; fetch it again"),
    ]:
        folder = tmp_path / "arc_easy"
        folder.mkdir(exist_ok=True)
        whole = (files / "arc_easy/arc_easy.jsonl.zst").read_bytes()
        for old in folder.iterdir():
            old.unlink()
        (folder / name).write_bytes(whole[:-9] if content is None else content)
        with pytest.raises(DataError, match=message):
            prepare(arc, folder)  # the file's own folder will do


def test_without_files_and_network_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = "the dataset SaylorTwift/bbh/snarks cannot be fetched .ConnectionError: no route.; "
    with pytest.raises(DataError, match=message):
        prepare(Suite(name="x", tasks=("bbh/snarks",)))


def test_rows_of_the_hub_have_the_same_form() -> None:
    arc = {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    assert forms.answered(arc) == forms.answered(
        {"query": "Question: q", "choices": ["a", "b"], "gold": 1}
    )
    piqa = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}
    assert forms.answered(piqa)["query"] == "Question: g\nAnswer:"
    boolq = {"passage": "p", "question": "is it", "answer": True}
    assert forms.answered(boolq)["query"] == "Passage: p\nQuestion: is it?\nAnswer:"
    assert forms.answered(boolq)["gold"] == 1
    book = {"question_stem": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    assert forms.completed(book | {"answerKey": "B"})["gold"] == 1
    swag = {"activity_label": "A", "ctx_a": "he", "ctx_b": "she", "label": "1", "endings": ["x"]}
    assert forms.completed(swag)["query"] == "A: he She"
    grande = {"sentence": "It was _ who ran.", "option1": "a", "option2": "b", "answer": "2"}
    assert forms.two_contexts(grande) == {
        "choices": ["It was a", "It was b"],
        "continuation": "who ran.",
        "gold": 1,
    }
    assert forms.last_word({"text": "a b c"}) == {"query": "a b", "target": " c"}
    truth = {"question": "q", "mc1_targets": {"choices": ["z", "a"], "labels": [1, 0]}}
    assert forms.truthful(truth)["choices"] == ["a", "z"]
    assert forms.truthful(truth)["gold"] == 1


def test_options() -> None:
    assert options_of("Q?\nOptions:\n(A) x (B) y\n(B) z") == ["(A)", "(B)"]
    assert options_of("Options:\n- valid \n- invalid") == ["valid", "invalid"]
    assert options_of("not ( True ) is") == []
    broken = {"input": "Q?\nOptions:\n(A) x\n(B) y", "target": "x, y"}
    assert forms.bbh_choice(broken) is None
    assert json.dumps(forms.bbh_open(broken))


@pytest.mark.parametrize(
    ("text", "choices", "target", "answer"),
    [
        (" (B)", ["(A)", "(B)"], "(A)", "(B)"),
        (" B", ["(A)", "(B)"], "(A)", "(B)"),
        ("It cannot be (A). So the answer is (B).", ["(A)", "(B)"], "(A)", "(B)"),
        ("Option B) it is", ["(A)", "(B)"], "(A)", "(B)"),
        ("(C)", ["(A)", "(B)"], "(A)", None),
        ("A blue dog", ["(A)", "(B)"], "(A)", None),
        ("no, it is not", ["Yes", "No"], "Yes", "No"),
        ("invalid", ["valid", "invalid"], "valid", "invalid"),
        ("nothing", ["Yes", "No"], "Yes", None),
        ("There are 1,234 of 5", [], "7", "1234"),
        ("many", [], "7", None),
        (" ] )\n", [], "} )", "] )"),
        ("none", [], "} )", None),
        ("blue, cat  dog.\nmore", [], "a b", "blue cat dog"),
        ("\n", [], "a b", None),
    ],
)
def test_answers_are_found(text: str, choices: list[str], target: str, answer: str | None) -> None:
    assert parse_answer(text, {"choices": choices, "target": target}) == answer


def test_numbers_of_solutions() -> None:
    assert last_number("so 3 + 4 = 7.\n#### 7\n8") == "7"
    assert last_number("it costs $1,200.50 in all") == "1200.50"
    assert last_number("nothing") is None
    doc = {"target": "6\n#### 1,200"}
    assert score_number(doc, ["1200.0"]) == {"exact_match": 1.0, "parse_failure": 0.0}
    assert score_number(doc, ["[invalid]"]) == {"exact_match": 0.0, "parse_failure": 1.0}
