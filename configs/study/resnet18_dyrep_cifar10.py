_base_ = './resnet18_cifar10.py'

default_hooks = dict(
    dyrep=dict(
        type='dyrep_mm.DyRepHook',
        interval=49,  # iterations, a quarter of an epoch
        by_epoch=False,
        # Growing ends at 5/6 of the training: 10 updates.
        end=490,
        metric='gain',
    )
)
