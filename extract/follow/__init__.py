"""A store follows a changed data set: what changed, and the new version."""
