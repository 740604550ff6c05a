"""What setup.cfg cannot say: the recipes lie at the top of the clone, and inside the installed package."""
from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["timm_sam*"]), "timm_sam.hparams"], package_dir={"timm_sam.hparams": "hparams"})
