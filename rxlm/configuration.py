"""The base of every configuration in the package: frozen, strict, with errors that help.

Not here: the configurations themselves (they live beside what they configure). No torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rxlm.errors import UserError

ConfigType = TypeVar("ConfigType", bound="Config")


class Config(BaseModel):
    """A frozen pydantic model that refuses unknown fields and names the nearest known one.

    Construct it with keywords, with :meth:`parse` from a mapping, or from JSON with
    ``model_validate_json``. Every way raises :class:`~rxlm.errors.UserError` through
    :meth:`parse` and pydantic's ``ValidationError`` (a ``ValueError``) through the constructor.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )

    def __init__(self, **values: Any) -> None:
        reject_unknown_fields(type(self), values)
        super().__init__(**values)

    @classmethod
    def parse(cls: type[ConfigType], value: Any, where: str = "") -> ConfigType:
        """Return ``value`` as this configuration; a mapping is validated, an instance is kept.

        Args:
            value: an instance of this class, or a mapping of its fields.
            where: what the error message calls the value (a file, a dotted path).

        Raises:
            UserError: with one line per problem, naming the field, the value and the remedy.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise UserError(
                f"{where or cls.__name__}: expected a mapping of fields, got "
                f"{type(value).__name__} ({value!r})."
            )
        try:
            return cls(**{str(key): item for key, item in value.items()})
        except ValidationError as error:
            raise UserError(describe_validation_error(error, cls, where)) from error
        except UserError as error:
            raise UserError(f"{where}: {error}" if where else str(error)) from error


def reject_unknown_fields(cls: type[BaseModel], values: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for the first key of ``values`` that is not a field of ``cls``."""
    for key in values:
        if key not in cls.model_fields:
            raise UserError(unknown_field_message(cls, key))


def unknown_field_message(cls: type[BaseModel], key: str) -> str:
    """Say that ``key`` is no field of ``cls`` and which field was probably meant."""
    near = difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=0.6)
    if near:
        return f"{cls.__name__} has no field '{key}': did you mean '{near[0]}'?"
    return f"{cls.__name__} has no field '{key}'. Fields: {', '.join(sorted(cls.model_fields))}."


def describe_validation_error(error: ValidationError, cls: type[BaseModel], where: str = "") -> str:
    """Return one line per problem: dotted path, message, and the value that was given."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"]) or cls.__name__
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            message = unknown_field_message(cls, str(item["loc"][-1]))
        given = "" if item["type"] in {"value_error", "missing"} else f" (got {item['input']!r})"
        lines.append(f"{where + ': ' if where else ''}{path}: {message}{given}")
    return "\n".join(lines)
