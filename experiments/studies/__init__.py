"""Studies: several measurements that belong together, each a command of its own."""
