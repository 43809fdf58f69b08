"""Training runs that compare partitions: config -> one run -> results."""
