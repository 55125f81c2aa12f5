"""Sequences from long tables: every kind of table and of time, and errors that name column and id."""

import csv
import datetime
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqdisent.datasets import sequences_from_table

NAN = float("nan")
ETT = Path(os.environ.get("SEQDISENT_DATA") or Path(__file__).parents[3] / "shared" / "data") / "ett" / "ETTh1.csv"


class Frame:
    """A DataFrame, as far as it is looked at."""

    def __init__(self, columns):
        self.columns = np.array(list(columns))
        self._cells = columns

    def __getitem__(self, name):
        return self._cells[name]


def write_csv(path, table):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        for row in zip(*table.values(), strict=True):
            writer.writerow("" if cell is None or cell != cell else cell for cell in row)
    return path


TABLE = {
    "who": ["b", "a", "b", "a", "b"],
    "hour": [0, 7, 2, 8, 3],
    "pulse": [60.0, 80.0, NAN, 85.0, 64.0],
    "heat": [36.5, NAN, 37.0, 38.5, 39.5],
    "dose": [0.0, 1.0, 0.5, 0.0, 2.0],
    "sex": ["m", "f", "m", "f", "m"],
    "age": [10, 9, 10, 9, 10],
}
HOW = {"columns": ["pulse", "heat"], "id": "who", "time": "hour"}


def check_the_table(data):
    assert data.names == ["b", "a"]
    assert data.lengths.tolist() == [3, 2]
    assert data.values.dtype == torch.float32
    assert data.values.tolist() == [[[60, 36.5], [0, 37], [64, 39.5]], [[80, 0], [85, 38.5], [0, 0]]]
    assert data.observed.tolist() == [
        [[True, True], [False, True], [True, True]],
        [[True, False], [True, True], [False, False]],
    ]
    assert data.covariates.tolist() == [[[0.0, 1], [0.5, 2], [2, 1]], [[1, 1], [0, 1], [0, 1]]]  # median of 2, 1, 1
    assert data.labels["sex"].tolist() == [1, 0]
    assert data.factor_names == {"sex": ("f", "m"), "age": ("9", "10")}
    assert data.labels["age"].tolist() == [1, 0]


FULL = {**HOW, "covariates": ["dose"], "labels": ["sex", "age"], "dt": True}


def test_every_kind_of_table_gives_the_same(tmp_path):
    arrays = {name: np.array(column) for name, column in TABLE.items()}
    objects = {name: np.array([None if c != c else c for c in column], object) for name, column in TABLE.items()}
    path = write_csv(tmp_path / "a.csv", TABLE)
    for table in (TABLE, arrays, objects, Frame(TABLE), path, str(path)):
        check_the_table(sequences_from_table(table, **FULL))


