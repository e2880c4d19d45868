"""NamedTuples of arrays as one pointer each, for compiled code.

Numba passes a NamedTuple by value, field by field: with the host's 160 arrays that neither compiles
in reasonable time nor runs fast. Here a NamedTuple becomes a block of 64-bit words: a scalar is one
word, an array its address and shape, a NamedTuple inside it the address of its own block. Compiled
code is given the block's address and reads a field where it is used; nothing is counted or freed,
since the Python object keeps everything alive.
"""

import hashlib
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import core
from numba.core import cgutils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    infer_getattr,
    intrinsic,
    lower_getattr_generic,
    models,
    register_model,
    typeof_impl,
    unbox,
)
from numba.np import arrayobj

from moesim.jit.assembly import assembled_only

WORD = ir.IntType(64)
types: Any = core.types  # whose stubs are a part of what there is


class Struct(types.Type):  # type: ignore[misc]  # Numba is untyped
    """The compiled type of a block: which field has which type, in order."""

    def __init__(self, name: str, fields: tuple[tuple[str, Any], ...]) -> None:
        """Two structs of equal fields are the same type."""
        self.fields = fields
        self.offsets = {}
        at = 0
        for field, kind in fields:
            self.offsets[field] = at
            at += words_of(kind)
        self.words = at
        digest = hashlib.sha256(repr(fields).encode()).hexdigest()[:12]
        super().__init__(name=f"{name}_{digest}")


def words_of(kind: Any) -> int:
    """Return how many words a field takes."""
    return 1 + kind.ndim if isinstance(kind, types.Array) else 1


class Block:
    """A NamedTuple's block, and all that must stay alive while compiled code has its address."""

    __slots__ = ("address", "keeps", "type", "words")

    address: int
    type: Struct
    words: Any
    keeps: Any

    def __init__(self, source: Any) -> None:
        """Lay out a NamedTuple. What compiled code cannot use, such as text, is left out."""
        self.keeps = [source]
        fields = []
        words: list[int] = []
        for name, value in zip(source._fields, source, strict=True):
            found = self.field(value)
            if found is not None:
                fields.append((name, found[0]))
                words += found[1]
        self.type = Struct(type(source).__name__, tuple(fields))
        self.words = np.array(words, np.int64)
        self.address = self.words.ctypes.data

    def field(  # noqa: PLR0911  one answer per type
        self, value: Any
    ) -> tuple[Any, list[int]] | None:
        """Return a field's type and words."""
        if isinstance(value, np.ndarray):
            try:
                dtype = numba.typeof(value).dtype
            except core.errors.NumbaError:
                return None
            if value.dtype.hasobject or not value.flags.c_contiguous:
                return None
            kind = types.Array(dtype, value.ndim, "C", readonly=not value.flags.writeable)
            return kind, [value.ctypes.data, *value.shape]
        if isinstance(value, bool | np.bool_):
            return types.boolean, [int(value)]
        if isinstance(value, int | np.integer):
            if not -(1 << 63) <= value < 1 << 63:
                return None
            return types.int64, [int(value)]
        if isinstance(value, float | np.floating):
            return types.float64, [int(np.float64(value).view(np.int64))]
        if hasattr(value, "_fields"):
            inner = Block(value)
            self.keeps.append(inner)
            return inner.type, [inner.address]
        return None


@typeof_impl.register(Block)  # type: ignore[untyped-decorator]
def _typeof_block(block: Block, context: Any) -> Struct:
    return block.type


@register_model(Struct)
class _StructModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Struct) -> None:
        super().__init__(manager, fe_type, WORD)


@unbox(Struct)  # type: ignore[untyped-decorator]
def _unbox_struct(typ: Struct, source: Any, c: Any) -> Any:
    address = c.pyapi.object_getattr_string(source, "address")
    value = c.pyapi.long_as_longlong(address)
    c.pyapi.decref(address)
    return numba.core.pythonapi.NativeValue(value)


@infer_getattr
class _StructAttribute(AttributeTemplate):  # type: ignore[misc]
    key = Struct

    def generic_resolve(self, typ: Struct, attribute: str) -> Any:
        return dict(typ.fields).get(attribute)


def _word(builder: Any, block: Any, at: int) -> Any:
    """Return the pointer to a word of a block."""
    pointer = builder.inttoptr(block, WORD.as_pointer())
    return builder.gep(pointer, [WORD(at)])


