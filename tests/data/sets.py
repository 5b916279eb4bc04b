"""Small sets of images whose colours encode their row numbers."""

import io
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from improved_ldm.data.sources import RowStream


def encode(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(index, size=(6, 5)):
    """An image whose colour encodes its row number."""
    return encode(Image.new("RGB", size, (index % 256, index // 256, 7)))


def write_parquet(path, indices, damaged=(), row_group=7):
    images = [{"bytes": b"no image" if i in damaged else picture(i), "path": None} for i in indices]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["even", "odd"]),
        }
    )
    table = pa.table(
        {"image": images, "text": [f"row {i}" for i in indices], "label": [i % 2 for i in indices]},
        schema=features.arrow_schema,
    )
    pq.write_table(table, path, row_group_size=row_group)


def number(row):
    """The row number, decoded from the pixels."""
    red, green, _ = row.image.getpixel((0, 0))
    return red + 256 * green


def numbers(rows, **arguments):
    return [number(row) for row in RowStream(rows, repeat=False, **arguments)]


def write_shard(path, indices, captions):
    with tarfile.open(path, "w") as tar:
        for i in indices:
            for suffix, content in {"png": picture(i), **captions(i)}.items():
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
