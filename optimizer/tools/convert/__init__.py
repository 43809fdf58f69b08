"""Convert state of other optimizers, and of ``AdamMini`` under other rules, to state of ``AdamMini``."""
