"""YOLOv8 students: ultralytics' own trainer, with the distillation term and the geometry of its augmentations."""

# Sets ultralytics' environment, before a module of this package imports it.
import train.students.offline  # noqa: F401
