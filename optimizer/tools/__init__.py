"""What a user asks from a shell or a notebook: explain, verify, plan, convert."""
