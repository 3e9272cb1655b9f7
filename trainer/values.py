"""What a setting's text means. YAML reads 0777 as 511, 2026_11_30 as 20261130, 1:30 as 90, and ends a value at `` #``.
So the values of keys that hold a text, such as a path or a name, are taken as they are typed."""

import dataclasses
import types
import typing
from collections.abc import Iterator

import yaml
from omegaconf import OmegaConf

TEXTS = list[str]
TEXT_OR_TEXTS = typing.Any  # of `data.train` and the like: one path or a list


def parse_value(schema: type, key: str, text: str):
    """The value that is typed for a key of the dataclass `schema`: as it is for texts, unless it is in quotes; by YAML
    for all others. ``null`` means none, and a list is in brackets. Raises yaml.YAMLError, UnicodeEncodeError."""
    kind = _kind_of(schema, key)
    if kind not in (str, TEXTS, TEXT_OR_TEXTS) or text in ("", "null"):
        return OmegaConf.from_dotlist([f"value={text}"]).value
    text.encode()
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if is_quoted or (kind is not str and text.startswith("[") and text.endswith("]")):
        return yaml.load(text, yaml.BaseLoader)  # all its scalars are strings
    return text


def changed_texts(schema: type, from_file: dict, in_file: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Key and text of the values of a file that should be texts and that YAML took for numbers of another spelling.
    in_file: the same content with all scalars as strings."""
    for key, value in from_file.items():
        if (texts := in_file.get(key)) is None:  # of a key that is a number, or that `<<` takes over
            continue
        items = [(key, value, texts)]
        if isinstance(value, list):
            items = [(f"{key}.{n}", *pair) for n, pair in enumerate(zip(value, texts, strict=True))]
        for name, item, text in items:
            if isinstance(item, dict):
                yield from changed_texts(schema, item, text, f"{prefix}{name}.")
            elif (
                isinstance(item, (bool, int, float))
                and str(item) != text
                and _kind_of(schema, f"{prefix}{name}") in (str, TEXT_OR_TEXTS)
            ):
                yield f"{prefix}{name}", text


def _kind_of(schema: type, key: str):
    """The type of a key's values without None; None for an unknown key and for one of several types, not only text."""
    kind = schema
    for part in key.split("."):
        if dataclasses.is_dataclass(kind):
            field = {field.name: field for field in dataclasses.fields(kind)}.get(part)
            if field is None or (field.type is typing.Any and field.metadata):
                return None
            kind = typing.get_type_hints(kind)[part]
        elif typing.get_origin(kind) in (list, dict):
            kind = typing.get_args(kind)[-1]
        elif kind is not TEXT_OR_TEXTS:
            return None
        if isinstance(kind, types.UnionType):
            (kind,) = set(typing.get_args(kind)) - {type(None)}
    return kind
