"""The tables: mean and spread over seeds, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from classifier.table import spread
from rich.table import Table

from ssprop_patch._text import markdown as markdown_table
from study.equal_cost import Cost, above_dense, text
from study.groups import Condition, Method

_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def cells(condition: Condition) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, and the cells of each method."""
    most = max(method.mean("total_flops") for method in condition.methods)
    flop, unit = next((u for u in _UNITS if most >= u[0]), _UNITS[-1])

    def column(name: str, factor: float, form: str) -> Callable[[Method], str]:
        return lambda method: spread([v * factor for v in method.values(name)], form)

    def against(partner: Callable[[Method], Method | None]) -> Callable[[Method], str]:
        def cell(method: Method) -> str:
            other = partner(method)
            above = [] if other is None else method.above(other, "accuracy")
            return spread([100 * value for value in above], "+.2f") if above else ""

        return cell

    def flops_of_dense(method: Method) -> str:
        dense = condition.dense(method)
        return (
            "" if dense is None else f"{method.mean('total_flops') / dense.mean('total_flops'):.3f}"
        )

    columns: dict[str, Callable[[Method], str]] = {
        "method": lambda method: method.label,
        "seeds": lambda method: str(len(method.rows)),
        "epochs": lambda method: f"{method.mean('trained_epochs'):.4g}",
        "accuracy, %": column("accuracy", 100, ".2f"),
        "- dense": against(condition.dense),
        "- equal compute": against(condition.equal_compute),
        "best, %": column("best_accuracy", 100, ".2f"),
        "test loss": column("test_loss", 1, ".3f"),
        "train, %": column("train_accuracy", 100, ".1f"),
        unit: column("total_flops", 1 / flop, ".4g"),
        "of dense": flops_of_dense,
        "seconds": column("train_s", 1, ".1f"),
    }
    costs: dict[str, Cost] = {"FLOPs": "total_flops", "seconds": "train_s"}
    for name, cost in costs.items():
        if any(above_dense(condition, method, cost) for method in condition.methods):
            columns[f"- dense, equal {name}"] = lambda method, cost=cost: text(
                above_dense(condition, method, cost)
            )
    return list(columns), [
        [cell(method) for cell in columns.values()] for method in condition.methods
    ]


def build(condition: Condition) -> Table:
    """Return the table of one condition for the terminal."""
    names, lines = cells(condition)
    table = Table(
        title=condition.label,
        title_justify="left",
        caption_justify="left",
        caption=_machine(condition),
    )
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    for line in lines:
        table.add_row(*line)
    return table


def markdown(conditions: Sequence[Condition], name: str) -> str:
    """Return all tables of a study as Markdown, and what their columns mean."""
    parts = [f"# {name}\n"]
    for condition in conditions:
        names, lines = cells(condition)
        parts.append(f"## {condition.label}\n")
        parts.append(markdown_table([names, *lines], "lr") + "\n")
        parts.append(_machine(condition) + "\n")
    parts.append(LEGEND + "\n")
    return "\n".join(parts)


LEGEND = (
    "Mean ± sample standard deviation over the seeds. accuracy: on the test images after the last "
    "step. - dense: points above the dense training of as many epochs with the same regularisers "
    "(for a dense training with others: above the first one); - equal compute: above the dense "
    "training of the same FLOPs, or the nearest within 2 %; both seed by seed. - dense, equal "
    "FLOPs, - dense, equal seconds: above dense training stopped at the same FLOPs or seconds, "
    "interpolated between the dense trainings of the same seed; ± half of the mean's 95 % interval "
    "(Student's t). best: the best accuracy of any evaluation, chosen on the test images and so "
    "too high. train: accuracy on the training images after the last step, without augmentation. "
    "FLOP: forward and backward of the whole training, convolutions and matrix products; of dense: "
    "as a share of the dense training's. seconds: all steps, without evaluation, warm-up counted "
    "as the median step; no measurement where the machine did something else as well."
)


def _machine(condition: Condition) -> str:
    """Return what the runs ran on; each thing once."""
    rows = [row for method in condition.methods for row in method.rows.values()]

    def each(text: Callable[[Mapping[str, str]], str]) -> str:
        return " and ".join(dict.fromkeys(text(row) for row in rows))

    threads = each(lambda r: f"threads: {r['threads']}, processes at a time: {r['jobs']}")
    return (
        f"{each(lambda r: r['train_images'])} training and {each(lambda r: r['test_images'])} test "
        f"images ({each(lambda r: r['origin'])}); {each(lambda r: r['device_name'])}, {threads}; "
        f"torch {each(lambda r: r['torch'])}, ssprop_patch {each(lambda r: r['ssprop_patch'])}."
    )
