import csv
import hashlib
import io
import json
import math
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llfast import SpaceError, Store, TextSet
from llfast.importing import import_matrix

MODELS = ["org/a", "org/b", "c"]
BITS = np.array([[0.5, 1.25, 0.1], [2.0, 0.7, 1 / 3], [1.1, 0.9, 1.7]])
NATS = -BITS * 972 * math.log(2)


def write_csv(path, names, columns):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(zip(*columns, strict=True))
    return path


def write_text(path, text):
    path.write_bytes(text.encode())
    return path


def load(path, **options):
    return import_matrix(path, **{"unit": "bits_per_byte", "text_bytes": 972.0} | options)


# ------------------------------------------------------------------------------ three formats


@pytest.fixture(params=["csv", "npz", "parquet"])
def write(request, tmp_path):
    """Writes models, values (K, N) and ids as a file of each kind."""

    def write(models, values, ids=None, families=None):
        path = tmp_path / f"m.{request.param}"
        names = list(models) if families is None else list(zip(families, models, strict=True))
        names = [str(name) for name in names]
        if request.param == "npz":
            more = {"ids": ids, "families": families}
            more = {name: np.array(rows) for name, rows in more.items() if rows is not None}
            np.savez(path, models=np.array(models), values=values, **more)
            return path
        columns = [[repr(cell) for cell in row] for row in values.tolist()]
        if request.param == "csv":
            first = ([], []) if ids is None else (["id"], [ids])
            return write_csv(path, first[0] + names, first[1] + columns)
        columns = [pa.array(row) for row in values]
        if ids is not None:
            names, columns = ["id", *names], [pa.array(ids), *columns]
        pq.write_table(pa.Table.from_arrays(columns, names), path)
        return path

    return write


def test_bits_per_byte_become_nats(write):
    ids = ["x", "y", "z"]
    path = write(MODELS, BITS, ids)
    matrix = load(path)
    np.testing.assert_array_equal(matrix.values, -BITS * 972.0 * math.log(2.0))
    assert matrix.models == tuple(MODELS)
    assert matrix.ids == tuple(ids)
    assert matrix.text_bytes.tolist() == [972.0] * 3
    assert matrix.convention == "imported"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert matrix.revisions == (f"import:{digest[:16]}",) * 3
    assert matrix.dtypes == ("unknown",) * 3


def test_nats_are_kept_to_the_bit(write):
    matrix = load(write(MODELS, NATS), unit="nats", convention="theirs")
    np.testing.assert_array_equal(matrix.values, NATS)
    assert matrix.ids == ("0", "1", "2")
    assert matrix.convention == "theirs"


def test_families_come_with_the_names(write):
    matrix = load(write(MODELS, BITS, ["x", "y", "z"], ["Llama", "", "it's"]))
    assert matrix.models == tuple(MODELS)
    assert matrix.metadata == ({"family": "Llama"}, {}, {"family": "it's"})


def test_a_model_of_several_families_is_one_of_each(write):
    matrix = load(write(["a", "b", "a"], BITS, None, ["f", "g", "h"]))
    assert matrix.models == ("a (f)", "b", "a (h)")
    assert [each["family"] for each in matrix.metadata] == ["f", "g", "h"]
    with pytest.raises(SpaceError, match=r"must name each model once, got 'a \(f\)' again"):
        load(write(["a", "b", "a"], BITS, None, ["f", "g", "f"]))


def test_each_text_can_have_its_own_bytes(write, tmp_path):
    sizes = np.array([10.0, 972.5, 3.0])
    path = write(MODELS, BITS)
    text = write_text(tmp_path / "sizes.txt", "\ufeff10\n972.5\n3\n")
    for given in (text, str(text), write_text(tmp_path / "sizes.csv", "10\r\n972.5\r\n3")):
        matrix = load(path, text_bytes=given)
        np.testing.assert_array_equal(matrix.values, -BITS * sizes * math.log(2.0))
        assert matrix.text_bytes.tolist() == sizes.tolist()
    assert load(path, text_bytes="972.5").text_bytes.tolist() == [972.5] * 3


