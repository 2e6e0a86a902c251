"""Installed as sitecustomize.py of LIBERO's environment only: where its paths are written down, or it asks for them on the keyboard."""
import os
import sys

os.environ.setdefault("LIBERO_CONFIG_PATH", os.path.join(sys.prefix, "libero_config"))
