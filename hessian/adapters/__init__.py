"""Other libraries' answers to the same questions, as cross-checks only."""
