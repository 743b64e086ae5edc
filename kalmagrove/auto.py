"""Has AutoModelForCausalLM of transformers read retrofitted models once this package is imported.

`import kalmagrove` is to be enough for that, and is to import neither torch nor transformers. So it
waits for the import of the module that has AutoModelForCausalLM; where that is over, it does not.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AUTO = "transformers.models.auto.modeling_auto"
REGISTERS = "kalmagrove.retrofit"


class Waiting(MetaPathFinder):
    """Finds AUTO as the other finders do, once; importing it then imports REGISTERS."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            importlib.import_module(REGISTERS)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Now, or when AUTO is imported."""
    if AUTO in sys.modules:
        importlib.import_module(REGISTERS)
    elif not any(isinstance(finder, Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, Waiting())
