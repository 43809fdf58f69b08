"""Training runs that compare partitions. A config defines one run, and a run writes one folder of results."""
