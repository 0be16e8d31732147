"""The machine: its devices, memory, processes, signals and caches."""
