"""Other libraries' models and formats; each library is imported when it is asked for, and not before."""