def test_a_text_set_gives_bytes_digest_and_order(write, tmp_path):
    texts = TextSet.from_texts(["é", "bcd", "efghi"], ["z", "x", "y"], ["g", "g", "h"])
    texts.save(tmp_path / "texts.jsonl")
    matrix = load(write(MODELS, BITS, ["x", "y", "z"]), text_bytes=tmp_path / "texts.jsonl")
    assert matrix.textset_digest == texts.digest
    assert matrix.ids == ("z", "x", "y")
    assert matrix.groups == ("g", "g", "h")
    in_order = BITS[:, [2, 0, 1]]
    np.testing.assert_array_equal(matrix.values, -in_order * np.array([2, 3, 5.0]) * math.log(2.0))
    with pytest.raises(SpaceError, match="must have the ids of the text set"):
        load(write(MODELS, BITS, ["x", "y", "w"]), text_bytes=tmp_path / "texts.jsonl")
    with pytest.raises(SpaceError, match="text_bytes must be of 2 texts, got 3 in"):
        load(write(MODELS, BITS[:, :2], ["x", "y"]), text_bytes=tmp_path / "texts.jsonl")


@pytest.mark.parametrize("unit", ["nats", "bits_per_byte"])
def test_a_text_of_a_text_set_may_be_empty(write, tmp_path, unit):
    TextSet.from_texts(["a", "", "ccc"]).save(tmp_path / "t.jsonl")
    values = np.array([[1.0, 0.0, 2.0], [3.0, 0.0, 4.0]])
    path = write(["a", "b"], -values if unit == "nats" else values)
    matrix = load(path, unit=unit, text_bytes=tmp_path / "t.jsonl")
    assert matrix.text_bytes.tolist() == [1.0, 0.0, 3.0]
    assert matrix.values[:, 1].tolist() == [0.0, 0.0]


def test_what_is_imported_can_be_stored_and_searched(write, tmp_path):
    store = Store(tmp_path / "store")
    store.add_matrix(load(write(MODELS, BITS, ["x", "y", "z"], ["f", "f", "g"])))
    matrix = store.matrix()
    order = [MODELS.index(model) for model in matrix.models]
    np.testing.assert_array_equal(matrix.values, (-BITS * 972.0 * math.log(2.0))[order])
    assert [each["family"] for each in matrix.metadata] == ["g", "f", "f"]
    again = load(write(MODELS, BITS, ["x", "y", "z"]))
    assert again.textset_digest == matrix.textset_digest, "the same texts are one text set"
    other = load(write(MODELS, BITS, ["x", "y", "w"]))
    assert other.textset_digest != matrix.textset_digest


def test_a_mean_of_bytes_is_not_rounded_in_a_store(write, tmp_path):
    store = Store(tmp_path / "store")
    store.add_matrix(load(write(MODELS, BITS), text_bytes=972.4))
    results = {row.key.model: store.load(row) for row in store.rows()}
    for model, bits in zip(MODELS, BITS, strict=True):
        assert results[model].mean_bits_per_byte == pytest.approx(bits.mean(), rel=1e-12)


# ------------------------------------------------------------------------------ odd but right


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = write_text(tmp_path / "m.csv", "\ufeffa,b\n0.5,0.6\n")
    assert load(path).models == ("a", "b")
    path = write_text(tmp_path / "m.csv", "\ufeff\"('f', 'a')\",b\n0.5,0.6\n")
    assert load(path).metadata == ({"family": "f"}, {})


@pytest.mark.parametrize("header", ["id", "ID", "", "index", "Unnamed: 0"])
def test_a_column_of_numbers_can_be_ids(tmp_path, header):
    ids = ["0", "12345678901234567890123", "007"]
    matrix = load(write_csv(tmp_path / "m.csv", [header, "a"], [ids, [0.5, 0.6, 0.7]]))
    assert matrix.models == ("a",)
    assert matrix.ids == tuple(ids), "to the digit"


