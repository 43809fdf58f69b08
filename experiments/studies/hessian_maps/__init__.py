"""Derive partition rules from the Hessians of tiny Transformers that are trained on real text.

``python -m experiments.studies.hessian_maps --out out/hessian`` trains the models, measures their Hessians, derives
rules and checks them by training. It writes ``rules.json``, ``report.json`` and ``data/*.npz``, from which
``python -m paper_figures.hessian out/hessian`` draws the figures and the page.
"""
