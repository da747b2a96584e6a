"""The wire's messages, as classes made from gateway.proto when they are first needed.

Invariant: numbers and names stand in gateway.proto and nowhere else. It is plain proto3, of which
only messages, enums, `repeated` and `map` are read here: generated code would be bound to one
version of protobuf's runtime, and be unreadable.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, MutableSequence
from importlib import resources
from typing import Any

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    empty_pb2,
    field_mask_pb2,
    message_factory,
    timestamp_pb2,
    unknown_fields,
)

Message = Any
"""protobuf's classes are made at run time; no type checker knows their fields."""

_IMPORTS = (duration_pb2, empty_pb2, field_mask_pb2, timestamp_pb2)
_WORD = re.compile(r'"[^"]*"|[\w.]+|[{}<>=;,]')
_COMMENT = re.compile(r"//[^\n]*")
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    name: getattr(_Field, f"TYPE_{name.upper()}")
    for name in ("bool", "string", "bytes", "int32", "int64", "float", "double")
}


def message_class(name: str) -> type[Message]:
    """By its short name, such as `Deployment`, or its full one, such as `google.protobuf.Empty`.

    Raises:
        KeyError: there is none.
    """
    full = name if "." in name else f"gateway.{name}"
    found: type[Message] = message_factory.GetMessageClass(_pool().FindMessageTypeByName(full))
    return found


def unknown_part(message: Message) -> str | None:
    """What `message` carries that its type does not have: a field (`Deployment field 99`) or the
    number of an enum (`Dataset.format = 9`). proto3 itself passes both over in silence."""
    name = message.DESCRIPTOR.name
    for unknown in unknown_fields.UnknownFieldSet(message):
        return f"{name} field {unknown.field_number}"
    for field, value in message.ListFields():
        for part in value if isinstance(value, MutableSequence) else [value]:
            if field.enum_type is not None and part not in field.enum_type.values_by_number:
                return f"{name}.{field.name} = {part}"
            if hasattr(part, "DESCRIPTOR") and (found := unknown_part(part)):
                return found
    return None


@functools.cache
def _pool() -> Any:
    """A pool of its own: a client library of the service may be in this process, with other
    definitions of the same names."""
    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(
        name="gateway.proto", package="gateway", syntax="proto3"
    )
    for module in _IMPORTS:
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        file.dependency.append(module.DESCRIPTOR.name)
    text = resources.files(__package__).joinpath("gateway.proto").read_text(encoding="utf-8")
    _read_file(text, file)
    pool.Add(file)
    return pool


def _read_file(text: str, file: Any) -> None:
    words = iter(_WORD.findall(_COMMENT.sub("", text)))
    for word in words:
        if word == "message":
            _read_message(words, file.message_type.add(name=next(words)))
        elif word == "enum":
            _read_enum(words, file.enum_type.add(name=next(words)))
        else:  # `syntax`, `package` and `import` say what is said above
            while next(words) != ";":
                pass


def _read_message(words: Iterator[str], message: Any) -> None:
    _expect(words, "{")
    for word in words:
        if word == "}":
            return
        if word == "message":
            _read_message(words, message.nested_type.add(name=next(words)))
        elif word == "enum":
            _read_enum(words, message.enum_type.add(name=next(words)))
        elif word == "map":
            _read_map(words, message)
        elif word == "repeated":
            _read_field(words, message, next(words), _Field.LABEL_REPEATED)
        else:
            _read_field(words, message, word, _Field.LABEL_OPTIONAL)


def _read_enum(words: Iterator[str], enum: Any) -> None:
    _expect(words, "{")
    for word in words:
        if word == "}":
            return
        _expect(words, "=")
        enum.value.add(name=word, number=int(next(words)))
        _expect(words, ";")


def _read_field(words: Iterator[str], message: Any, kind: str, label: int) -> None:
    field = message.field.add(name=next(words), label=label)
    _expect(words, "=")
    field.number = int(next(words))
    _expect(words, ";")
    _set_type(field, kind)


def _read_map(words: Iterator[str], message: Any) -> None:
    """On the wire, a map is a list of entries."""
    _expect(words, "<")
    key = next(words)
    _expect(words, ",")
    value = next(words)
    _expect(words, ">")
    name = next(words)
    entry_name = name.title().replace("_", "") + "Entry"
    _expect(words, "=")
    message.field.add(
        name=name,
        number=int(next(words)),
        label=_Field.LABEL_REPEATED,
        type_name=entry_name,
    )
    _expect(words, ";")
    entry = message.nested_type.add(name=entry_name)
    entry.options.map_entry = True
    for number, (part, kind) in enumerate((("key", key), ("value", value)), start=1):
        field = entry.field.add(name=part, number=number, label=_Field.LABEL_OPTIONAL)
        _set_type(field, kind)


def _set_type(field: Any, kind: str) -> None:
    """The name of a message or an enum is enough: the pool finds which it is."""
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type_name = kind


def _expect(words: Iterator[str], wanted: str) -> None:
    if (word := next(words)) != wanted:
        raise ValueError(f"gateway.proto: {word!r} where {wanted!r} belongs")
