"""From a file of rows to padded batches: read, check, tokenise, collate."""

from peftmux.trainer.data.collate import PaddingCollator
from peftmux.trainer.data.encode import EncodedData, Example, encode_rows
from peftmux.trainer.data.labelled import LabelledExample, Task, encode_labelled, label_names
from peftmux.trainer.data.pack import PackedCollator, pack_features
from peftmux.trainer.data.preference import PreferenceCollator, encode_preferences
from peftmux.trainer.data.rows import Row, file_digest, read_rows

__all__ = [
    "EncodedData",
    "Example",
    "LabelledExample",
    "PackedCollator",
    "PaddingCollator",
    "PreferenceCollator",
    "Row",
    "Task",
    "encode_labelled",
    "encode_preferences",
    "encode_rows",
    "file_digest",
    "label_names",
    "pack_features",
    "read_rows",
]
