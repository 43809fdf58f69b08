"""States of other partitions and other optimizers, made ours."""