def test_numbers_joined_by_underscores_are_ids_and_no_numbers(tmp_path):
    matrix = load(write_text(tmp_path / "m.csv", "chunk,a,b\n12_0,0.5,0.6\n12_1,0.5,0.7\n"))
    assert (matrix.models, matrix.ids) == (("a", "b"), ("12_0", "12_1"))
    with pytest.raises(SpaceError, match="must hold numbers, got '1_0' for model 'a', text 'x'"):
        load(write_text(tmp_path / "m.csv", "id,a\nx,1_0\n"))


def test_the_index_that_pandas_puts_last_holds_the_ids(tmp_path):
    table = pa.table({"a": [0.5, 0.6], "b": [0.7, 0.8], "__index_level_0__": [11, 12]})
    pq.write_table(table, tmp_path / "m.parquet")
    matrix = load(tmp_path / "m.parquet")
    assert (matrix.models, matrix.ids) == (("a", "b"), ("11", "12"))


@pytest.mark.parametrize("ids", [[11, 12], ["x", "y"]])
def test_an_index_with_a_name_holds_the_ids_too(tmp_path, ids):
    table = pa.table({"a": [0.5, 0.6], "b": [0.7, 0.8], "document": ids})
    pandas = json.dumps({"index_columns": ["document"]})
    pq.write_table(table.replace_schema_metadata({"pandas": pandas}), tmp_path / "m.parquet")
    matrix = load(tmp_path / "m.parquet")
    assert matrix.models == ("a", "b")
    assert matrix.ids == tuple(map(str, ids))


@pytest.mark.parametrize("names", [["document", "part"], ["__index_level_0__", "part"]])
def test_an_index_of_several_levels_is_no_model_and_no_ids(tmp_path, names):
    table = pa.table({"a": [0.5, 0.6], names[0]: [1, 1], names[1]: [1, 2]})
    pandas = json.dumps({"index_columns": names})
    pq.write_table(table.replace_schema_metadata({"pandas": pandas}), tmp_path / "m.parquet")
    with pytest.raises(SpaceError, match=f"must have one index, got {', '.join(names)}; join"):
        load(tmp_path / "m.parquet")


def test_ids_may_be_long_and_hold_anything(tmp_path):
    ids = ["x" * 100_000, 'a "quoted", one', "two\nlines", "🙂", " "]
    matrix = load(write_csv(tmp_path / "m.csv", ["title", "a"], [ids, [0.5] * 5]))
    assert matrix.ids == tuple(ids)


def test_empty_lines_are_no_rows(tmp_path):
    matrix = load(write_text(tmp_path / "m.csv", "\r\nid,a\r\n\r\nx,0.5\r\ny,0.6\r\n\r\n\r\n"))
    assert matrix.ids == ("x", "y")


def test_names_that_only_look_like_tuples_are_names(tmp_path):
    names = ["(a)", "('f', 'm', 'more')", "(" * 5000, "(__import__('os'), 1)"]
    matrix = load(write_csv(tmp_path / "m.csv", names, [[0.5]] * 4))
    assert matrix.models == tuple(names)


def test_numbers_are_read_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.random(200) * 10.0 ** rng.integers(-5, 3, 200)
    path = write_csv(tmp_path / "m.csv", ["a"], [[repr(float(value)) for value in values]])
    matrix = load(path, text_bytes=1.0)
    np.testing.assert_array_equal(matrix.values[0], -values * 1.0 * math.log(2.0))


def test_names_that_are_bytes_are_what_they_spell(tmp_path):
    names = np.array([b"org/a", b"org/b", b"c"])  # as other formats have them
    np.savez(tmp_path / "m.npz", models=names, values=BITS, ids=names, families=names)
    matrix = load(tmp_path / "m.npz")
    assert matrix.models == matrix.ids == tuple(MODELS)
    assert [each["family"] for each in matrix.metadata] == MODELS


