# SPDX-License-Identifier: Apache-2.0
"""hash_keys against the `xxhash` package, and against itself over all kinds of columns."""

from __future__ import annotations

import struct
import sys
import threading
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from damo_embedding import hash_keys

ZERO_REPLACEMENT = 0x9E3779B97F4A7C15
U64 = 2**64


def expected_key(field: str, value: Any, seed: int = 0) -> int:
    """The definition of docs/format.md, one value at a time."""
    if value is None or value != value:
        return 0
    field_seed = xxhash.xxh3_64_intdigest(field.encode(), seed)
    if isinstance(value, int):
        integer_seed = xxhash.xxh3_64_intdigest(struct.pack("<Q", field_seed), 0)
        key = xxhash.xxh3_64_intdigest(struct.pack("<Q", value % U64), integer_seed)
    else:
        key = xxhash.xxh3_64_intdigest(value.encode() if isinstance(value, str) else value, field_seed)
    key = key or ZERO_REPLACEMENT
    return key - U64 if key >= 2**63 else key


def expected_keys(field: str, values: list[Any], seed: int = 0) -> np.ndarray:
    return np.array([expected_key(field, value, seed) for value in values], dtype=np.int64)


def assert_keys(actual: np.ndarray, expected: Any) -> None:
    assert actual.dtype == np.int64
    np.testing.assert_array_equal(actual, expected, strict=True)


# Lengths on both sides of every branch of XXH3 (3, 8, 16, 128, 240 bytes), and every width of UTF-8.
TEXTS = [
    "",
    "a",
    "Oslo",
    "12345678",
    "København",
    "東京",
    "😀 emoji",
    "x" * 16,
    "y" * 17,
    "ż" * 64,
    "q" * 240,
    "r" * 241,
    "s" * 5000,
]
INTEGERS = [0, 1, -1, 5, 127, 128, 2**31, 2**63 - 1, -(2**63)]

any_text = st.text(max_size=300)
any_value = st.one_of(
    st.none(),
    st.just(float("nan")),
    any_text,
    st.binary(max_size=300),
    st.integers(min_value=-(2**63), max_value=2**64 - 1),
)


@given(
    field=st.text(min_size=1, max_size=40),
    values=st.lists(any_value, max_size=20),
    seed=st.integers(0, 2**64 - 1),
)
def test_keys_are_those_of_the_documented_definition(field: str, values: list[Any], seed: int) -> None:
    expected = expected_keys(field, values, seed)
    assert_keys(hash_keys(field, values, seed=seed), expected)
    assert_keys(hash_keys(field, tuple(values), seed=seed), expected)
    array = np.empty(len(values), dtype=object)
    array[:] = values
    assert_keys(hash_keys(field, array, seed=seed), expected)


def test_golden_values_of_the_format_document() -> None:
    # Made with the xxhash package: expected_key(field, value) above.
    golden = [
        ("city", "Oslo", 0, 8647766617524932057),
        ("city", "", 0, 4875961023906514590),
        ("city", "東京", 0, 2113774763446396006),
        ("user", 0, 0, -7440446539185294909),
        ("user", 5, 0, 5012926161063040769),
        ("user", "5", 0, 691214282487138278),
        ("user", -1, 0, -6955562014299007629),
        ("user", 5, 7, 850429433315291248),
    ]
    for field, value, seed, key in golden:
        assert expected_key(field, value, seed) == key
        assert hash_keys(field, [value], seed=seed).tolist() == [key]


def test_text_and_its_utf8_agree_and_differ_from_the_integer() -> None:
    keys = hash_keys("f", ["5", b"5", 5, struct.pack("<q", 5)])
    assert keys[0] == keys[1]
    assert len(set(keys.tolist())) == 3


def test_fields_and_seeds_give_different_keys() -> None:
    keys = [hash_keys(field, ["a", 1], seed=seed).tolist() for field in ("x", "y") for seed in (0, 1)]
    assert len({key for pair in keys for key in pair}) == 8


