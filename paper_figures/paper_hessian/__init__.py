"""Figures and tables of docs/paper_hessian.md.

python -m paper_figures.paper_hessian [--results results/paper_hessian] [--docs docs/paper_hessian.md]
"""
