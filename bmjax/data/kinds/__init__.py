"""The kinds of data that `load_dataset` reads: one file for each."""
