"""Figures: what is drawn, read off the axes."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from lowrank_sp import plot


@pytest.fixture(params=[False, True], ids=["new", "given"])
def ax(request):
    return Figure().subplots() if request.param else None


def drawn(axes, ax):
    """The axes, drawn once, so that no artist is broken."""
    assert ax is None or axes is ax
    axes.figure.canvas.draw()
    return axes


def test_spectrum(ax, xp):
    s = np.array([3.0, 2.0, 1.0])
    axes = drawn(plot.spectrum({"a": xp.asarray(s), "b": s}, rank=2, ax=ax), ax)
    assert np.array_equal(axes.lines[0].get_ydata(), s)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b", "rank 2"]


def test_spectra_of_many_layers_are_told_apart_by_kind():
    s = 2.0 ** -np.arange(20)
    axes = drawn(plot.spectrum({f"{i}.{k}": s for i in range(5) for k in "qv"}, rank=8), None)
    lines = {text.get_text() for text in axes.get_legend().get_texts()}
    assert lines == {"q (5)", "v (5)", "rank 8"}
    assert len({line.get_color() for line in axes.lines[:-1]}) == 2
    assert [t.get_text() for t in axes.get_xticklabels()][1:6] == ["1", "2", "4", "8", "16"]
    many = plot.spectrum({f"matrix {i}": s for i in range(30)})
    assert [text.get_text() for text in many.get_legend().get_texts()] == ["all (30)"]


def test_spectrum_of_zeros():
    axes = drawn(plot.spectrum({"zero": np.zeros(3), "one": np.array([1.0, 0.0])}), None)
    assert [len(line.get_ydata()) for line in axes.lines] == [0, 1]
    drawn(plot.spectrum({"zero": np.zeros(3)}, rank=1), None)


def test_phase_diagram(ax):
    records = [
        {"rank": rank, "share": share, "error": 1e-9 if trial < share * 4 else 0.1}
        for rank in (3, 1)
        for share in (0.75, 0.25)
        for trial in range(4)
        if (rank, share) != (3, 0.25)
    ]
    axes = drawn(plot.phase_diagram(records, "rank", "share", ax=ax), ax)
    image = axes.images[0].get_array().filled(np.nan)
    assert np.array_equal(image, [[0.25, np.nan], [0.75, 0.75]], equal_nan=True)
    assert axes.images[0].get_clim() == (0.0, 1.0)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "3"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0.25", "0.75"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rank", "share")
    assert not axes.yaxis_inverted()


def test_phase_diagram_of_words():
    records = [{"mask": m, "rank": 1, "error": 0.0} for m in ("uniform", "power-law")]
    axes = drawn(plot.phase_diagram(records, "mask", "rank"), None)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["power-law", "uniform"]


@pytest.mark.parametrize("against", ["step", "seconds"])
def test_convergence(against, ax):
    records = [
        {"solver": name, "step": k, "seconds": 0.1 * k, "error": 10.0**-k}
        for name in ("als", "irls")
        for k in (1, 2, 3)
    ]
    axes = drawn(plot.convergence(records, against=against, ax=ax), ax)
    assert len(axes.lines) == 2
    assert np.allclose(axes.lines[0].get_xdata(), [r[against] for r in records[:3]])
    assert np.allclose(axes.lines[1].get_ydata(), [0.1, 0.01, 0.001])
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == against


def test_recovered_spectrum(ax, xp):
    truth = np.array([4.0, 2.0, 1.0, 0.0])
    found = {"short": np.array([4.1]), "long": xp.asarray(np.array([4.0, 2.0, 0.9, 0.1, 0.05]))}
    axes = drawn(plot.recovered_spectrum(found, xp.asarray(truth), ax=ax), ax)
    diagonal, short, long = axes.lines
    assert np.array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert (short.get_xdata().tolist(), short.get_ydata().tolist()) == ([4.0], [4.1])
    assert np.array_equal(long.get_ydata(), [4.0, 2.0, 0.9, 0.1, 0.05])
    assert np.array_equal(long.get_xdata()[:3], truth[:3])
    assert np.all(long.get_xdata()[3:] < 1.0)


def test_recovered_spectrum_of_equal_values():
    axes = drawn(plot.recovered_spectrum({"a": np.ones(3)}, np.ones(2)), None)
    assert axes.lines[1].get_xdata().tolist() == [1.0, 1.0, 0.5]
