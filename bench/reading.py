"""How fast a stream's images are read and decoded, on one core: what a large training needs of its processors.

python bench/reading.py
"""

import io
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as Pictures

from innermax.data.decoding import Row, read_pixels

SIDE, IMAGES, ROUNDS = 224, 100, 5


def pictures() -> list[bytes]:
    """JPEGs of about 20 kB each: large shapes with noise, which is what makes a photograph's file large."""
    random = np.random.default_rng(0)
    encoded = []
    for _ in range(IMAGES):
        shapes = Pictures.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        noisy = np.asarray(shapes) + random.normal(0, 12, (SIDE, SIDE, 3))
        file = io.BytesIO()
        Pictures.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


def main() -> None:
    encoded = pictures()
    rows = [Row(str(number), data, 0) for number, data in enumerate(encoded)]
    decoding, reading = [], []
    with tempfile.TemporaryDirectory() as folder:
        columns = {"image": [{"bytes": data, "path": None} for data in encoded * 20], "label": [0] * 20 * IMAGES}
        kinds = Features({"image": Image(), "label": Value("int64")})
        Dataset.from_dict(columns, kinds).to_parquet(Path(folder) / "train.parquet")
        stream = load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", streaming=True).decode(False)
        for _ in range(ROUNDS):
            began = time.process_time()
            read_pixels(rows, (SIDE, SIDE), "RGB")
            decoding.append(IMAGES / (time.process_time() - began))
            began = time.process_time()
            read = sum(1 for _ in stream.shuffle(seed=0, buffer_size=500))
            reading.append(read / (time.process_time() - began))
    size = np.mean([len(data) for data in encoded]) / 1e3
    print(f"{size:.0f} kB an image; images a second of one core, best of {ROUNDS}:")
    print(f"decoded {max(decoding):,.0f}, read {max(reading):,.0f}")


if __name__ == "__main__":
    main()