def test_a_csv_as_spreadsheets_write_it(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffx,y\r\n1,\r\nNA,?\r\n\r\n3,4\r\n".encode())
    data = sequences_from_table(tmp_path / "a.csv", columns=["x", "y"])
    assert data.values.tolist() == [[[1, 0], [0, 0], [3, 4]]]
    assert data.observed.tolist() == [[[True, False], [False, False], [True, True]]]
    assert data.names == ["0"]


DATES = ["2020-02-28T23:00:00", "2020-02-29 01:00", "2020-02-29T01:30"]


@pytest.mark.parametrize(
    "times",
    [
        [0, 7200, 9000],
        [5.0, 7205.0, 9005.0],
        ["100", "7300", "9100"],
        np.array([0, 7200, 9000]) + 2**60,  # whole numbers that no float tells apart from their neighbours
        DATES,
        np.array(DATES, "datetime64[s]"),
        np.array(DATES, "datetime64[ns]"),
        np.array([60, 7260, 9060], "timedelta64[s]"),
        np.array([60, 7260, 9060], "timedelta64[s]").astype("timedelta64[ns]"),
        [datetime.datetime.fromisoformat(date) for date in DATES],
    ],
    ids=lambda times: f"{type(times[0]).__name__} {times[0]}",
)
def test_every_kind_of_time_gives_the_same(times):
    table = {"t": times, "x": [1.0, 2.0, 3.0]}
    data = sequences_from_table(table, columns=["x"], time="t", dt=True)
    assert data.covariates.flatten().tolist() == [4500, 7200, 1800]
    for step in (1800, datetime.timedelta(minutes=30), np.timedelta64(30, "m")):
        data = sequences_from_table(table, columns=["x"], time="t", step=step, dt=True)
        assert data.values.flatten().tolist() == [1, 0, 0, 0, 2, 3]
        assert data.observed.tolist() == [[True, False, False, False, True, True]]
        assert data.covariates.flatten().tolist() == [1800] * 6


@given(st.data(), st.integers(0, 99))
def test_a_shuffled_table_is_sorted_and_missing_times_are_holes(data, seed):
    # the slow way: a dict of (id, time), read time by time
    rng = np.random.default_rng(seed)
    cells = data.draw(
        st.dictionaries(st.tuples(st.integers(0, 2), st.integers(-5, 9)), st.none(), min_size=1, max_size=20)
    )
    cells = {where: rng.normal() for where in cells}
    table = {
        "who": [f"p{who}" for who, _ in cells],
        "t": [0.25 * t for _, t in cells],
        "x": list(cells.values()),
    }
    found = sequences_from_table(table, columns=["x"], id="who", time="t", sort=True, step=0.25, dtype=torch.float64)
    assert found.names == list(dict.fromkeys(table["who"]))
    for row, name in enumerate(found.names):
        mine = {t: x for (who, t), x in cells.items() if f"p{who}" == name}
        steps = range(min(mine), max(mine) + 1)
        assert int(found.lengths[row]) == len(steps)
        assert found.values[row, : len(steps), 0].tolist() == [mine.get(t, 0.0) for t in steps]
        if found.observed is not None:
            assert found.observed[row, : len(steps)].tolist() == [t in mine for t in steps]
    as_they_come = sequences_from_table(table, columns=["x"], id="who", time="t", sort=True, dtype=torch.float64)
    assert as_they_come.observed is None
    assert as_they_come.lengths.tolist() == [table["who"].count(name) for name in found.names]


def test_rows_after_the_last_measurement_are_the_known_future():
    table = {"who": ["a"] * 4 + ["b"] * 3, "t": [0, 1, 2, 3, 0, 1, 2], "x": [1.0, None, 3.0, None, 5.0, None, None],
             "y": [None, 2.0, None, None, 6.0, None, None], "hour": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}  # fmt: skip
    how = {"columns": ["x", "y"], "id": "who", "time": "t", "step": 1}
    data = sequences_from_table(table, covariates=["hour"], **how)
    assert data.lengths.tolist() == [3, 1]
    assert data.observed.tolist() == [[[True, False], [False, True], [True, False]],
                                      [[True, True], [False, False], [False, False]]]  # fmt: skip
    assert data.future_covariates([0, 1], 1).flatten().tolist() == [3.0, 5.0]
    assert data.subset([1]).future_covariates([0], 2).flatten().tolist() == [5.0, 6.0]
    with pytest.raises(ValueError, match="^num_steps: got 2, expected at most 1, the known future of sequence 0 .'a'."):
        data.future_covariates([0, 1], 2)
    gaps = sequences_from_table({**table, "t": [0, 1, 3, 6, 0, 2, 3]}, dt=True, **(how | {"step": None}))
    assert gaps.lengths.tolist() == [3, 1]
    assert gaps.future_covariates([0, 1], 1).flatten().tolist() == [3.0, 2.0]
    assert sequences_from_table(table, **how).lengths.tolist() == [4, 3]  # without covariates, holes at the end


def test_sequences_know_their_columns_and_times():
    table = {"who": ["a", "a", "b", "b"], "t": [3, 7, 2, 3], "x": [1.0, 2.0, 3.0, 4.0], "y": [1.0, None, 0.0, 2.0]}
    how = {"columns": ["y", "x"], "id": "who"}
    data = sequences_from_table(table, time="t", **how)
    assert data.columns == ("y", "x")
    assert data.times.tolist() == [[0, 4], [0, 1]]
    assert sequences_from_table(table, **how).times is None
    holes = sequences_from_table({"t": [0, 6], "x": [1.0, 2.0]}, columns=["x"], time="t", step=2)
    assert holes.times.tolist() == [[0, 2, 4, 6]]
    future = {"t": [0, 1, 5], "x": [1.0, 2.0, None]}
    assert sequences_from_table(future, columns=["x"], time="t", dt=True).times.tolist() == [[0, 1]]
    dates = {"t": ["2024-01-01T00:00", "2024-01-01T02:00"], "x": [1.0, 2.0]}
    assert sequences_from_table(dates, columns=["x"], time="t").times.tolist() == [[0, 7200]]


def test_sequences_of_one_step_have_a_time_step():
    table = {"t": ["2024-01-01T00:00", "2024-01-01T02:00", "2024-01-01T05:00"], "x": [1.0, 2.0, 3.0]}
    for hour in (3600, 3600.0, datetime.timedelta(hours=1), np.timedelta64(60, "m")):
        data = sequences_from_table(table, columns=["x"], time="t", dt=hour)
        assert data.covariates.flatten().tolist() == [2.5, 2.0, 3.0]
    for wrong in (0, -1.0):
        with pytest.raises(ValueError, match="^dt: got .*, expected a positive finite number or timedelta"):
            sequences_from_table(table, columns=["x"], time="t", dt=wrong)
    for argument in ("columns", "covariates", "labels"):
        with pytest.raises(
            TypeError, match=rf"^{argument}: got the string 'x', expected a sequence of names .*\['x'\]"
        ):
            sequences_from_table(table, **{"columns": ["x"], argument: "x"})
    data = sequences_from_table({"t": [5, 9], "x": [1.0, 2.0], "i": [0, 1]}, columns=["x"], id="i", time="t", dt=True)
    assert data.covariates.flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("argument", ["columns", "covariates", "labels", "id", "time"])
def test_a_column_that_is_not_there(argument):
    what = "puls" if argument in ("id", "time") else ["puls"]
    with pytest.raises(ValueError, match=f"^{argument}: 'puls' is not in the table, expected some of .'who', 'hour'"):
        sequences_from_table(TABLE, **{**HOW, argument: what})


def changed(**columns):
    return {**TABLE, **columns}


@pytest.mark.parametrize(
    ("table", "how", "message"),
    [
        (changed(hour=[0, 7, 2, 7, 3]), {}, "^column 'hour': got 7 twice at id 'a', expected each time once"),
        (changed(hour=[3, 7, 2, 7, 3]), {"sort": True}, "^column 'hour': got 3 twice at id 'b', expected each time on"),
        (changed(hour=[0, 0, 1, 1, 2]), {"id": None}, "^column 'hour': got 0 twice, expected each time once; or id="),
        (
            changed(hour=[0, 1, 2, 0, 1]),
            {"id": None},
            "^column 'hour': got 0 after 2, expected times in order, or sort=True; or id=, the column that tells sev",
        ),
        (
            changed(hour=[0, 9, 2, 8, 3]),
            {},
            "^column 'hour': got 8 after 9 at id 'a', expected times in order, or sort",
        ),
        (changed(hour=[0.0, NAN, 2, 8, 3]), {}, "^column 'hour': got no time at id 'a'"),
        (changed(hour=[0.0, 7, 2, 8, float("inf")]), {}, "^column 'hour': got inf at id 'b'"),
        (
            changed(hour=["0", "7", "noon", "8", "9"]),
            {},
            "^column 'hour': got 'noon' at id 'b', expected a number, or a d",
        ),
        (changed(hour=["2020-01-01", "2020-01-01T00:00+01:00"] + ["2021-01-01"] * 3), {}, "^column 'hour': got .*'a'"),
        (
            changed(hour=[0.0, 7, 2, 8, 3.4]),
            {"step": 1},
            "^column 'hour': 3.4 at id 'b' is not a whole number of steps",
        ),
        (changed(hour=[0.0, 7, 2, 8, 2.0001]), {"step": 1}, "^column 'hour': 2.0001 at id 'b' is not a whole number"),
        (changed(pulse=["1", "2", "3", "high", "5"]), {}, "^column 'pulse': got 'high' at id 'a', expected a number"),
        (
            changed(pulse=np.arange(5).astype("timedelta64[ns]")),
            {},
            "^column 'pulse': got timedelta64.ns., expected num",
        ),
        (
            changed(heat=np.arange(5).astype("datetime64[ns]")),
            {},
            "^column 'heat': got datetime64.ns., expected number",
        ),
        (
            changed(dose=np.arange(5).astype("datetime64[ns]")),
            {"covariates": ["dose"]},
            "^column 'dose': got datetime64",
        ),
        (changed(hour=["2024-01-30", "20240131"] + ["2024-02-01"] * 3), {}, "^column 'hour': got '20240131' at id 'a'"),
        (changed(hour=np.array([0, 7, "NaT", 8, 3], "timedelta64[ns]")), {}, "^column 'hour': got no time at id 'b'"),
        (changed(heat=[1, 2, float("-inf"), 4, 5]), {}, "^column 'heat': got -inf at id 'b', expected a finite number"),
        (changed(who=["b", None, "b", "a", "b"]), {}, "^column 'who': got no id in row 1"),
        (TABLE, {"covariates": ["pulse"]}, "^column 'pulse': got no covariate at id 'b'"),
        (TABLE, {"covariates": ["dose"], "step": 1}, "^column 'dose': id 'b' lacks a row at some time of the regular"),
        (TABLE, {"labels": ["dose"]}, r"^column 'dose': got \['0.0', '0.5', '2.0'\] at id 'b', expected one label"),
        (changed(sex=["m", "", "m", "", "m"]), {"labels": ["sex"]}, r"^column 'sex': got \[''\] at id 'a'"),
        (changed(pulse=[1, NAN, 1, NAN, 1], heat=[1, NAN, 1, NAN, 1]), {}, "^observed: nothing .* sequence 1 .'a'."),
        (changed(pulse=[1.0]), {}, "^table: its columns have .* rows, expected as many in each"),
        ({name: [] for name in TABLE}, {}, "^table: its columns have .* rows, expected as many in each, at least one"),
        (changed(pulse=np.zeros((5, 2))), {}, r"^columns: 'pulse' has shape \(5, 2\), expected one value a row"),
        (TABLE, {"columns": []}, "^columns: got none, expected at least one"),
        (TABLE, {"step": 0}, "^step: got 0, expected a positive"),
        (TABLE, {"time": None, "step": 1}, "^time: got None, expected the column of times"),
        (TABLE, {"time": None, "sort": True}, "^time: got None"),
        (TABLE, {"time": None, "dt": True}, "^time: got None"),
    ],
)
def test_what_is_wrong_is_named(table, how, message):
    with pytest.raises(ValueError, match=message):
        sequences_from_table(table, **{**HOW, **how})


def test_what_is_no_table_is_refused(tmp_path):
    for table in ([1, 2], {}, 5):
        with pytest.raises(TypeError, match="^table: got .*, expected a DataFrame, a mapping or the path of a CSV"):
            sequences_from_table(table, columns=["x"])
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3\n")
    with pytest.raises(ValueError, match="a.csv: row 1 has 1 cells, expected 2, as in the header"):
        sequences_from_table(tmp_path / "a.csv", columns=["x"])
    (tmp_path / "a.csv").write_text("x,y,x,\n1,2,3,\n")
    with pytest.raises(ValueError, match="a.csv: got column 'x' twice in the header, expected each name once"):
        sequences_from_table(tmp_path / "a.csv", columns=["y"])
    for separator in (";", "\t", "|"):
        (tmp_path / "a.csv").write_text("x,y\n1.5,2\n".replace(",", separator).replace(".", ","))
        with pytest.raises(ValueError, match=r"a.csv: got .* between the names .*, expected commas; pandas.*sep="):
            sequences_from_table(tmp_path / "a.csv", columns=["x"])
    (tmp_path / "a.csv").write_text("x\n1\n")
    assert sequences_from_table(tmp_path / "a.csv", columns=["x"]).values.item() == 1
    with pytest.raises(TypeError, match="^values: got torch.float16"):
        sequences_from_table(TABLE, **HOW, dtype=torch.float16)


@pytest.mark.skipif(not ETT.is_file(), reason=f"no {ETT}; SEQDISENT_DATA says where it is")
def test_a_year_of_electricity():
    columns = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    data = sequences_from_table(ETT, columns=columns, time="date", step=3600)
    assert repr(data) == "Sequences(1 sequences of 17420 steps, 7, 1 identities)"
    assert data.observed is None
    np.testing.assert_allclose(
        data.values[0], np.loadtxt(ETT, np.float32, delimiter=",", skiprows=1, usecols=range(1, 8))
    )
