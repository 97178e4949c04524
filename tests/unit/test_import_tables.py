"""Tables as other programs write them: with blanks, as bytes, in another shape."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llfast import SpaceError
from llfast.importing import import_matrix


def load(path):
    return import_matrix(path, unit="bits_per_byte", text_bytes=972.0)


def test_no_thread_outlives_the_reading_of_a_parquet_file(tmp_path):
    """One that lets go of Python's file while Python ends would abort the process."""
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"id": ["x", "y"], "a": [0.5, 0.6]}), path)
    code = (
        "import os, sys, pyarrow.parquet; from llfast.importing import import_matrix\n"
        "before = os.listdir('/proc/self/task')\n"
        "import_matrix(sys.argv[1], unit='bits_per_byte', text_bytes=972)\n"
        "print(len(os.listdir('/proc/self/task')) - len(before))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert told.stdout == "0\n"


def test_blanks_around_a_name_are_no_part_of_it(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("id, org/a ,\"('f', 'b')\"\nx, 0.5, 0.6\n")
    matrix = load(path)
    assert matrix.models == ("org/a", "b")
    assert matrix.metadata == ({}, {"family": "f"})


def test_ids_that_are_bytes_are_what_they_spell(tmp_path):
    table = pa.table({"id": pa.array(["x", "é"]).cast(pa.binary()), "a": [0.5, 0.6]})
    pq.write_table(table, tmp_path / "m.parquet")
    assert load(tmp_path / "m.parquet").ids == ("x", "é")


@pytest.mark.parametrize("name", ["models", "ids", "families"])
def test_names_in_a_table_of_their_own_are_refused(tmp_path, name):
    names = np.array([["a"], ["b"]])  # as a table with one column has them
    arrays = {"models": ["a", "b"], "values": np.ones((2, 2))} | {name: names}
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(SpaceError, match=rf"m\.npz must .*, got: {name} of shape \(2, 1\)"):
        load(tmp_path / "m.npz")
