"""Image-caption pairs for training: emoji drawn from installed packages, a CSV of files, or webdataset shards.

`open_data` checks everything that can be checked before training and returns `ImageTextData`. What it needs beyond
torch is imported when it is used: the packages of ``pip install 'mlip_kernels[train]'``.
"""

from mlip_kernels.data.batch import Batch
from mlip_kernels.data.config import DataConfig
from mlip_kernels.data.loading import ImageTextData, open_data

__all__ = ["Batch", "DataConfig", "ImageTextData", "open_data"]
