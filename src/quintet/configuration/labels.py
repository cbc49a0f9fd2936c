"""The labels of classification heads: `id2label`, `label2id` and `num_labels`."""

from typing import Any

from quintet.configuration.constraints import Labels, check
from quintet.errors import ConfigError, shown


def labels(owner: str, values: dict[str, Any]) -> tuple[dict[int, str], dict[str, int]]:
    """Pop the three keys from `values`; return `id2label` and `label2id`.

    Raises:
        ConfigError: they are of other types, or contradict each other.
    """
    count = values.pop("num_labels", None)
    given = values.pop("id2label", None)
    label2id = values.pop("label2id", None)
    check(owner, "num_labels", count, Labels | None)
    if given is None:
        names = {index: f"LABEL_{index}" for index in range(2 if count is None else count)}
    else:
        try:
            names = {int(index): str(name) for index, name in given.items()}
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(
                f"{owner}: id2label={shown(given)} has to map integers to names"
            ) from None
    if count is not None and count != len(names):
        raise ConfigError(f"{owner}: num_labels={count} but id2label has {len(names)} names")
    return names, label2id or {name: index for index, name in names.items()}
