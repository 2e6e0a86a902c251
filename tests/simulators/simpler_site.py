"""Installed as sitecustomize.py of the environment of ManiSkill3 only: where its assets are, beside the environment's packages and not in the home folder."""
import os
import sys

os.environ.setdefault("MS_ASSET_DIR", os.path.join(sys.prefix, "assets"))
