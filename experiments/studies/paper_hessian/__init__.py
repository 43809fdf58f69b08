"""The Adam-mini paper's experiments with Hessians, made again and extended. See docs/paper_hessian.md.

python -m experiments.studies.paper_hessian                          # all parts; finished cells are not repeated
python -m experiments.studies.paper_hessian --dry-run                # the cells that are left, and planned minutes
python -m experiments.studies.paper_hessian --only leave_out         # one part
python -m experiments.studies.paper_hessian --profile smoke --out out/smoke

The parts are ``quadratics`` (three-block quadratics), ``diagonal_gain`` (r against tau), ``one_scalar`` (where one
scalar per block loses), ``matrices`` (where a factored second moment stands), ``classes`` (multi-layer perceptrons with
C classes), ``leave_out`` (one searched rate for left-out blocks of a Transformer), ``structure`` (heads, rows and
columns along training and across models) and ``spectra`` (spectra of blocks, Transformer against CNN).
"""
