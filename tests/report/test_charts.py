"""Where a chart draws what."""

from __future__ import annotations

from lora_lightning.report.charts import panels, scatter
from lora_lightning.report.history import History


def test_the_numbers_of_an_axis_stand_where_the_dots_of_these_values_are() -> None:
    plot = scatter([(0.0, 4.0), (8.0, 2.0)], count=2)
    assert plot is not None
    places = dict(plot.ticks)
    assert places["8"] == max(dot.x for dot in plot.dots)
    assert places["4"] == plot.dots[0].y
    assert places["2"] == plot.dots[1].y
    assert min(places.values()) == 0


def test_a_curve_of_many_steps_ends_with_the_last_one() -> None:
    (panel,) = panels(History({step: {"train/loss": 1 / (step + 1)} for step in range(1002)}))
    places = panel.lines[0].points.split()
    assert len(places) < 300
    assert places[0] == "0.0,0.0"
    assert places[-1] == "100.0,100.0"
