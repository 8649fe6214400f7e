"""Many students from one store: trials as subprocesses, scheduled by dask.distributed."""