def zero_integer(field: str, seed: int = 0) -> int:
    """The one integer whose hash is 0: XXH3 of 8 bytes run backwards."""
    integer_seed = xxhash.xxh3_64_intdigest(struct.pack("<Q", xxhash.xxh3_64_intdigest(field.encode(), seed)), 0)
    rotate = lambda x, n: ((x << n) | (x >> (64 - n))) % U64  # noqa: E731
    secret = 0x1CAD21F72C81017C ^ 0xDB979083E96DD4DE
    low = struct.unpack("<I", struct.pack(">I", integer_seed & 0xFFFFFFFF))[0]
    bitflip = (secret - (integer_seed ^ (low << 32))) % U64
    h = 8 * pow(0x9FB21C651E98DF25, -1, U64) % U64
    for _ in range(63):  # (1 + r^24 + r^49)^64 = 1 over GF(2), so the 63rd power is the inverse
        h ^= rotate(h, 49) ^ rotate(h, 24)
    h ^= bitflip
    return ((h >> 32) | (h << 32)) % U64


def test_a_hash_of_zero_is_replaced_so_that_only_missing_is_key_zero() -> None:
    field = "field"
    value = zero_integer(field)
    integer_seed = xxhash.xxh3_64_intdigest(struct.pack("<Q", xxhash.xxh3_64_intdigest(field.encode(), 0)), 0)
    assert xxhash.xxh3_64_intdigest(struct.pack("<Q", value), integer_seed) == 0
    assert_keys(hash_keys(field, [value]), np.array([ZERO_REPLACEMENT - U64], np.int64))
    assert_keys(hash_keys(field, np.array([value], np.uint64)), np.array([ZERO_REPLACEMENT - U64], np.int64))


# --------------------------------------------------------------------- lists and objects


def test_missing_values_of_all_kinds_become_zero() -> None:
    pandas = pytest.importorskip("pandas")
    values = [None, float("nan"), np.float32("nan"), np.nan, np.ma.masked, pandas.NA, pandas.NaT]
    assert not hash_keys("f", values).any()
    assert hash_keys("f", ["", b"", 0]).all()


def test_numpy_scalars_and_subclasses_in_lists_are_their_values() -> None:
    class Text(str):
        pass

    values = [np.int8(-3), np.uint64(2**64 - 1), np.str_("é"), np.bytes_(b"b"), Text("t")]
    assert_keys(hash_keys("f", values), expected_keys("f", [-3, 2**64 - 1, "é", b"b", "t"]))


@pytest.mark.parametrize(
    "bad", [2.5, np.float32(1), True, np.True_, ["nested"], object(), bytearray(b"x"), 1j, float("inf")]
)
def test_other_objects_are_refused_with_their_index(bad: Any) -> None:
    with pytest.raises(
        TypeError, match=r'\[hash_keys\] value 2 of field "f" is a .*expected str, bytes, int or a missing'
    ):
        hash_keys("f", ["a", None, bad])


@pytest.mark.parametrize("bad", [2**64, -(2**63) - 1, 10**30])
def test_integers_beyond_64_bits_are_refused_with_their_index(bad: int) -> None:
    with pytest.raises(ValueError, match=r'value 1 of field "f" is an integer beyond 64 bits.*str\(value\)'):
        hash_keys("f", [1, bad])


def test_lone_surrogates_are_refused_with_their_index() -> None:
    for values in (["a", "b", "x\ud800"], np.array(["a", "b", "x\udfff"])):
        with pytest.raises(ValueError, match=r'value 2 of field "f" has no UTF-8.*surrogatepass'):
            hash_keys("f", values)


def test_text_that_is_not_ascii_is_not_kept_twice_in_the_callers_strings() -> None:
    values = [f"{i}" + "é" * 1000 for i in range(20)]
    before = sum(map(sys.getsizeof, values))
    hash_keys("f", values)
    assert sum(map(sys.getsizeof, values)) <= before + 2100  # with the stable interface of CPython, one of them is


