"""How things are measured, for the commands and the benchmarks: clocks, facts of the machine, and a progress bar."""
