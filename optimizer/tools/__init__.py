"""The tools for a shell or a notebook: explain, verify, plan and convert."""
