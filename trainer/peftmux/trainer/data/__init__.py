"""From a file of rows to padded batches: read, check, tokenise, collate."""

from peftmux.trainer.data.collate import PaddingCollator
from peftmux.trainer.data.encode import EncodedData, Example, encode_rows
from peftmux.trainer.data.pack import PackedCollator, check_packing, pack_features
from peftmux.trainer.data.preference import PreferenceCollator, encode_preferences
from peftmux.trainer.data.rows import Row, file_digest, read_rows

__all__ = [
    "EncodedData",
    "Example",
    "PackedCollator",
    "PaddingCollator",
    "PreferenceCollator",
    "Row",
    "check_packing",
    "encode_preferences",
    "encode_rows",
    "file_digest",
    "pack_features",
    "read_rows",
]
