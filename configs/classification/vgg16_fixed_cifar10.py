_base_ = './vgg16_cifar10.py'

# A structure that DyRep has found, trained from scratch without adaptation (section 5.5, Table 7).
# It may be a JSON file, or the checkpoint of any epoch of the run that found it.
custom_hooks = [
    dict(
        type='dyrep_mm.DyRepHook',
        interval=None,
        structure='work_dirs/vgg16_dyrep_cifar10/epoch_400.pth',
        init_scale=1.0,
    ),
]
