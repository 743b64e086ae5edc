"""`import kalmagrove` is enough for AutoModelForCausalLM, in any order, and imports little."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from kalmagrove.auto import AUTO, Waiting, register
from kalmagrove.cli.compose import compose_tree
from kalmagrove.config.retrofit_run import retrofit_of
from kalmagrove.retrofit import save
from kalmagrove.retrofit.build import build

pytestmark = pytest.mark.unit
READ = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[1].mlp).__name__ == "FamilyFeedForward"
assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["scratch=llama_tiny", "data.tokenizer.kind=bpe", "last=1", "ffn.hidden=8"]
    words += ["scratch.num_hidden_layers=2", "scratch.hidden_size=12", "embeddings=tied"]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    return save(build(retrofit_of(compose_tree("retrofit", words)), 64).inner, folder)


def python(code: str, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_transformers_first(saved: Path) -> None:
    order = "import sys\nfrom transformers import AutoModelForCausalLM\nimport kalmagrove\n"
    python(order + READ, str(saved))


def test_the_part_that_registers_first(saved: Path) -> None:
    """As here; `tests/e2e` has the order of a user, with `import kalmagrove` alone."""
    model = hf.AutoModelForCausalLM.from_pretrained(saved)
    assert type(model.model.layers[1].mlp).__name__ == "FamilyFeedForward"
    assert not any(isinstance(finder, Waiting) for finder in sys.meta_path)


def test_importing_the_package_imports_nothing_large() -> None:
    python("import sys, kalmagrove; assert not {'torch', 'transformers'} & set(sys.modules)")


def test_waiting_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, AUTO)
    register()
    register()
    (finder,) = [finder for finder in sys.meta_path if isinstance(finder, Waiting)]
    assert finder.find_spec("transformers.models.auto", None) is None
    spec = finder.find_spec(AUTO, None)
    assert spec is not None
    assert spec.origin is not None
    assert spec.origin.endswith("modeling_auto.py")
    assert finder not in sys.meta_path
    assert finder.find_spec(AUTO, None) is None
