"""Arrow types in which values can be kept, from those that a file has.

Invariant: a plain type holds the same values, and Python values of it can be stored again without
loss. Where that cannot be had, the column is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eval_protocol_rft.batch.source.types import SourceError

if TYPE_CHECKING:
    import pyarrow as pa


def plain_schema(label: str, schema: pa.Schema) -> pa.Schema:
    """The columns of `schema` in plain types: without dictionaries, extensions,
    views and metadata.

    Raises:
        SourceError: two columns have one name, or a column cannot be read without loss.
    """
    import pyarrow as pa

    for name in schema.names:
        if schema.names.count(name) > 1:
            raise SourceError(f"{label}: more than one column is called {name!r}")
    fields = []
    for field in schema:
        plain = plain_type(field.type)
        if not _is_lossless(field.type, plain):
            raise SourceError(
                f"{label}: column {field.name!r} is {field.type}, which cannot be read without "
                "loss: drop it, or cast it to a simpler type"
            )
        fields.append(pa.field(field.name, plain))
    return pa.schema(fields)


def plain_type(type_: pa.DataType) -> pa.DataType:
    """The type without dictionaries and extensions, and without views of text, which Arrow can
    store and cannot sort or select from."""
    import pyarrow as pa

    if isinstance(type_, pa.BaseExtensionType):
        return plain_type(type_.storage_type)
    if pa.types.is_dictionary(type_):
        return plain_type(type_.value_type)
    if pa.types.is_string_view(type_):
        return pa.string()
    if pa.types.is_binary_view(type_):
        return pa.binary()
    if pa.types.is_list(type_):
        return pa.list_(_plain_field(type_.value_field))
    if pa.types.is_large_list(type_):
        return pa.large_list(_plain_field(type_.value_field))
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(_plain_field(type_.value_field), type_.list_size)
    if pa.types.is_map(type_):
        key, item = _plain_field(type_.key_field), _plain_field(type_.item_field)
        return pa.map_(key, item, keys_sorted=type_.keys_sorted)
    if pa.types.is_struct(type_):
        return pa.struct([_plain_field(type_.field(i)) for i in range(type_.num_fields)])
    return type_


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type))


def _is_lossless(type_: pa.DataType, plain: pa.DataType) -> bool:
    import pyarrow as pa

    if any(pa.types.is_union(t) or t == pa.time64("ns") for t in _parts(plain)):
        # Python's time of day has microseconds, and a union forgets which of its types it was.
        return False
    if any(map(_is_list_view, _parts(type_))):
        # A cast of a slice of them fails, and inside another type it loses values (Arrow 26).
        return False
    try:
        # What Arrow lacks fails on no rows just as on many. Rows are sorted when a file is made.
        pa.schema([("column", type_)]).empty_table().cast(pa.schema([("column", plain)]))
        pa.array([], plain).take(pa.array([], pa.int64()))
    except pa.ArrowException:
        return False
    return True


def _is_list_view(type_: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list_view(type_) or pa.types.is_large_list_view(type_))


def _parts(type_: pa.DataType) -> list[pa.DataType]:
    """A type and everything nested in it."""
    inner = [type_.field(i).type for i in range(type_.num_fields)]
    return [type_, *(part for each in inner for part in _parts(each))]
