"""The sweep's figure shows means and the spread over seeds."""

import numpy as np

from lvlm_prune.report.figures.sweeps import retention_curve


def test_lines_are_means_and_bands_the_spread():
    figure = retention_curve({"ATV": {60.0: [0.4, 0.6], 50.0: [0.8, 0.9]}, "Wanda": {50.0: [0.7]}}, "sparsity (%)")
    (axes,) = figure.axes
    atv, wanda = axes.get_lines()
    np.testing.assert_allclose(atv.get_xydata(), [[50, 85], [60, 50]])
    np.testing.assert_allclose(wanda.get_xydata(), [[50, 70]])
    (band,) = axes.collections
    np.testing.assert_allclose(sorted(set(band.get_paths()[0].vertices[:, 1])), [40, 60, 80, 90])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ATV", "Wanda"]
    assert axes.get_xlabel() == "sparsity (%)"
    assert axes.get_ylim()[1] > 94, "markers at the top are whole"