def test_a_list_shrinking_under_the_hash_is_an_error_not_a_crash() -> None:
    values: list[Any] = []

    class Shrinks:
        def __index__(self) -> int:
            values.clear()
            return 1

    values.extend([Shrinks(), *["text"] * 100])
    with pytest.raises(ValueError, match="changed its length"):
        hash_keys("f", values)


def test_an_exception_of_a_value_comes_through() -> None:
    class Raises:
        def __index__(self) -> int:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        hash_keys("f", [Raises()])


# --------------------------------------------------------------------------------- NumPy


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_integer_arrays_of_every_width_and_byte_order_agree_with_python_integers(dtype: str, order: str) -> None:
    info = np.iinfo(dtype)
    values = [info.min, 0, 1, 5, info.max]
    assert_keys(hash_keys("f", np.array(values, dtype=order + dtype)), expected_keys("f", values))


@pytest.mark.parametrize("order", ["<", ">"])
def test_unicode_arrays_agree_with_lists(order: str) -> None:
    array = np.array(TEXTS[:-1]).astype(np.dtype(np.array(TEXTS[:-1]).dtype).newbyteorder(order))
    assert_keys(hash_keys("f", array), expected_keys("f", TEXTS[:-1]))
    assert_keys(hash_keys("f", array[::-2]), expected_keys("f", TEXTS[:-1][::-2]))


@given(st.lists(any_text, max_size=10))
def test_unicode_and_bytes_arrays_agree_with_lists_for_any_text(values: list[str]) -> None:
    values = [value.rstrip("\0") for value in values]  # NumPy does not keep those
    assert_keys(hash_keys("f", np.array(values, dtype=str)), expected_keys("f", values))
    encoded = [value.encode() for value in values]
    assert_keys(hash_keys("f", np.array(encoded, dtype=bytes)), expected_keys("f", values))


def test_string_dtype_arrays_agree_with_lists() -> None:
    assert_keys(hash_keys("f", np.array(TEXTS, dtype=np.dtypes.StringDType())), expected_keys("f", TEXTS))
    for na_object in (None, np.nan):
        values = np.array(["a", na_object, "b"], dtype=np.dtypes.StringDType(na_object=na_object))
        assert_keys(hash_keys("f", values), expected_keys("f", ["a", None, "b"]))


@pytest.mark.parametrize("dtype", ["i8", "U8", "S8", "O"])
def test_arrays_of_many_dimensions_keep_their_shape(dtype: str) -> None:
    flat = np.arange(24).astype(dtype)
    keys = hash_keys("f", flat)
    for view in (flat.reshape(2, 3, 4), np.asfortranarray(flat.reshape(2, 3, 4)), flat.reshape(24, 1)):
        assert_keys(hash_keys("f", view), keys.reshape(view.shape))
    assert_keys(hash_keys("f", flat.reshape(4, 6).T), keys.reshape(4, 6).T)


def test_unaligned_and_read_only_arrays_are_taken() -> None:
    raw = np.zeros(8 * 5 + 1, np.uint8)
    values = raw[1:].view(np.int64)
    values[:] = range(5)
    values.flags.writeable = False
    assert_keys(hash_keys("f", values), expected_keys("f", list(range(5))))


@pytest.mark.parametrize(
    "data", [[1, 2, 3], ["a", "b", "\ud800"], [b"a", b"b", b"c"], ["a", 1, 2.5], [1.5, np.nan, 2.5]]
)
def test_masked_values_are_missing_whatever_lies_beneath(data: list[Any]) -> None:
    dtype = object if isinstance(data[-1], float) and isinstance(data[0], str) else None
    mask = [(isinstance(v, float) and v == v) or v == "\ud800" for v in data]
    mask[1] = True
    expected = expected_keys("f", [None if hidden else v for v, hidden in zip(data, mask, strict=True)])
    assert_keys(hash_keys("f", np.ma.array(data, mask=mask, dtype=dtype)), expected)
    assert_keys(hash_keys("f", np.ma.array(data, mask=mask, dtype=dtype).reshape(3, 1)), expected.reshape(3, 1))


