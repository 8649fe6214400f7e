"""One HTML file of runs and sweeps, with results.csv and results.parquet beside it."""