@lower_getattr_generic(Struct)  # type: ignore[untyped-decorator]
def _read(context: Any, builder: Any, typ: Struct, block: Any, attribute: str) -> Any:
    kind = dict(typ.fields)[attribute]
    at = typ.offsets[attribute]
    value = builder.load(_word(builder, block, at))
    if isinstance(kind, types.Array):
        shape = [builder.load(_word(builder, block, at + 1 + d)) for d in range(kind.ndim)]
        itemsize = WORD(context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        strides = [itemsize] if shape else []
        for size in shape[:0:-1]:
            strides.insert(0, builder.mul(strides[0], size))
        array = arrayobj.make_array(kind)(context, builder)
        data = builder.inttoptr(value, context.get_data_type(kind.dtype).as_pointer())
        arrayobj.populate_array(array, data, shape, strides, itemsize, None)
        return array._getvalue()
    if kind is types.float64:
        return builder.bitcast(value, ir.DoubleType())
    if kind is types.boolean:
        return builder.icmp_signed("!=", value, WORD(0))
    return value


def constructor(name: str, names: tuple[str, ...]) -> Any:
    """Return what a NamedTuple class is in compiled code: it makes a block on the stack.

    The block is gone when the function that made it returns. Scalars are `int64` or `float64`.
    """

    def kind_of(given: Any) -> Any:
        if isinstance(given, types.Array | types.Float | Struct):
            return given
        return types.int64

    @intrinsic  # type: ignore[untyped-decorator]
    def construct(typing: Any, *values: Any) -> Any:
        struct = Struct(name, tuple(zip(names, map(kind_of, values), strict=True)))

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            block = cgutils.alloca_once(builder, ir.ArrayType(WORD, struct.words))
            address = builder.ptrtoint(block, WORD)
            packed = arguments[0]
            for i, (field, kind) in enumerate(struct.fields):
                at = struct.offsets[field]
                value = builder.extract_value(packed, i)
                if isinstance(kind, types.Array):
                    array = arrayobj.make_array(kind)(context, builder, value)
                    words = [builder.ptrtoint(array.data, WORD)]
                    words += cgutils.unpack_tuple(builder, array.shape, kind.ndim)
                else:
                    words = [context.cast(builder, value, values[i], kind)]
                    if kind is types.float64:
                        words = [builder.bitcast(words[0], WORD)]
                for offset, word in enumerate(words):
                    builder.store(word, _word(builder, address, at + offset))
            return address

        return struct(types.StarArgTuple.from_types(values)), generate

    return construct


def inner(**options: Any) -> Any:
    """Return the decorator of functions that only compiled code calls.

    Numba would compile a function once for each constant that it is called with; here an integer is
    an integer.
    """

    def decorate(function: Any) -> Any:
        made = numba.njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)
        template = made.get_call_template

        def widened(positional: Any, keywords: Any) -> Any:
            return template(
                tuple(map(types.unliteral, positional)),
                {name: types.unliteral(kind) for name, kind in keywords.items()},
            )

        made.get_call_template = widened
        return made

    return decorate


def entry(**options: Any) -> Any:
    """Return the decorator of functions that Python calls: kept on disk, run without the GIL."""

    def decorate(function: Any) -> Any:
        made = numba.njit(function, nogil=True, cache=True, **options)
        usual = made.compile

        def alone(signature: Any) -> Any:
            with assembled_only(function.__name__):
                return usual(signature)

        made.compile = alone
        return made

    return decorate


@intrinsic  # type: ignore[untyped-decorator]
def call_at(typing: Any, address: Any, first: Any, second: Any, third: Any) -> Any:
    """Call the compiled function at an address with three blocks; it returns nothing.

    What it raises goes on to the caller.
    """
    kinds = (first, second, third)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = context.call_conv.get_function_type(types.none, kinds)
        function = builder.inttoptr(arguments[0], function_type.as_pointer())
        status, _ = context.call_conv.call_function(
            builder, function, types.none, kinds, arguments[1:]
        )
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.none(address, *kinds), generate


@intrinsic  # type: ignore[untyped-decorator]
def call_back(typing: Any, address: Any, number: Any) -> Any:
    """Call the C function at an address with a number; return the number that it answers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(WORD, [WORD])
        function = builder.inttoptr(arguments[0], function_type.as_pointer())
        return builder.call(function, [context.cast(builder, arguments[1], number, types.int64)])

    return types.int64(address, number), generate
