"""Data-set layouts → `Sample` records: one module a layout (or a few like ones); `detect.open_source` finds it."""
