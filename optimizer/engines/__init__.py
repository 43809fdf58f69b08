"""Ways to take a step: eager torch operations (``optimizer.update``), and a native loop for CPUs."""