def test_float_columns_are_missing_when_all_nan_and_refused_otherwise() -> None:
    for dtype in ("f2", "f4", "f8"):
        assert_keys(hash_keys("f", np.full(3, np.nan, dtype)), np.zeros(3, np.int64))
        with pytest.raises(TypeError, match=r'value 1 of field "f" is a float \(2.5\).*Int64'):
            hash_keys("f", np.array([np.nan, 2.5], dtype))


@pytest.mark.parametrize("dtype", ["M8[s]", "m8[s]", "?", "c16", "V4"])
def test_arrays_of_other_types_are_refused(dtype: str) -> None:
    with pytest.raises(TypeError, match=r'field "f" is an array of .*astype'):
        hash_keys("f", np.zeros(2, dtype))


@pytest.mark.parametrize(
    "empty",
    [
        [],
        (),
        np.array([]),
        np.array([], "U3"),
        np.array([], "i4"),
        np.array([], object),
        np.zeros((0, 3), int),
    ],
)
def test_empty_columns_give_no_keys(empty: Any) -> None:
    assert_keys(hash_keys("f", empty), np.zeros(np.shape(empty), np.int64))


def test_arrays_of_empty_texts_are_hashed() -> None:
    for empty in (np.zeros(2, "U0"), np.array(["", ""]), np.zeros(2, "S0"), np.zeros(2, "S4")):
        assert_keys(hash_keys("f", empty), expected_keys("f", ["", ""]))


# --------------------------------------------------------------------------------- pandas


@pytest.mark.parametrize("dtype", ["object", "string[python]", "string[pyarrow]", "str", "category"])
def test_pandas_text_agrees_with_lists(dtype: str) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    values = [*TEXTS, None, *TEXTS[::-1]]
    series = pandas.Series(values, dtype="object").astype(dtype)
    for column in (series, series.iloc[::-1].iloc[::-1], series.array, pandas.Index(series)):
        assert_keys(hash_keys("f", column), expected_keys("f", values))


def test_pandas_categories_without_a_value_are_missing() -> None:
    pandas = pytest.importorskip("pandas")
    assert_keys(hash_keys("f", pandas.Series([None, None], dtype="category")), np.zeros(2, np.int64))
    numbers = pandas.Series([3, 1, 3], dtype="category")
    assert_keys(hash_keys("f", numbers), expected_keys("f", [3, 1, 3]))


@pytest.mark.parametrize("dtype", ["Int64", "Int8", "UInt16", "int64[pyarrow]"])
def test_pandas_nullable_integers_agree_with_lists(dtype: str) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    values = [5, None, 0, 100]
    assert_keys(hash_keys("f", pandas.Series(values, dtype=dtype)), expected_keys("f", values))


def test_pandas_numpy_columns_agree_with_lists() -> None:
    pandas = pytest.importorskip("pandas")
    assert_keys(hash_keys("f", pandas.Series([1, 2, 3])), expected_keys("f", [1, 2, 3]))
    assert_keys(hash_keys("f", pandas.RangeIndex(3)), expected_keys("f", [0, 1, 2]))
    assert not hash_keys("f", pandas.Series([np.nan, np.nan])).any()
    assert not hash_keys("f", pandas.Series([None, None], dtype="Float64")).any()


def test_pandas_columns_of_other_types_are_refused() -> None:
    pandas = pytest.importorskip("pandas")
    for column in (
        pandas.Series([1.5]),
        pandas.Series([1.5], dtype="Float64"),
        pandas.Series([True]),
        pandas.Series([True], dtype="boolean"),
        pandas.to_datetime(pandas.Series(["2024-01-01"])),
        pandas.to_datetime(pandas.Series(["2024-01-01"])).dt.tz_localize("UTC"),
        pandas.DataFrame({"a": [1]}),
    ):
        with pytest.raises(TypeError, match=r"\[hash_keys\]"):
            hash_keys("f", column)


