"""From a file of rows to padded batches: read, check, tokenise, collate."""

from peftmux.trainer.data.collate import PaddingCollator
from peftmux.trainer.data.encode import EncodedData, Example, encode_rows
from peftmux.trainer.data.rows import Row, file_digest, read_rows

__all__ = ["EncodedData", "Example", "PaddingCollator", "Row", "encode_rows", "file_digest", "read_rows"]
