"""Tables as text: columns below each other, rules, Markdown."""

from ssprop_patch import _text

ROWS = [("layer", "n", "why"), ("conv1", "12", ""), ("a", "3", "small")]


def test_columns_stand_below_each_other_and_nothing_trails():
    assert _text.aligned(ROWS, "lr") == ["layer   n    why", "conv1  12", "a       3  small"]
    assert _text.aligned(ROWS, "lrl") == ["layer   n  why", "conv1  12", "a       3  small"]


def test_rules_stand_below_the_head_and_above_a_total():
    lines = _text.table(ROWS, "lrl", total=True).splitlines()
    assert [set(line) == {"-"} for line in lines] == [False, True, False, True, False]
    assert {len(line) for line in lines if set(line) == {"-"}} == {len("a       3  small")}
    assert _text.table(ROWS, "lrl").count("-\n") == 1


def test_markdown_says_what_is_aligned_at_the_right():
    assert _text.markdown(ROWS, "lrl").splitlines()[1:3] == [
        "| --- | ---: | --- |",
        "| conv1 | 12 |  |",
    ]


def test_one_thing_is_not_several():
    assert [_text.counted(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]


def test_one_line_is_one_of_bearable_length():
    assert _text.one_line("a\n  b\t c") == "a b c"
    assert _text.one_line("x" * 20, limit=10) == "x" * 7 + "..."