# ---------------------------------------------------------------------------------- Arrow


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view", "dictionary"]
)
def test_arrow_text_agrees_with_lists(kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    values = [*TEXTS, None, "tail"]
    if kind == "dictionary":
        array = pyarrow.array(values, pyarrow.string()).dictionary_encode()
    elif "binary" in kind:
        array = pyarrow.array([v if v is None else v.encode() for v in values], getattr(pyarrow, kind)())
    else:
        array = pyarrow.array(values, getattr(pyarrow, kind)())
    expected = expected_keys("f", values)
    assert_keys(hash_keys("f", array), expected)
    assert_keys(hash_keys("f", array[3:]), expected[3:])
    assert_keys(hash_keys("f", array[3:9]), expected[3:9])
    chunked = pyarrow.chunked_array([array[:2], array[2:2], array[2:]])
    assert_keys(hash_keys("f", chunked), expected)
    assert_keys(hash_keys("f", chunked[1:12]), expected[1:12])
    assert_keys(hash_keys("f", array[:0]), expected[:0])


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_arrow_integers_agree_with_lists(kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    info = np.iinfo(kind)
    values = [1, None, info.min, info.max, *([7, None] * 10)]
    array = pyarrow.array(values, getattr(pyarrow, kind)())
    assert_keys(hash_keys("f", array), expected_keys("f", values))
    assert_keys(hash_keys("f", array[3:]), expected_keys("f", values[3:]))
    assert_keys(hash_keys("f", array.dictionary_encode()), expected_keys("f", values))


def test_arrow_dictionaries_that_differ_between_chunks_are_told_apart() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    chunks = [pyarrow.array(values).dictionary_encode() for values in (["a", "b"], ["b", "c", None], ["d"])]
    assert_keys(hash_keys("f", pyarrow.chunked_array(chunks)), expected_keys("f", ["a", "b", "b", "c", None, "d"]))
    with_null = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, 0]), pyarrow.array(["x", None]))
    assert_keys(hash_keys("f", with_null), expected_keys("f", ["x", None, "x"]))


def test_arrow_null_and_fixed_width_columns_are_taken() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    assert not hash_keys("f", pyarrow.nulls(3)).any()
    assert not hash_keys("f", pyarrow.array([None, None], pyarrow.int64())).any()
    assert not hash_keys("f", pyarrow.array([None, float("nan")], pyarrow.float32())).any()
    assert not hash_keys("f", pyarrow.array([None, "x"])[:1]).any()
    fixed = pyarrow.array([b"ab\0", None], pyarrow.binary(3))
    assert_keys(hash_keys("f", fixed), expected_keys("f", [b"ab\0", None]))


def test_arrow_columns_of_other_types_are_refused() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    for array in (
        pyarrow.array([True]),
        pyarrow.array([0], pyarrow.timestamp("s")),
        pyarrow.array([["a"]]),
        pyarrow.table({"a": [1]}),
        pyarrow.record_batch({"a": [1]}),
        pyarrow.scalar("a"),
    ):
        with pytest.raises(TypeError, match=r"\[hash_keys\]"):
            hash_keys("f", array)
    for kind in (pyarrow.float16(), pyarrow.float32(), pyarrow.float64()):
        floats = pyarrow.chunked_array(
            [pyarrow.array(np.array(v, kind.to_pandas_dtype())) for v in ([np.nan], [np.nan, 2.5])]
        )
        with pytest.raises(TypeError, match='value 2 of field "f" is a float'):
            hash_keys("f", floats)


def test_arrow_offsets_outside_of_the_text_are_refused() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    text = pyarrow.py_buffer(b"abcdef")
    for offsets in ([0, 5, 3, 6], [0, 9, 6, 6], [0, -1, 3, 6]):
        buffers = [None, pyarrow.py_buffer(np.array(offsets, np.int32)), text]
        array = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
        with pytest.raises(ValueError, match="points outside of its Arrow buffers"):
            hash_keys("f", array)
    indices = pyarrow.array([0, 7])
    bad = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["a"]), safe=False)
    with pytest.raises(ValueError, match=r"value 1 .*outside"):
        hash_keys("f", bad)


