"""What figures show: epochs as whole numbers, legends that are not cut off, names that do not cover each other."""
import pytest
from support.reports import checkpoint, sam, tables_of, write_results, write_run

pytest.importorskip('matplotlib')

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from timm_sam.evaluation.evaluated import read_evaluations
from timm_sam.report import plots, reliability
from timm_sam.report.evaluations import join


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, laid out."""
    figures = []

    def saved(figure, path, **options):
        FigureCanvasAgg(figure).draw()
        figures.append(figure)
    monkeypatch.setattr(Figure, 'savefig', saved)
    return figures


@pytest.mark.full
@pytest.mark.parametrize('epochs', [1, 2, 3, 5, 26])
def test_epochs_are_whole_numbers_and_both_losses_are_told_apart(tmp_path, drawn, epochs):
    for name, options in (('plain', {}), ('sam', sam(0.1)), ('on', sam(1, params='onlynorm'))):
        write_run(tmp_path / 'runs' / name, [50.0] * epochs, epochs=epochs, **options)
    (table,), _ = tables_of(tmp_path / 'runs')
    assert plots.draw('loss', table, 'last', 'x.png')
    (figure,) = drawn
    for ax in figure.axes:
        low, high = ax.get_xlim()
        ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) for tick in ticks)
        # a curve of a single epoch has no line: its marker has to say what it is
        looks = [(line.get_color(), line.get_marker(), line.get_fillstyle()) for line in ax.get_lines()]
        assert len(set(looks)) == len(looks) == 5 and all(marker != 'None' for _, marker, _ in looks)


@pytest.mark.full
def test_legends_are_not_cut_off(tmp_path, drawn):
    cells = [{}, *(sam(0.1, variant='elementwise_l2_orig', params=params) for params in ('all', 'onlynorm', 'nonorm'))]
    checkpoints = [checkpoint(write_run(tmp_path / 'runs' / str(i), opt='an_optimizer_of_a_rather_long_name', **cell))
                   for i, cell in enumerate(cells)]
    file = write_results(tmp_path / 'r.json', checkpoints, [0, 1, 2, 3])
    (table,), runs = tables_of(tmp_path / 'runs')
    for kind in ('rho', 'loss'):
        assert plots.draw(kind, table, 'last', 'x.png')
    assert reliability.draw(table, join(runs, read_evaluations([str(file)]), 'last'), 'x.png')
    assert len(drawn) == 3
    for figure in drawn:
        (legend,) = figure.legends
        box, whole = legend.get_window_extent(), figure.bbox
        assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0
        assert all(box.y1 <= ax.get_window_extent().y0 for ax in figure.axes)
