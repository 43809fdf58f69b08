"""Studies: each is a command that makes several related measurements."""
