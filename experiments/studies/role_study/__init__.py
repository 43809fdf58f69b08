"""Which measured number predicts the loss that sharing second moments costs, role by role? See docs/role_study.md.

python -m experiments.studies.role_study                 # train; finished runs are not repeated
python -m experiments.studies.role_study --dry-run       # how many runs are left, and about how long they take
python -m experiments.studies.role_study --criteria      # compute the criteria from the stored second moments
python -m experiments.studies.role_study --rules         # write the rules that the runs choose: the shipped `derived`
"""
