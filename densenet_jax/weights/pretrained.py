"""The published weights that have a name here.

Addresses, figures and labels are those of the projects' own sources: of
torchvision 0.29 (models/densenet.py), timm 1.0 (models/densenet.py and
results/results-imagenet.csv) and torchxrayvision 1.5 (models.py).
"""

import dataclasses

from densenet_jax.runs.description import Description

_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """One file of published weights.

    Attributes:
      name: that `load_pretrained`, config.pretrained and --weights take.
      source: the page of the project that publishes it.
      address: of the file, or 'hf://ORG/REPO'.
      num_parameters: of the net.
      licence: that the project states for the weights; None: it states none.
      accuracy: top-1 on ImageNet's validation images, in percent, with the
        sizes below; None is not measured on ImageNet.
      mean, std: of each channel, in units of 0 ... 255.
      image_size: height and width of the input.
      resize_size: the shorter side before the central crop of image_size.
      task: one of `runs.description.TASKS`.
      class_names: of each logit; '' is a logit that was not trained. None:
        ImageNet's 1,000 classes in their usual order.
      file_size: in bytes; None where the sources do not say.
    """

    name: str
    source: str
    address: str
    num_parameters: int
    licence: str | None = None
    accuracy: float | None = None
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    image_size: int = 224
    resize_size: int = 256
    task: str = "classification"
    class_names: tuple[str, ...] | None = None
    file_size: int | None = None

    @property
    def description(self) -> Description:
        """The same as files and runs state it."""
        return Description(
            preprocessing={
                "mean": self.mean,
                "std": self.std,
                "image_size": self.image_size,
                "resize_size": self.resize_size,
            },
            class_names=self.class_names,
            task=self.task,
        )


def list_pretrained() -> list[Pretrained]:
    """What `load_pretrained` loads by its name.

    >>> for weights in list_pretrained():
    ...     print(weights.name, weights.accuracy, weights.image_size)
    """
    return list(PRETRAINED.values())


def _torchvision(net, num_parameters, accuracy, checksum, file_size):
    return Pretrained(
        name=f"torchvision/{net}",
        source="https://github.com/pytorch/vision",
        address=f"https://download.pytorch.org/models/{net}-{checksum}.pth",
        num_parameters=num_parameters,
        accuracy=accuracy,
        file_size=file_size,
    )


def _timm(name, num_parameters, accuracy, **sizes):
    return Pretrained(
        name=f"timm/{name}",
        source=f"https://huggingface.co/timm/{name}",
        address=f"hf://timm/{name}",
        num_parameters=num_parameters,
        licence="apache-2.0",
        accuracy=accuracy,
        **sizes,
    )


_PATHOLOGIES = (
    "Atelectasis",
    "Consolidation",
    "Infiltration",
    "Pneumothorax",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Effusion",
    "Pneumonia",
    "Pleural_Thickening",
    "Cardiomegaly",
    "Nodule",
    "Mass",
    "Hernia",
    "Lung Lesion",
    "Fracture",
    "Lung Opacity",
    "Enlarged Cardiomediastinum",
)
_NIH = _PATHOLOGIES[:14]
# The labels of CheXpert and of MIMIC-CXR among them.
_CHEXPERT = (
    "Atelectasis",
    "Consolidation",
    "Pneumothorax",
    "Edema",
    "Effusion",
    "Pneumonia",
    "Cardiomegaly",
    *_PATHOLOGIES[14:],
)


def _torchxrayvision(name, file_name, trained):
    return Pretrained(
        name=f"torchxrayvision/densenet121-res224-{name}",
        source="https://github.com/mlmed/torchxrayvision",
        address="https://github.com/mlmed/torchxrayvision/releases/download/v1/"
        f"{file_name}-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        num_parameters=6_966_034,
        licence="Apache-2.0",
        # It scales 0 ... 255 to -1024 ... 1024.
        mean=(127.5,),
        std=(127.5 / 1024,),
        resize_size=224,
        task="multilabel",
        class_names=tuple(n if n in trained else "" for n in _PATHOLOGIES),
    )


# timm evaluates its own nets larger than it trained them.
_LARGER = dict(image_size=288, resize_size=303)

PRETRAINED = {
    weights.name: weights
    for weights in (
        _torchvision("densenet121", 7_978_856, 74.434, "a639ec97", 32_342_954),
        _torchvision(
            "densenet161", 28_681_000, 77.138, "8d451a50", 115_730_790
        ),
        _torchvision("densenet169", 14_149_480, 75.600, "b2777c0a", 57_365_526),
        _torchvision("densenet201", 20_013_928, 76.896, "c1103571", 81_131_730),
        _timm("densenet121.ra_in1k", 7_978_856, 76.500, **_LARGER),
        _timm("densenetblur121d.ra_in1k", 7_998_088, 77.320, **_LARGER),
        _timm("densenet121.tv_in1k", 7_978_856, 74.764),
        _timm("densenet161.tv_in1k", 28_681_000, 77.358),
        _timm("densenet169.tv_in1k", 14_149_480, 75.900),
        _timm("densenet201.tv_in1k", 20_013_928, 77.286),
        _torchxrayvision(
            "all", "nih-pc-chex-mimic_ch-google-openi-kaggle", _PATHOLOGIES
        ),
        _torchxrayvision("nih", "nih", _NIH),
        _torchxrayvision("pc", "pc", (*_NIH, "Fracture")),
        _torchxrayvision("chex", "chex", _CHEXPERT),
        _torchxrayvision("rsna", "kaggle", ("Pneumonia", "Lung Opacity")),
        _torchxrayvision("mimic_nb", "mimic_nb", _CHEXPERT),
        _torchxrayvision("mimic_ch", "mimic_ch", _CHEXPERT),
    )
}

# What names begin with that are meant to be of the table.
SOURCES = sorted({name.partition("/")[0] for name in PRETRAINED})
