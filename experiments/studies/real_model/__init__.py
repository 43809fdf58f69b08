"""Measure the Hessian of a real language model, SmolLM2-135M-Instruct, by products alone.

``python -m experiments.studies.real_model`` measures what ``plan`` lists and writes ``results/real_model/*.json``, from
which ``python -m paper_figures.real_model`` draws the figures and writes the tables of docs/real_model.md. The study
takes any language model: see ``subject.Subject``.
"""
