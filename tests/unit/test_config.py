"""Every file under conf/ composes and validates; what cannot work is refused in one line."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kalmagrove import cli
from kalmagrove.cli.compose import compose_tree, conf_dir, read_yaml, sweep_points
from kalmagrove.cli.run_folder import write_config
from kalmagrove.config import (
    ConfigError,
    Evaluate,
    Generate,
    Inspect,
    Plan,
    Prepare,
    Search,
    load,
    validate,
)
from kalmagrove.config.counts import ffn_count, parameter_count
from kalmagrove.config.retrofit_run import Retrofit, retrofit_of
from tests.unit.options import OPTIONS, verb_of

pytestmark = pytest.mark.unit
BASE = "base=some/model"
VERBS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "train": load,
    "retrofit": retrofit_of,
    "prepare": lambda tree: validate(Prepare, tree),
    "generate": lambda tree: validate(Generate, tree),
    "evaluate": lambda tree: validate(Evaluate, tree),
    "inspect": lambda tree: validate(Inspect, tree),
    "plan": lambda tree: validate(Plan, tree),
    "sweep": lambda tree: validate(Search, tree),
}
GIVEN = {"retrofit": [BASE], "sweep": ["study=lr"]}  # what a verb has no default for
NEEDS = {  # options that only make sense with something the user gives
    "data/text": ["data.source.paths=[a.txt]"],
    "data/jsonl": ["data.source.paths=[a.jsonl]"],
    "data/parquet": ["data.source.paths=[a.parquet]"],
    "scratch/llama_tiny": ["base=null", "data.tokenizer.kind=bpe"],
    "scratch/smollm2_135m": ["base=null", "data.tokenizer.kind=bpe"],
}


@pytest.fixture(scope="module")
def tree() -> dict:
    return compose_tree("train", ["model=kan_tiny", "ffn=kan"])


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_composes_and_validates(option: Path) -> None:
    name = str(option.with_suffix(""))
    group, _, choice = name.partition("/")
    verb = verb_of(option)
    words = [f"{group}={choice}", *GIVEN.get(verb, []), *NEEDS.get(name, [])]
    assert VERBS[verb](compose_tree(verb, words))


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_no_option_of_one_verb_is_one_of_another(option: Path) -> None:
    group = option.parent.name
    others = {"arm", "scratch", "suite", "model", "attention", "ffn"} & {group}
    for verb in {"train", "retrofit", "evaluate"} - {verb_of(option)} if others else ():
        with pytest.raises(ConfigError, match=group):
            compose_tree(verb, [f"{group}={option.stem}"])


def test_every_top_level_file_is_a_verb() -> None:
    files = {p.stem for p in conf_dir().glob("*.yaml")}
    assert files == set(VERBS) == set(cli.VERBS)
    for name, validator in VERBS.items():
        validator(compose_tree(name, GIVEN.get(name, [])))


def test_no_yaml_hides_from_the_tests() -> None:
    assert set(conf_dir().rglob("*.yaml")) == {
        conf_dir() / p for p in [*OPTIONS, *(Path(f"{v}.yaml") for v in VERBS)]
    }


def test_yaml_covers_every_field_of_a_model(tree: dict) -> None:
    """A preset names every key, so that `--cfg job` shows all that can be set."""
    run = load(tree)
    assert set(yaml.safe_load(yaml.safe_dump(tree["model"]))) == set(run.model.model_dump())
    for kind, block in tree["model"]["attention"].items():
        if kind != "pattern":
            assert set(block) == set(getattr(run.model.attention, kind).model_dump()), kind
    for kind, block in tree["model"]["ffn"].items():
        if kind != "pattern":
            assert set(block) == set(getattr(run.model.ffn, kind).model_dump()), kind


@pytest.mark.parametrize(
    "preset", ["kan_tiny", "kan_nano", "kan_135m", "kan_1b_a135m", "kan_1b", "kan_340b"]
)
def test_the_feed_forwards_of_a_preset_are_a_fair_comparison(preset: str) -> None:
    active = {
        kind: ffn_count(load(compose_tree("train", [f"model={preset}", f"ffn={kind}"])).model, 0)
        for kind in ("kan", "dense", "moe", "grove")
    }
    for kind, count in active.items():
        assert count.active == pytest.approx(active["kan"].active, rel=0.05), kind


def test_preset_sizes() -> None:
    """The sizes that the presets' names and comments promise, with SmolLM2's 49,152 tokens."""
    words = {
        "kan_135m": [], "moe_135m": [], "dense_135m": [], "kan_1b": ["ffn=kan"], "kan_1b_a135m": []
    }  # fmt: skip
    sizes = {
        name: parameter_count(
            load(compose_tree("train", [f"model={name}", *more])).with_vocab(49152).model
        )
        for name, more in words.items()
    }
    groves = load(compose_tree("train", ["model=kan_1b", "ffn=grove"])).with_vocab(49152).model
    assert parameter_count(groves).total == pytest.approx(1.16e9, rel=0.01)
    assert sizes["dense_135m"].total == 134_515_008
    for name in ("kan_135m", "moe_135m"):
        assert sizes[name].total == pytest.approx(135e6, rel=0.03)
    for name in ("kan_1b", "kan_1b_a135m"):
        assert sizes[name].total == pytest.approx(1e9, rel=0.06)
    assert sizes["kan_1b_a135m"].active == pytest.approx(135e6, rel=0.08)


def test_the_sources_sizes() -> None:
    """340B parameters; 94% fewer of them active than in the dense one, 92% of edges inactive."""
    kan, moe, dense = (
        load(compose_tree("train", [f"model={name}_340b"])).model
        for name in ("kan", "moe", "dense")
    )
    counts = [parameter_count(model) for model in (kan, moe, dense)]
    assert [count.total for count in counts] == pytest.approx([340e9] * 3, rel=0.01)
    assert counts[0].active / counts[2].active == pytest.approx(0.06, abs=0.006)
    assert counts[1].active == pytest.approx(counts[0].active, rel=0.05)
    assert 1 - kan.ffn.grove.kan.top_k / kan.ffn.grove.kan.edges == pytest.approx(0.92, abs=0.002)


REFUSED = [
    ({"model.layers": 2.5}, "model.layers=2.5 should be a valid integer"),
    ({"model.layers": True}, "model.layers=True should be a valid integer"),
    ({"model.layers": "4"}, "model.layers='4' should be a valid integer"),
    ({"model.ffn.kan.topk": 4}, "model.ffn.kan.topk=4 is not a known key; did you mean top_k?"),
    ({"model.ffn.kan.top_k": 99}, "model.ffn.kan.top_k=99 must be at most model.ffn.kan.edges=32"),
    (
        {"model.ffn.pattern": ["grove"], "model.ffn.grove.top_g": 9},
        "model.ffn.grove.top_g=9 must be at most model.ffn.grove.groves=4",
    ),
    (
        {"model.ffn.pattern": ["moe"], "model.ffn.moe.top_k": 9},
        "model.ffn.moe.top_k=9 must be at most model.ffn.moe.experts=8",
    ),
    (
        {"model.attention.ada.heads": 5},
        "model.attention.ada.heads=5 must divide model.d_model=64; try 4 or 8",
    ),
    (
        {"model.attention.softmax.heads": 3},
        "model.attention.softmax.heads=3 must divide model.d_model=64; try 2 or 4",
    ),
    (
        {"model.attention.softmax.heads": 4, "model.attention.softmax.kv_heads": 3},
        "model.attention.softmax.kv_heads=3 must divide model.attention.softmax.heads=4",
    ),
    ({"model.attention.pattern": []}, "model.attention.pattern"),
    ({"model.attention.pattern": ["linear"]}, "should be 'ada', 'softmax' or 'mla'"),
    ({"batch.tokens": 5000}, "batch.tokens=5000 must be a multiple of data.seq_len=512"),
    ({"schedule.warmup": 5000}, "schedule.warmup=5000 must be at most steps=1000"),
    ({"optim.lr": 0.0}, "optim.lr=0.0 should be greater than 0"),
    ({"zero.stage": 4}, "zero.stage=4 should be 0, 1, 2 or 3"),
    ({"zero.stage": 0, "engine.precision": "bf16"}, "zero.stage=0 gives a wrong gradient norm"),
    ({"data.source.kind": "jsonl"}, "data.source.paths=[] must name files or globs"),
    ({"data.tokenizer.kind": "auto"}, "data.tokenizer.name=null must name a tokenizer"),
    ({"data.format": "messages"}, "data.format=messages needs rows with messages"),
    ({"steps": None}, "steps=None should be a valid integer"),
    ({"launch.nproc": "two"}, "launch.nproc='two' should be a valid integer or be 'auto'"),
    ({"launch.nproc": 0}, "launch.nproc=0 should be greater than 0 or be 'auto'"),
    ({"launch.port": 70000}, "launch.port=70000 should be less than or equal to 65535"),
    ({"model.attention.ada.qk_rank": "x"}, "ada.qk_rank='x' should be a valid integer or"),
    ({"optim.lr": float("inf")}, "optim.lr=inf should be a finite number"),
    ({"optim.betas": [0.9, 1.0]}, "optim.betas=1.0 should be less than 1"),
    ({"name": "latest"}, "name='latest' cannot name a folder of runs"),
    ({"name": "a/b"}, "name='a/b' cannot name a folder of runs"),
    ({"name": ""}, "name='' cannot name a folder of runs"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m.split(" ")[0] for _, m in REFUSED])
def test_what_cannot_work_is_refused(tree: dict, change: dict, message: str) -> None:
    changed = copy.deepcopy(tree)
    for key, value in change.items():
        *home, last = key.split(".")
        node = changed
        for part in home:
            node = node[part]
        node[last] = value
    with pytest.raises(ConfigError) as error:
        load(changed)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value), "an error names a remedy"


def test_batch_must_divide_over_the_ranks(tree: dict) -> None:
    run = load(tree | {"batch": {"tokens": 6144, "micro": 4}})
    run.check_world(1)
    assert run.accumulation(1) == 3
    with pytest.raises(ConfigError, match=r"data-parallel ranks=2 = 4096; try 4096 or 8192"):
        run.check_world(2)


def test_a_run_is_frozen_and_named_after_what_decides_its_result(tree: dict) -> None:
    run = load(tree)
    with pytest.raises(ValueError, match="frozen"):
        run.steps = 3
    assert load(tree | {"dir": "elsewhere"}).run_name == run.run_name
    neutral = copy.deepcopy(tree)
    neutral["data"]["cache"], neutral["data"]["workers"] = "elsewhere", 3
    neutral["engine"]["threads"], neutral["eval"]["every"] = 7, 5
    assert load(neutral).run_name == run.run_name
    assert load(tree | {"seed": 1}).run_name != run.run_name
    assert load(tree | {"name": "mine"}).run_name == "mine"


def test_an_error_survives_the_way_between_ranks() -> None:
    error = ConfigError("dir", Path("runs"), "cannot hold the run", "give another dir")
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.exit_code) == (str(error), 2)


def test_generate_refuses_an_unknown_device() -> None:
    tree = compose_tree("generate", ["device=foo"])
    with pytest.raises(ConfigError, match="device='foo' should match pattern"):
        validate(Generate, tree)


def test_vocabulary_follows_the_tokenizer(tree: dict) -> None:
    run = load(tree)
    assert run.with_vocab(1000).model.vocab_size == 1024
    small = copy.deepcopy(tree)
    small["model"]["vocab_size"] = 512
    with pytest.raises(ConfigError, match=r"model.vocab_size=512 must hold the tokenizer's 1000"):
        load(small).with_vocab(1000)


def test_rank_table_must_fit_the_layers(tree: dict) -> None:
    tree = copy.deepcopy(tree)
    ada = tree["model"]["attention"]["ada"]
    ada["qk_rank"] = [[32, 16], [16, 16], [8, 8]]
    assert load(tree).model.attention.ada.qk_rank == ((32, 16), (16, 16), (8, 8))
    ada["qk_rank"] = [[32, 16]]
    with pytest.raises(ConfigError, match="3 ADA layers"):
        load(tree)
    ada["qk_rank"] = 7
    with pytest.raises(ConfigError, match="must be even"):
        load(tree)


def retrofit(*words: str) -> Retrofit:
    return retrofit_of(compose_tree("retrofit", list(words)))


def test_every_arm_of_the_experiment_is_a_run_of_its_own() -> None:
    arms = ["untouched", "finetuned", "restart", "matched", "kan", "kan_parallel", "kan_sequence"]
    words = ["experiment=kallm", "seed=2"]
    names = [retrofit(*words, f"arm={arm}").run_name for arm in arms]
    assert names == ["kallm/untouched", *(f"kallm/{arm}-seed2" for arm in arms[1:])]
    run = retrofit(*words, "arm=kan")
    assert run.evaluation.suites == ("bbh", "bbh_generate")
    assert run.data.tokenizer.name == run.base == "HuggingFaceTB/SmolLM2-135M"


def test_arms_that_are_compared_have_as_many_parameters() -> None:
    counts = {}
    for arm in ("kan", "matched", "kan_parallel", "kan_sequence"):
        ffn = retrofit(BASE, f"arm={arm}").ffn
        assert ffn is not None
        counts[arm] = ffn.parameters(576)
    assert counts["kan"] == counts["matched"] == 2 * 3 * 576 * 384
    assert counts["kan_parallel"] - counts["kan"] == 2
    assert counts["kan_sequence"] == counts["kan"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "base=null or scratch must be given, and only one of them; try base="),
        ([BASE, "scratch=llama_tiny"], f"{BASE} or scratch must be given, and only one of them"),
        ([BASE, "blocks=[0]"], "last=5 or blocks must be given, and not both; give last=5, or"),
        ([BASE, "last=null"], "last=null or blocks must be given, and not both"),
        ([BASE, "last=0"], "last=0 should be greater than 0"),
        ([BASE, "arm=restart", "replace=kan"], "ffn=null is required by replace=kan"),
        ([BASE, "arm=restart", "replace=mlp"], "ffn=null is required by hidden=match"),
        ([BASE, "arm=restart", "warm_start.tokens=64"], "replace=restart makes none; use null"),
        (
            ["scratch=llama_tiny", "data.tokenizer.kind=bpe", "warm_start.tokens=64"],
            "warm_start.tokens=64 fits KAN feed-forwards to ones that were trained, and scratch",
        ),
        ([BASE, "parallel.tp=2"], "must keep their defaults: pretrained models are trained data-"),
        ([BASE, "+ffn.colour=red"], "ffn.colour=red is not a known key of a family; known keys: "),
        ([BASE, "ffn.basis=chebyshev9"], "ffn.basis=chebyshev9 "),
        ([BASE, "ffn.degree=9"], "ffn.degree=9 must be at most 8"),
        ([BASE, "+colour=red"], "colour='red' is not a known key"),
        ([BASE, "replace=lora"], "replace='lora' should be 'kan', 'mlp', 'restart' or 'none'"),
        ([BASE, "hidden=mach"], "hidden='mach' should be "),
        ([BASE, "study=a/b"], "study='a/b' should match pattern"),
        ([BASE, "label=.."], "label='..' should match pattern"),
        (["scratch=llama_tiny"], "data.tokenizer.name=null must name a tokenizer"),
        ([BASE, "+scratch.hidden_size=8", "base=null", "data.tokenizer.kind=bpe"], "scratch.model"),
    ],
)
def test_what_a_retrofit_refuses(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        retrofit(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value), "an error names a remedy"


def test_a_given_inner_width_needs_no_ffn() -> None:
    run = retrofit(BASE, "arm=restart", "replace=mlp", "hidden=48")
    assert (run.replace, run.hidden, run.ffn) == ("mlp", 48, None)


def test_names_of_retrofits() -> None:
    words = ["study=s", "base=/some/where/tiny"]
    assert retrofit(*words, "seed=3").run_name == "s/kan-seed3"
    assert retrofit(*words, "label=wide").run_name == "s/wide-seed0"
    assert retrofit(*words, "arm=untouched", "seed=3").run_name == "s/untouched"
    assert retrofit(*words, "name=mine").run_name == "mine"
    outside = retrofit("base=/some/where/tiny")
    assert outside.run_name.startswith("tiny-kan-smol_smoltalk-")
    scratch = retrofit("scratch=llama_tiny", "arm=pretrain", "data.tokenizer.kind=bpe")
    assert scratch.run_name.startswith("llama-pretrain-smol_smoltalk-")


def test_a_retrofit_is_named_after_what_decides_its_result() -> None:
    name = retrofit(BASE).run_name
    same = ["evaluation.limit=3", "backend=reference", "price=cpu", "checkpoint.every=7"]
    assert [retrofit(BASE, word).run_name for word in same] == [name] * len(same)
    other = ["seed=1", "last=4", "ffn.degree=3", "embeddings=frozen", "warm_start.tokens=64"]
    names = {retrofit(BASE, word).run_name for word in other}
    assert len(names | {name}) == len(other) + 1
    untouched = {retrofit(BASE, "arm=untouched", f"seed={seed}").run_name for seed in (0, 1)}
    assert len(untouched) == 1, "nothing trains: all seeds are one run"


def test_a_saved_retrofit_is_read_back(tmp_path: Path) -> None:
    scratch = ["scratch=smollm2_135m", "data.tokenizer.kind=bpe"]
    for words in (["arm=kan_sequence"], ["arm=matched"], ["arm=restart"], scratch):
        given = [] if words is scratch else [BASE]
        run = retrofit(*given, *words, "blocks=[0,-1]", "last=null", "evaluation.limits={bbh: 3}")
        write_config(tmp_path / "config.yaml", run)
        assert retrofit_of(read_yaml(str(tmp_path / "config.yaml"))) == run


def test_a_sweep_looks_at_what_its_experiment_sweeps() -> None:
    points = sweep_points("retrofit", ["experiment=kallm", "seed=0,1"])
    assert len(points) == 7 * 2
    assert ["arm=untouched", "experiment=kallm", "seed=0"] in points
    points = sweep_points("retrofit", ["experiment=kallm", "arm=kan,restart"])
    assert points == [["experiment=kallm", f"arm={arm}"] for arm in ("kan", "restart")]
