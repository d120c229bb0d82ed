"""What loading training images costs, beside torchvision and tf.data.

    python -m benchmarks.input DIRECTORY_OF_JPEGS

Reads the files again and again, as a data set of 10,000 or more: decoded,
cropped at random and resized to 224x224, flipped, batched, uint8. Each loader
runs in a process of its own that is held to one core, in turns with the others;
the figures are medians over the rounds. What is not installed is left out.
torchvision is measured twice, with Pillow and with its own decoder and tensors;
both antialias, tf.data as it is commonly used does not. Linux. The last line is
a JSON object.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

BATCH = 50
SIZE = 224
# Grain shuffles a data set of a hundred files slowly, 0.14 ms an image.
EXAMPLES = 10_000


def ours(files):
    from densenet_jax.data import pipeline
    from densenet_jax.data.images import ImageFile
    from densenet_jax.data.preprocessing import Preprocessing

    class Files:
        def __len__(self):
            return len(files)

        def __getitem__(self, index):
            data = Path(files[index]).read_bytes()
            return {"image": ImageFile(data, 3, files[index]), "label": 0}

    preprocessing = Preprocessing(
        mean=(0.0,),
        std=(1.0,),
        image_size=SIZE,
        random_resized_crop=True,
        flip=True,
    )
    return pipeline.train_batches(
        Files(), preprocessing.train, batch_size=BATCH, seed=0
    )


def torchvision_pillow(files):
    from PIL import Image
    from torchvision import transforms

    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    return _data_loader(
        files, lambda file: augment(Image.open(file).convert("RGB"))
    )


def torchvision_tensors(files):
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    augment = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    return _data_loader(
        files, lambda file: augment(decode_image(file, ImageReadMode.RGB))
    )


def _data_loader(files, read):
    import torch

    torch.set_num_threads(1)

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, index):
            return read(files[index]), 0

    loader = torch.utils.data.DataLoader(
        Files(), batch_size=BATCH, shuffle=True, drop_last=True
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def tf_data(files):
    import tensorflow as tf

    def augment(file):
        data = tf.io.read_file(file)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data),
            tf.zeros([0, 0, 4]),
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], axis=0)
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, [SIZE, SIZE])
        image = tf.image.random_flip_left_right(image)
        return tf.cast(image, tf.uint8), 0

    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files))
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    data = data.repeat().map(augment).batch(BATCH).with_options(options)
    return iter(data.as_numpy_iterator())


LOADERS = {
    "ours": (ours, "grain"),
    "torchvision, Pillow": (torchvision_pillow, "torchvision"),
    "torchvision, tensors": (torchvision_tensors, "torchvision"),
    "tf.data": (tf_data, "tensorflow"),
}


def _serve(pipe, name, files):
    """Measures images a second whenever asked to."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    make, _ = LOADERS[name]
    while count := pipe.recv():
        batches = make(files)
        # Starts what there is to start; from here to the last batch as many
        # begin as end.
        next(batches)
        began = time.perf_counter()
        for _ in range(count):
            next(batches)
        pipe.send(count * BATCH / (time.perf_counter() - began))
        getattr(batches, "close", lambda: None)()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=7, help="(7)")
    parser.add_argument("--batches", type=int, default=20, help="a round (20)")
    arguments = parser.parse_args()
    files = sorted(
        str(path)
        for path in arguments.directory.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg")
    )
    if len(files) < BATCH:
        parser.error(f"{arguments.directory} holds fewer than {BATCH} JPEGs.")
    distinct = len(files)
    files *= -(-EXAMPLES // distinct)

    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, (_, package) in LOADERS.items():
        if importlib.util.find_spec(package):
            pipes[name], other = context.Pipe()
            processes.append(
                context.Process(
                    target=_serve, args=(other, name, files), daemon=True
                )
            )
            processes[-1].start()
            other.close()  # Else a loader that dies would be waited for.
    rates = {name: [] for name in pipes}
    for turn in range(arguments.rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(arguments.batches if turn else 1)
            rate = pipe.recv()
            if turn:  # the first warms up
                rates[name].append(rate)
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(0)
        process.join()
    medians = {name: statistics.median(found) for name, found in rates.items()}

    versions = {}
    for name in (
        *("grain", "simplejpeg", "opencv-python-headless", "pillow"),
        *("torch", "torchvision", "tensorflow-cpu", "tensorflow"),
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    print(f"{distinct} files, one core of {platform.machine()}, medians")
    print(", ".join(f"{name} {found}" for name, found in versions.items()))
    print(f"{'loader':<24}{'images/s':>10}{'ours / it':>12}{'range':>16}")
    for name, median in medians.items():
        spread = f"{min(rates[name]):.0f} ... {max(rates[name]):.0f}"
        ratio = medians["ours"] / median
        print(f"{name:<24}{median:>10.0f}{ratio:>12.2f}{spread:>16}")
    result = {
        "benchmark": "input",
        "images_per_second": medians,
        "rounds": rates,
        "versions": versions,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
