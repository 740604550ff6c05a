"""Networks of the SAM-ON paper that timm does not have. Importing this registers them with timm."""
from . import cifar as cifar
