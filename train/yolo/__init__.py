"""YOLOv8 students: ultralytics' own trainer, with the distillation term and the geometry of its augmentations.

Importing this package only sets environment variables, before any module of it imports ultralytics: offline, no
installing of packages, no banners, settings apart from the user's own.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ.setdefault("YOLO_VERBOSE", "false")
_settings = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-distill" / "ultralytics"
os.environ.setdefault("YOLO_CONFIG_DIR", str(_settings))
