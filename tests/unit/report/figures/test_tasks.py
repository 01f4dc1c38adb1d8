"""Bars of tasks: each task has its own number, whatever the order in which a checkpoint's scores come."""

from lvlm_prune.report.figures.tasks import task_bars


def test_a_bar_stands_at_its_task_and_its_number_beside_it():
    values = {"pruned": {"colour": 98.0, "count": 51.5}, "recovered": {"count": 80.0, "colour": 100.0}}
    axes = task_bars(values, "retained (%)").axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    found = {}
    for (name, _), bars in zip(values.items(), axes.containers, strict=True):
        for bar in bars:
            found[name, names[round(bar.get_y() + bar.get_height() / 2)]] = bar.get_width()
    assert found == {(name, task): value for name, of in values.items() for task, value in of.items()}
    numbers = {(round(text.xyann[0]), text.xy[0], names[round(text.xy[1])], text.get_text()) for text in axes.texts}
    assert (3, 80.0, "count", "80.0") in numbers
    assert (3, 100.0, "colour", "98.0") in numbers, "behind the line at 100, not across it"
