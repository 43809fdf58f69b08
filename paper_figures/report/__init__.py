"""A site of the committed results, to look at: ``python -m paper_figures.report`` writes ``out/report/index.html``."""
