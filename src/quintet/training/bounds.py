"""Bounds of the numbers of a table; values that are no numbers are refused."""

from quintet.training.settings import SettingError


def at_least(table: object, **least: float) -> None:
    """Refuse values of a table that are below their minimum.

    Raises:
        SettingError: one of them is.
    """
    for key, bound in least.items():
        value = getattr(table, key)
        if value is not None and not value >= bound:
            raise SettingError.value(key, value, f"has to be at least {bound:g}")


def at_most(table: object, **most: float) -> None:
    """Refuse values of a table that are above their maximum.

    Raises:
        SettingError: one of them is.
    """
    for key, bound in most.items():
        value = getattr(table, key)
        if value is not None and not value <= bound:
            raise SettingError.value(key, value, f"may be at most {bound:g}")


def above(table: object, *keys: str) -> None:
    """Refuse the values of a table that are not above 0.

    Raises:
        SettingError: one of them is not.
    """
    for key in keys:
        value = getattr(table, key)
        if value is not None and not value > 0:
            raise SettingError.value(key, value, "has to be above 0")
