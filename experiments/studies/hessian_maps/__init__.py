"""From a tiny Transformer on real text to partition rules: train, measure, derive, check.

``python -m experiments.studies.hessian_maps --out out/hessian`` leaves ``rules.json``, ``report.json`` and
``data/*.npz``; ``python -m paper_figures.hessian out/hessian`` draws the figures and the page from them.
"""
