"""How figures are written."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from paper_figures.style import plt, save, setup


def test_a_figure_is_laid_out_once_and_written_twice(tmp_path: Path) -> None:
    setup()
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.set_ylabel("two lines\nof a label")
    before, draw, drawn = axes.get_position().x0, axes.draw, []
    axes.draw = lambda renderer: drawn.append(renderer) or draw(renderer)  # type: ignore[method-assign]
    path = save(figure, tmp_path, "figure")
    assert axes.get_position().x0 != before and figure.get_layout_engine() is None and len(drawn) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.pdf", "figure.png"]
    with Image.open(path) as picture:
        assert picture.size == (390, 260)
