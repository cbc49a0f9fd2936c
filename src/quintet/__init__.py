"""Five open model families in plain PyTorch, with the API people know from Transformers.

Every public name is imported when it is first used, so that `import quintet` takes milliseconds and
`quintet --help` needs no torch. `__init__.pyi` says which names there are and where they are from,
to type checkers as to this file.
"""

import importlib
import re
from typing import Any

__version__ = "0.1.0"

# Not `pathlib`, which takes longer to import than the rest.
with open(f"{__file__}i", encoding="utf-8") as _stub:
    _IMPORTS = re.findall(r"^from (\S+) import (\([^)]*\)|.*)$", _stub.read(), re.MULTILINE)
_MODULE_OF = {n: module for module, names in _IMPORTS for n in re.findall(r"(\w+) as", names)}
__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'quintet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