# ------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "with a header, got an empty one"),
        ("\n\n", "with a header, got an empty one"),
        ("id,a,b\n", "at least one text and one model, got none"),
        ("id\nx\ny\n", "at least one text and one model, got none"),
        ("id;a\nx;0.5\n", "at least one text and one model, got none"),
        ("id,a,b\nx,0.5,0.6\ny,0.7\n", "must have 3 cells a row, got 2 in line 3"),
        ('id,a\n"x\nx",0.5\ny,0.7,\n', "must have 2 cells a row, got 3 in line 4"),
        ("id,a,b\nx,0.5,0.6\ny,,0.7\n", "must hold numbers, got '' for model 'a', text 'y'"),
        ("id,a\nx,n/a\n", "must hold numbers, got 'n/a' for model 'a', text 'x'"),
        ('id,a\nx,"0,5"\n', "must hold numbers, got '0,5' for model 'a'"),
        ("a,b\n0.5,1\n,2\n", "got '' for model 'a', text 1; if these are ids, name the column id"),
        ("id,a\nx,0.5\ny,nan\n", "must hold finite numbers, got nan for model 'a', text 'y'"),
        ("a,b\n1,2\n1,-inf\n", "must hold finite numbers, got -inf for model 'b', text 1"),
        ("id,a,b,a\nx,1,2,3\n", "must name each model once, got 'a' again"),
        ("\"('f', 'a')\",\"('f', 'a')\"\n1,2\n", "must name each model once, got 'a (f)' again"),
        ("id,a\nx,1\ny,2\nx,3\n", "must name each text id once, got 'x' again"),
        ("id,a,\nx,1,2\n", "must name every model, got an empty name"),
        ("0.5,0.6\n0.7,0.8\n", "must name the models in its first line, got the number 0.5"),
        ("id,a\nx,-1\n", "at least 0 bits per byte, got -1; is the unit nats?"),
    ],
)
def test_a_csv_file_that_is_no_matrix_is_refused_in_one_line(tmp_path, content, message):
    path = write_text(tmp_path / "m.csv", content)
    with pytest.raises(SpaceError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "m.csv"
    for content in (b"id,a\n\xff\xfe,1\n", b"id,a\nx,1\0\n", "id,a\nx,1\n".encode("utf-16")):
        path.write_bytes(content)
        with pytest.raises(SpaceError) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_nats_above_0_are_refused(write):
    with pytest.raises(SpaceError, match=r"at most 0 nats, got 2; is the unit bits_per_byte\?"):
        load(write(MODELS, BITS), unit="nats")


class _Trap:
    def __reduce__(self):
        return open, ("trapped", "w")


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def array_bytes(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(pickle.dumps(_Trap()), "without pickled objects", id="a pickle"),
        (npz(models=np.array([_Trap()]), values=BITS[:1]), "without pickled objects"),
        (npz(models=MODELS, values=BITS, ids=np.array([_Trap()])), "without pickled objects"),
        (array_bytes(BITS), "got: a single array"),
        (b"", "must be an .npz file"),
        (b"PK\x03\x04", "must be an .npz file"),
        (npz(models=MODELS, values=BITS)[:-30], "must be an .npz file"),
        (npz(values=BITS), "must hold an array named 'models', got none"),
        (npz(models=MODELS), "must hold an array named 'values', got none"),
        (npz(models=MODELS, values=BITS[:2]), r"values of 3 models, a row each, got shape (2, 3)"),
        (npz(models=MODELS, values=BITS[0]), r"values of 3 models, a row each, got shape (3,)"),
        (npz(models="a", values=BITS), "must hold the arrays models and values"),
        (npz(models=MODELS, values=np.array([["x"] * 3] * 3)), "must hold the arrays"),
        (npz(models=MODELS, values=BITS, ids=["x"]), "must hold 3 ids, got 1"),
        (npz(models=MODELS, values=BITS, families=["x"]), "must hold 3 families, got 1"),
        (npz(models=MODELS, values=BITS[:, :0]), "at least one text and one model"),
        (npz(models=MODELS[:0], values=BITS[:0]), "at least one text and one model"),
        (npz(models=["a", "b", "a"], values=BITS), "must name each model once, got 'a' again"),
        (npz(models=MODELS, values=BITS, ids=["x", "y", "x"]), "each text id once, got 'x'"),
        (npz(models=MODELS, values=np.where(BITS > 1.6, np.nan, BITS)), "got nan for model"),
    ],
)
def test_an_npz_file_that_is_no_matrix_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(SpaceError) as caught:
        load(tmp_path / "m.npz")
    assert message in str(caught.value)
    assert "m.npz" in str(caught.value)
    assert not (tmp_path / "trapped").exists(), "no pickle is loaded"


