"""What every recipe shares. A recipe imports this and changes a few lines.

All durations are in epochs; boundaries of the schedule are shares of the run.
The returned config is locked: a mistyped key is an error that names the near
one.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.epochs = 90.0
    config.batch_size = 256  # over all devices and microbatches
    config.accumulate = 1  # microbatches, run in sequence to save memory
    config.label_smoothing = 0.0
    # Weights to start from, whatever load_pretrained takes: a file, a run's
    # directory or a name as torchvision/densenet121, for the model below; see
    # optimizer.backbone_lr_scale.
    config.pretrained = placeholder(str)
    config.ema_decay = placeholder(float)  # for example 0.9999

    # None leaves the attribute as the named variant has it.
    config.model = ConfigDict(
        dict(
            name="densenet121",
            block_layers=placeholder(tuple),
            # One number, one a block, or one a layer, as (4, 8, 12).
            growth_rate=placeholder(object),
            compression=placeholder(float),
            bottleneck_width=placeholder(int),
            stem=placeholder(str),
            stem_norm=placeholder(bool),
            stem_features=placeholder(object),  # of a deep stem also three
            stem_stride=placeholder(int),
            stem_pool=placeholder(bool),
            stem_padding=placeholder(str),  # same: TensorFlow's
            blur_pool=placeholder(str),  # stem, all
            num_classes=placeholder(int),  # None: as many as the data set has
            dropout_rate=placeholder(float),
            kernel_init=placeholder(str),
            norm_epsilon=placeholder(float),
            norm_momentum=placeholder(float),
            activation=placeholder(str),  # silu, gelu, ...
            norm=placeholder(str),  # group, instance
            norm_groups=placeholder(int),
            drop_path_rate=placeholder(float),
            squeeze_excite=placeholder(int),  # the reduction, as 16
            dtype="float32",  # or bfloat16
            remat="convs",  # or another of REMAT_POLICIES
            implementation=placeholder(str),  # of convolutions: xla, matmul
        )
    )
    config.dataset = ConfigDict(
        dict(
            name="imagenet2012",  # of TFDS; or folder, digits
            data_dir=placeholder(str),  # None: TFDS_DATA_DIR
            train_split="train",
            test_split="validation",
            num_workers=0,  # processes that load data; 0: threads
            on_error="raise",  # or skip: leaves out, and counts, bad records
        )
    )
    config.preprocessing = ConfigDict(
        dict(
            mean=(0.0,),
            std=(255.0,),
            image_size=placeholder(int),
            resize_size=placeholder(int),
            ten_crop=False,  # in evaluation
            random_resized_crop=False,
            flip=False,
            rand_augment=placeholder(tuple),  # (2, 9): operations, magnitude
            color_jitter=0.0,
            lighting=0.0,
            shift=0,
            random_erasing=0.0,  # probability
            mixup=0.0,  # alpha; with cutmix too, each batch has one of them
            cutmix=0.0,  # alpha
        )
    )
    config.optimizer = ConfigDict(
        dict(
            # adamw and lamb want rates nearer to 1e-3, lars nearer to 1.
            name="sgd",
            learning_rate=0.1,  # at base_batch_size; scales with the batch
            base_batch_size=256,
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
            decay_norms_and_biases=True,
            clip_norm=placeholder(float),
            # Share of the learning rate for all but the classifier; 0 freezes
            # the backbone, whose norms then use their running statistics.
            backbone_lr_scale=1.0,
        )
    )
    config.schedule = ConfigDict(
        dict(
            name="step",  # cosine
            boundaries=(1 / 3, 2 / 3),
            factor=0.1,
            warmup_epochs=0.0,
        )
    )
    config.log_every_steps = 50
    config.eval_every_epochs = 1.0
    config.checkpoint = ConfigDict(
        dict(
            every_epochs=1.0,
            # Also this long after the last; None leaves it to every_epochs.
            every_minutes=10.0,
            keep_newest=2,
            keep_best=1,
            on_damage="fallback",  # to the newest whole one; or stop
        )
    )
    return config.lock()