def test_polars_columns_agree_with_lists() -> None:
    polars = pytest.importorskip("polars")
    values = [*TEXTS, None]
    for column in (polars.Series(values), polars.Series(values).cast(polars.Categorical)):
        assert_keys(hash_keys("f", column), expected_keys("f", values))
    assert_keys(hash_keys("f", polars.Series([1, None, 3])), expected_keys("f", [1, None, 3]))


# ------------------------------------------------------------------------ padding, arguments


@pytest.mark.parametrize("padding", ["", "pad", b"pad", 0, -1, np.int32(7)])
def test_padding_becomes_zero_and_changes_no_other_key(padding: Any) -> None:
    values = ["", "pad", b"pad", 0, -1, 7, "x", None]
    value = int(padding) if isinstance(padding, np.integer) else padding
    keys = hash_keys("f", values)
    expected = np.where(keys == expected_key("f", value), 0, keys)
    assert (expected != keys).any()
    assert_keys(hash_keys("f", values, padding=padding), expected)


def test_padding_is_found_in_every_kind_of_column() -> None:
    expected = expected_keys("f", ["a", None, "b"])
    for column in (np.array(["a", "pad", "b"]), np.array([b"a", b"pad", b"b"])):
        assert_keys(hash_keys("f", column, padding="pad"), expected)
    assert_keys(hash_keys("f", np.array([3, -1], np.int8), padding=-1), expected_keys("f", [3, None]))
    pyarrow = pytest.importorskip("pyarrow")
    array = pyarrow.array(["a", "pad", "b"])
    for column in (array, array.dictionary_encode(), array.cast(pyarrow.string_view())):
        assert_keys(hash_keys("f", column, padding="pad"), expected)


@pytest.mark.parametrize(
    "scalar", ["text", b"bytes", 5, 2.5, None, np.int64(3), np.str_("a"), np.array(3), bytearray(b"x")]
)
def test_scalars_are_refused_with_the_way_out(scalar: Any) -> None:
    with pytest.raises(TypeError, match=r"\[hash_keys\] values is .*(\[value\]|reshape)"):
        hash_keys("f", scalar)


@pytest.mark.parametrize("other", [{"a"}, {"a": 1}, iter(["a"]), range(3)])
def test_other_containers_are_refused_with_the_way_out(other: Any) -> None:
    with pytest.raises(TypeError, match=r"list\(values\)"):
        hash_keys("f", other)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="field is a int"):
        hash_keys(3, ["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="field is empty"):
        hash_keys("", ["a"])
    with pytest.raises(ValueError, match="surrogate"):
        hash_keys("\ud800", ["a"])
    for seed in (-1, 2**64, 1.5, "x", True, None):
        with pytest.raises(ValueError, match=r"seed is .*expected an integer in \[0, 2\*\*64\)"):
            hash_keys("f", ["a"], seed=seed)  # type: ignore[arg-type]
    for padding in (2.5, True, ["a"]):
        with pytest.raises(TypeError, match="padding is a"):
            hash_keys("f", ["a"], padding=padding)  # type: ignore[arg-type]


@settings(max_examples=20)
@given(st.lists(any_text, min_size=1, max_size=50), st.integers(0, 2**32))
def test_a_value_has_one_key_wherever_it_stands(values: list[str], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(values))
    keys = hash_keys("f", values)
    assert_keys(hash_keys("f", [values[i] for i in order]), keys[order])


def test_threads_hash_side_by_side() -> None:
    column = np.arange(200_000)
    expected = hash_keys("f", column)
    results: list[np.ndarray] = [np.empty(0)] * 4

    def work(i: int) -> None:
        results[i] = hash_keys("f", column)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert_keys(result, expected)


def test_a_polars_column_of_objects_is_hashed_by_its_values() -> None:
    """Its Arrow form has the addresses of the objects, which are others in every run."""
    polars = pytest.importorskip("polars")
    values = ["aaa", "".join(["a"] * 3), 7, None]
    column = polars.Series("f", values, dtype=polars.Object)
    assert (hash_keys("f", column) == hash_keys("f", values)).all()