def test_a_parquet_file_that_is_no_matrix_is_refused(tmp_path):
    path = tmp_path / "m.parquet"
    for content in (b"", b"PAR1", b"no parquet at all"):
        path.write_bytes(content)
        with pytest.raises(SpaceError, match=r"m\.parquet must be a Parquet file, got: .+"):
            load(path)
    for table, message in (
        (pa.table({"id": ["x"], "a": [None]}), "got None for model 'a', text 'x'"),
        (pa.table({"id": ["x"], "a": [[1.0]]}), r"got \[1.0\] for model 'a'"),
        (pa.table({"id": ["x", "y"], "a": [1.0, math.nan]}), "got nan for model 'a', text 'y'"),
        (pa.Table.from_arrays([pa.array([1.0])] * 2, ["a", "a"]), "once, got 'a' again"),
        (pa.table({"id": ["x"]}), "at least one text and one model"),
        (pa.table({"a": pa.array([], pa.float64())}), "at least one text and one model"),
    ):
        pq.write_table(table, path)
        with pytest.raises(SpaceError, match=message):
            load(path)


@pytest.mark.parametrize(
    ("text_bytes", "error", "message"),
    [
        (0.0, SpaceError, "text_bytes must be finite and above 0, got 0"),
        ("-5", SpaceError, "text_bytes must be finite and above 0, got -5"),
        ("nan", SpaceError, "text_bytes must be finite and above 0, got nan"),
        ("9 72", FileNotFoundError, "9 72"),
        ("three.txt", SpaceError, "text_bytes must be of 2 texts, got 3 in"),
        ("zero.txt", SpaceError, "text_bytes must be finite and above 0, got 0"),
        ("words.txt", SpaceError, r"words\.txt must hold a number a line, got: .*'bytes'"),
        ("binary.txt", SpaceError, r"binary\.txt must hold a number a line, got: .*utf-8"),
    ],
)
def test_bytes_that_make_no_sense_are_refused(tmp_path, text_bytes, error, message):
    files = {"three": b"1\n2\n3\n", "zero": b"1\n0\n", "words": b"bytes\n1\n", "binary": b"\xff"}
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    path = write_text(tmp_path / "m.csv", "a\n1\n2\n")
    if str(text_bytes).endswith(".txt"):
        text_bytes = tmp_path / text_bytes
    with pytest.raises(error, match=message):
        load(path, text_bytes=text_bytes)


def test_unknown_units_and_files_are_refused(tmp_path):
    path = write_text(tmp_path / "m.csv", "a\n1\n")
    with pytest.raises(ValueError, match="unit must be one of nats, bits_per_byte, got 'bits'"):
        load(path, unit="bits")
    with pytest.raises(ValueError, match=r"file must be one of \.csv, .*, got m\.xlsx"):
        load(tmp_path / "m.xlsx")
    for name in ("no.csv", "no.npz", "no.parquet"):
        with pytest.raises(FileNotFoundError, match=name):
            load(tmp_path / name)
