"""The webdataset library as an independent reader of shards."""

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import webdataset


def read_with_webdataset(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Samples as the library decodes them: "__key__", "png" (PIL, RGB), "json" (dict), "cls" (int) if there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        dataset = webdataset.WebDataset(
            [str(path) for path in paths], shardshuffle=False, handler=webdataset.reraise_exception
        )
        samples = list(dataset.decode("pil"))
        del dataset
        gc.collect()
    return samples
