"""The rows that bench_conv.py and bench_step.py write."""

from __future__ import annotations

from dataclasses import replace

import bench_conv
import bench_step
import pytest
import rows as schema

from .made_up_rows import SETTING, compared


def test_rows_hold_shares_and_limits():
    found = {(r.side, r.mode): r for r in compared()}
    backward, step = found["sparse", "backward"], found["sparse", "step"]
    assert (backward.p20_ms, backward.p50_ms, backward.p80_ms) == (700, 800, 1100)
    assert backward.share_of_dense == 0.4 and backward.limit_ms == 500
    assert backward.limit == pytest.approx(0.25)
    assert step.share_of_dense == 0.625 and step.limit_ms == 4000 - 1500
    assert found["sparse", "forward"].limit_ms is None is found["sparse", "forward"].limit
    assert [found["dense", m].limit for m in ("backward", "step")] == [1.0, 1.0]
    assert {key: r.peak_memory_mib for key, r in found.items() if r.peak_memory_mib} == {
        ("dense", "step"): 7.5
    }
    assert {r.kernel for r in found.values() if r.side == "sparse"} == {"gather"}


def test_rows_come_back_from_the_file_and_more_are_appended(tmp_path):
    file = tmp_path / "times.csv"
    first, second = compared(), compared(replace(SETTING, name="other", options="compiled"))
    schema.append(file, first)
    schema.append(file, second)
    assert schema.read(file) == first + second
    lines = file.read_text().splitlines()
    assert lines[0].split(",") == list(schema.FIELDS) and len(lines) == 1 + len(first + second)


def test_an_unfinished_row_is_not_read_and_cut_off_by_the_next(tmp_path):
    file, rows = tmp_path / "times.csv", compared()
    schema.append(file, rows)
    whole = file.read_bytes()
    header = whole.index(b"\n") + 1
    for end in (1, header - 1, header, header + 5, len(whole) - 9, len(whole)):
        file.write_bytes(whole[:end])
        kept = rows[: max(0, whole[:end].count(b"\n") - 1)]
        if end >= header:
            assert schema.read(file) == kept
        schema.table(file).check()
        schema.append(file, rows)
        assert schema.read(file) == kept + rows


def test_file_with_other_columns_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "times.csv"
    header = [name for name in schema.FIELDS if name != "limit_ms"] + ["limit"]
    for columns, message in (
        (header, "without limit_ms; with limit"),
        (schema.FIELDS[::-1], "in another order"),
    ):
        file.write_text(before := ",".join(columns) + "\n")
        for use in (schema.read, lambda path: schema.append(path, compared())):
            with pytest.raises(ValueError, match=message):
                use(file)
        assert file.read_text() == before
    with pytest.raises(ValueError, match="there is no folder"):
        schema.append(tmp_path / "missing" / "times.csv", compared())
    with pytest.raises(ValueError, match="there is no file"):
        schema.read(tmp_path / "missing.csv")


@pytest.mark.parametrize("cut", [lambda line: line.rpartition(",")[0], lambda line: line[5:]])
def test_broken_line_is_named(cut, tmp_path):
    file = tmp_path / "times.csv"
    schema.append(file, [replace(compared()[1], name="x" * 5, iterations=3)])
    text = file.read_text().splitlines()
    good = schema.read(file)
    assert len(good) == 1
    file.write_text("\n".join([*text, cut(text[1]).replace(",3,1,", ",?,1,")]) + "\n")
    with pytest.raises(ValueError, match=r"times.csv, line 3"):
        schema.read(file)


@pytest.mark.parametrize("bench, what", [(bench_conv, "--layer"), (bench_step, "--network")])
def test_nothing_is_measured_for_a_file_that_cannot_be_appended_to(
    bench, what, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "times.csv"
    file.write_text("name,limit\n")
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        bench.main(["--output", str(file)])
    assert stop.value.code == 2 and "has other columns" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        bench.main([what, "nothing"])
    assert stop.value.code == 2 and "nothing" in capsys.readouterr().err
